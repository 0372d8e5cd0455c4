"""Mixture of Blocks against the whole group: is what is skipped really saved?

    python benchmarks/mob.py --output mob.json

κ of m blocks for batches whose samples choose different blocks, against all m blocks; alternating
in one run, medians and the middle half of the rounds.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from timing import machine, measure

from d2m_jax import flow
from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.blocks import Context, SingleStreamBlock
from d2m_jax.models.flux import Stack
from d2m_jax.models.layers import rope

TEXT, GRID = 16, (12, 12)


def group(config: FluxConfig, stack: StackConfig, batch: int):
    """(parameters, function of parameters and x) of one group of single blocks."""
    graph, params = nnx.split(Stack(SingleStreamBlock, config, stack, rngs=nnx.Rngs(0)))
    ids = jnp.concatenate([flow.text_ids(TEXT), flow.image_ids(*GRID)], axis=1)
    vec = jax.random.normal(jax.random.key(1), (batch, config.hidden_size))

    def function(params, x):
        context = Context(
            vec=vec,
            cond=jax.nn.silu(vec),
            pe=rope(ids, config.axes_dim, config.theta),
            text_tokens=TEXT,
        )
        return nnx.merge(graph, params)((x,), context, remat=True)[0][0]

    return params, function


def compare(dim: int, batch: int, blocks: int, active: int, rounds: int) -> list[dict]:
    """One row per direction."""
    config = replace(
        FluxConfig(), hidden_size=dim, num_heads=dim // 32, axes_dim=(8, 12, 12), double=()
    )
    x = jax.random.normal(jax.random.key(0), (batch, TEXT + GRID[0] * GRID[1], dim))
    calls = {}
    for run in (active, blocks):
        params, function = group(config, StackConfig(1, blocks, run), batch)

        def loss(params, x, function=function):
            return jnp.square(function(params, x)).mean()

        for direction, f in {
            "forward": jax.jit(function),
            "forward + backward": jax.jit(jax.grad(loss)),
        }.items():
            calls[run, direction] = lambda f=f, p=params: f(p, x)
    times = measure(calls, rounds)
    return [
        {
            "dim": dim,
            "batch": batch,
            "blocks": blocks,
            "active": active,
            "direction": direction,
            "milliseconds": 1e3 * times[active, direction][0],
            "milliseconds of all": 1e3 * times[blocks, direction][0],
            "ratio": times[active, direction][0] / times[blocks, direction][0],
            "spread": [1e3 * t for t in times[active, direction][1:]],
        }
        for direction in ("forward", "forward + backward")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--active", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    print("   D batch  ran  direction                 ms   all (ms)  ratio  κ/m")
    rows = []
    for dim in options.dims:
        for batch in options.batches:
            for active in options.active:
                for row in compare(dim, batch, options.blocks, active, options.rounds):
                    print(
                        f"{dim:4} {batch:5} {active}/{options.blocks}  {row['direction']:19}"
                        f" {row['milliseconds']:8.2f} {row['milliseconds of all']:10.2f}"
                        f" {row['ratio']:6.2f} {active / options.blocks:4.2f}",
                        flush=True,
                    )
                    rows.append(row)
    if options.output:
        report = machine() | {"note": options.note, "rows": rows}
        options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
