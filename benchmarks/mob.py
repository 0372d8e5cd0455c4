"""Mixture of Blocks against the whole group: is what is skipped really saved?

    python benchmarks/mob.py --output mob.json

κ of m blocks for batches whose samples choose different blocks, against all m blocks; alternating
in one run, medians and the middle half of the rounds. `ratio` would be κ / m if nothing but blocks
cost anything; `cores` is the same for what all cores of a CPU spent, `apart` is `ratio` where every
block has arrays of its own (models/parameters.py, unstacked), from which no weights are copied.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from timing import finish, limits, measure, on_cpu, parser, table, usual_dtype

from d2m_jax import flow
from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.blocks import SingleStreamBlock
from d2m_jax.models.layers import rope
from d2m_jax.models.parameters import unstacked
from d2m_jax.models.reports import Context
from d2m_jax.models.stack import Stack


def group(config: FluxConfig, stack: StackConfig, batch: int, side: int, text: int):
    """(parameters, function of parameters and x) of one group of single blocks."""
    graph, params = nnx.split(Stack(SingleStreamBlock, config, stack, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda a: a.astype(usual_dtype()), params)
    ids = jnp.concatenate([flow.text_ids(text), flow.image_ids(side, side)], axis=1)
    vec = jax.random.normal(jax.random.key(1), (batch, config.hidden_size))

    def function(params, x):
        context = Context(
            vec=vec,
            cond=jax.nn.silu(vec).astype(x.dtype),
            pe=rope(ids, config.axes_dim, config.theta),
            text_tokens=text,
        )
        return nnx.merge(graph, params)((x,), context, remat=True)[0][0]

    return params, function


def compare(dim: int, batch: int, blocks: int, active: int, side: int, text: int, rounds: int):
    """One row per direction."""
    width = 128 if dim >= 512 else 32
    axes = (16, 56, 56) if width == 128 else (8, 12, 12)
    config = FluxConfig(hidden_size=dim, num_heads=dim // width, axes_dim=axes, double=())
    shape = batch, text + side * side, dim
    x = jax.random.normal(jax.random.key(0), shape, usual_dtype())
    calls = {}
    for run in (active, blocks):
        params, function = group(config, StackConfig(1, blocks, run), batch, side, text)
        apart = unstacked({"stack": params})["stack"]

        def loss(params, x, function=function):
            return jnp.square(function(params, x).astype(jnp.float32)).mean()

        for direction, f in {
            "forward": jax.jit(function),
            "forward + backward": jax.jit(jax.grad(loss)),
        }.items():
            calls[run, direction] = lambda f=f, p=params: f(p, x)
            if run == active:
                calls["apart", direction] = lambda f=f, p=apart: f(p, x)
    times = measure(calls, rounds)
    for direction in ("forward", "forward + backward"):
        mine, whole = times[active, direction], times[blocks, direction]
        yield {
            "D": dim,
            "tokens": text + side * side,
            "batch": batch,
            "ran": f"{active}/{blocks}",
            "direction": direction,
            "ms": 1e3 * mine.median,
            "low": 1e3 * mine.low,
            "high": 1e3 * mine.high,
            "all, ms": 1e3 * whole.median,
            "ratio": mine.median / whole.median,
            "cores": mine.cores / whole.cores,
            "apart": times["apart", direction].median / whole.median,
            "κ / m": active / blocks,
        }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dims", type=int, nargs="+", default=[256, 512] if on_cpu() else [3072])
    options.add_argument("--side", type=int, default=12 if on_cpu() else 64, help="of the image")
    options.add_argument("--text_tokens", type=int, default=16 if on_cpu() else 512)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options.add_argument("--blocks", type=int, default=4)
    options.add_argument("--active", type=int, nargs="+", default=[1, 2])
    options = options.parse_args()

    def rows():
        for dim in options.dims:
            for batch in options.batches:
                for active in options.active:
                    sizes = options.side, options.text_tokens, options.rounds
                    yield from compare(dim, batch, options.blocks, active, *sizes)

    columns = {"D": "4d", "tokens": "6d", "batch": "5d", "ran": "<4", "direction": "<18"}
    columns |= {"ms": "9.2f", "low": "9.2f", "high": "9.2f", "all, ms": "9.2f", "ratio": "6.2f"}
    columns |= {"cores": "6.2f"} if on_cpu() else {}
    columns |= {"apart": "6.2f", "κ / m": "5.2f"}
    finish(options, table(columns, rows()), limits=limits())


if __name__ == "__main__":
    main()
