"""What cutting FLUX.1's FFNs takes at full size: seconds and peak memory of each part, per FFN.

    python benchmarks/sparsify.py --dim 3072 --tokens 4608

Random weights and inputs: an FFN of a double block, with its own output bias, and that of a single
block. Memory is the peak of the whole process, in GB, after each part.
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from timing import described

from d2m_jax.config import FluxConfig, MoEConfig, StackConfig
from d2m_jax.sparsification import sensitivity
from d2m_jax.sparsification.deal import cluster, features, fit_gate, split
from d2m_jax.sparsification.prune import ranked, take
from d2m_jax.sparsification.refit import refit


def told(name: str, run: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name:34} {seconds:8.1f} s {peak:8.2f} GB", flush=True)
    return result


def cut(dim: int, tokens: int, out_bias: bool) -> None:
    """One FFN in parts, as sparsification/student.py does it."""
    moe, stack, generator = MoEConfig(), StackConfig(1, ffn="moe"), np.random.default_rng(0)
    config = FluxConfig(hidden_size=dim, num_heads=dim // 128, moe=moe)
    shared, width = config.shared_width(stack), config.ffn_width(stack)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal((1, 1, *shape), np.float32) / np.float32(shape[0] ** 0.5)

    ffn = {"in_layer": {"kernel": draw(dim, width), "bias": draw(width)}}
    ffn["out_layer"] = {"kernel": draw(width, dim)} | ({"bias": draw(dim)} if out_bias else {})
    x = generator.standard_normal((1, 1, tokens, dim), np.float32)
    s = np.square(generator.standard_normal((1, 1, tokens, dim), np.float32))
    read = x[:, :, None], s[:, :, None]
    sums = told("sensitivity score", lambda: jax.jit(sensitivity.sums)(ffn, *read))
    scores = sensitivity.scores(jax.tree.map(np.asarray, sums))
    order = ranked(scores)
    weights = *ffn["in_layer"].values(), ffn["out_layer"]["kernel"]
    vectors = told("features", lambda: features(x[0, 0], *(a[0, 0] for a in weights)))
    rest = np.asarray(vectors)[order[0, 0, shared:]]
    labels = told("clusters", lambda: cluster(rest, moe.experts, generator))
    order[0, 0, shared:] = order[0, 0, shared:][np.argsort(labels, kind="stable")]
    made = split(take(ffn, order), shared, moe.experts)
    parts = [made["experts"][name][0, 0] for name in ("in_kernel", "in_bias", "out_kernel")]
    kernel, bias = told("gate", lambda: fit_gate(x[0, 0], *parts))
    gate = {"kernel": np.asarray(kernel)[None, None], "bias": np.asarray(bias)[None, None]}
    made |= {"gate": gate, "scale": np.ones((1, 1), np.float32)}
    told("refit, weighted", lambda: refit(made, ffn, x, s.sum(-1), moe))


def main() -> None:
    options = described(__doc__)
    options.add_argument("--dim", type=int, default=3072)
    options.add_argument("--tokens", type=int, default=4608)
    options = options.parse_args()
    for block, out_bias in (("double", True), ("single", False)):
        print(f"{block} block, D = {options.dim}, {options.tokens} tokens")
        cut(options.dim, options.tokens, out_bias)


if __name__ == "__main__":
    main()
