"""Tune the tile sizes of tokamax's kernels for this device: once, in minutes, kept in a file.

    python benchmarks/tune.py

The shapes are those of FLUX.1-MoE at 1024² and 512² pixels with 512 text tokens: double blocks see
image and text apart, single ones together. Other shapes: --dim, --tokens.
"""

from functools import partial

import jax
from ffn import layer, loss, ways
from timing import parser, usual_dtype

from d2m_jax.kernels import grouped_matmul
from d2m_jax.kernels.tuning import tune


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dim", type=int, default=3072)
    options.add_argument("--tokens", type=int, nargs="+", default=[4608, 4096, 1536, 1024, 512])
    options = options.parse_args()
    own = grouped_matmul.WAYS
    tunable = [way for way in ways() if way in own and own[way].tokamax]
    if not tunable:
        print("nothing to tune: no kernel of tokamax runs on this device")
    for way in tunable:
        params, function = layer(f"moe {way}", options.dim)
        params = jax.tree.map(lambda a: a.astype(usual_dtype()), params)
        for tokens in options.tokens:
            x = jax.ShapeDtypeStruct((1, tokens, options.dim), usual_dtype())
            program = jax.jit(jax.grad(partial(loss, function), argnums=(0, 1)))
            file = tune(program.lower(params, x))
            print(f"{way}, {tokens} tokens: {file}", flush=True)


if __name__ == "__main__":
    main()
