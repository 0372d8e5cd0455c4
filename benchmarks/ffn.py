"""The MoE layer against dense FFNs, forward and forward + backward.

    python benchmarks/ffn.py --output ffn.json

Two dense rivals: of the same total width (what the sparse layer must beat) and of the same
activated width (what perfect sparsity would cost). All ways take turns within each round, so that
what else the machine does falls on all of them; medians, and the middle half of the rounds.

A program runs several layers in one scan, rematerialised in the backward pass, as the transformer
does. A single layer would measure the operating system instead: every call touches fresh pages.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from timing import machine, measure

from d2m_jax.config import FluxConfig, MoEConfig, StackConfig
from d2m_jax.models.layers import FFN
from d2m_jax.models.moe import MoE

ACTIVATED = 1.5  # r_a = r_s + k · r_n of PAPER.md, in widths D
LAYERS = 8


def layer(kind: str, dim: int):
    """(parameters, function of parameters and x) of one way."""
    if kind.startswith("dense"):
        width = 4 * dim if kind == "dense total" else int(ACTIVATED * dim)
        graph, params = nnx.split(FFN(dim, width, rngs=nnx.Rngs(0)))
        return params, lambda params, x: nnx.merge(graph, params)(x)
    config = FluxConfig(
        hidden_size=dim,
        num_heads=1,
        axes_dim=(dim,),
        moe=MoEConfig(implementation=kind.removeprefix("moe ")),
    )
    graph, params = nnx.split(MoE(config, StackConfig(1, ffn="moe"), rngs=nnx.Rngs(0)))
    vec = jnp.zeros((1, dim))
    return params, lambda params, x: nnx.merge(graph, params)(x, x, vec)[0]


def flops(kind: str, dim: int, tokens: int) -> int:
    """Of a forward pass, as the formula has it: padding and masking are not counted as work."""
    width = 4 * dim if kind == "dense total" else int(ACTIVATED * dim)
    return 4 * tokens * dim * width


def compare(dim: int, tokens: int, rounds: int) -> list[dict]:
    """One row per way and direction; times and work are of one layer."""
    x = jax.random.normal(jax.random.key(0), (1, tokens, dim))
    calls, work = {}, {}
    for kind in ("dense total", "dense activated", "moe tiled", "moe reference"):
        params, function = layer(kind, dim)

        def stack(params, x, function=function):
            body = jax.checkpoint(lambda x, _: (x + function(params, x), None))
            return jax.lax.scan(body, x, length=LAYERS)[0]

        def loss(params, x, stack=stack):
            return jnp.square(stack(params, x)).mean()

        forward, both = jax.jit(stack), jax.jit(jax.grad(loss, argnums=(0, 1)))
        calls[kind, "forward"] = lambda f=forward, p=params: f(p, x)
        calls[kind, "forward + backward"] = lambda f=both, p=params: f(p, x)
        work[kind, "forward"] = flops(kind, dim, tokens)
        work[kind, "forward + backward"] = 4 * flops(kind, dim, tokens)  # forward runs twice
    times = {key: [t / LAYERS for t in ts] for key, ts in measure(calls, rounds).items()}
    return [
        {
            "dim": dim,
            "tokens": tokens,
            "way": way,
            "direction": direction,
            "milliseconds": 1e3 * median,
            "spread": [1e3 * low, 1e3 * high],
            "of dense total": median / times["dense total", direction][0],
            "gflops": work[way, direction] / 1e9,
            "gflops per second": work[way, direction] / 1e9 / median,
        }
        for (way, direction), (median, low, high) in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[96, 256, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[704, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    print(
        f"{'D':>4} {'tokens':>6}  {'way':16} {'direction':19} {'ms':>8} {'middle half':>17}", end=""
    )
    print(f" {'of dense':>9} {'GFLOP':>7} {'GFLOP/s':>8}")
    rows = []
    for dim in options.dims:
        for tokens in options.tokens:
            for row in compare(dim, tokens, options.rounds):
                low, high = row["spread"]
                print(
                    f"{dim:4} {tokens:6}  {row['way']:16} {row['direction']:19}"
                    f" {row['milliseconds']:8.2f} {low:8.2f}–{high:8.2f}"
                    f" {row['of dense total']:9.2f} {row['gflops']:7.3f}"
                    f" {row['gflops per second']:8.1f}",
                    flush=True,
                )
                rows.append(row)
    if options.output:
        report = machine() | {"note": options.note, "rows": rows}
        options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
