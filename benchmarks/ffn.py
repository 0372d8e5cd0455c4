"""The MoE layer against dense FFNs, forward and forward + backward, and its parts.

    python benchmarks/ffn.py --output ffn.json

Two dense rivals: of the same total width (what the sparse layer must beat) and of the same
activated width (what perfect sparsity would cost). Every way of kernels/grouped_matmul.py that runs
on this device takes part; --load says how tokens fall on experts. All take turns within each round,
so that what else the machine does falls on all of them; medians, and the middle half of the rounds.

A program runs several layers in one scan, rematerialised in the backward pass, as the transformer
does. A single layer would measure the operating system instead: every call touches fresh pages.
Parts are differences between programs that stop earlier and earlier.
"""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from models import LOADS, routing
from timing import Times, finish, limits, measure, on_cpu, parser, table, usual_dtype

from d2m_jax.config import FluxConfig, MoEConfig, StackConfig
from d2m_jax.kernels import grouped_matmul, tiles, token_rows
from d2m_jax.kernels.target import target
from d2m_jax.models import experts, moe
from d2m_jax.models.blocks import ffn
from d2m_jax.models.experts import sort
from d2m_jax.models.layers import FFN
from d2m_jax.models.reports import Context

ACTIVATED = 1.5  # r_a = r_s + k · r_n of docs/method.md, in widths D
LAYERS = 8
PARTS = ("shared expert", "routing", "sorting", "grouped matmuls", "combining")
TILED = ("shared expert", "routing", "sorting", "tiles")  # whose products add as they go


def ways() -> list[str]:
    """The implementations worth measuring here."""
    device = target()
    fit = [name for name in grouped_matmul.WAYS if not grouped_matmul.lacks(name, device)]
    return [*fit, "tiled", "reference"]


def sparse(dim: int):
    """(program, parameters) of one MoE layer."""
    config = FluxConfig(hidden_size=dim, num_heads=1, axes_dim=(dim,), moe=MoEConfig())
    return nnx.split(ffn(config, StackConfig(1, ffn="moe"), rngs=nnx.Rngs(0)))


def layer(kind: str, dim: int):
    """(parameters, function of parameters and x) of one way."""
    if kind.startswith("dense"):
        width = 4 * dim if kind == "dense total" else int(ACTIVATED * dim)
        graph, params = nnx.split(FFN(dim, width, rngs=nnx.Rngs(0)))
        return params, lambda params, x: nnx.merge(graph, params)(x)
    graph, params = sparse(dim)
    vec = jnp.zeros((1, dim))
    table = jnp.zeros((1, 1, 1, 1))
    context = Context(vec, cond=vec, pe=(table, table), text_tokens=0)

    def function(params, x):
        with mock.patch.object(experts, "asked", lambda: kind.removeprefix("moe ")):
            return nnx.merge(graph, params)(x, x, context)[0]

    return params, function


def part(index: int, way: str, graph, params, x):
    """The MoE layer up to a part of PARTS; what came last is computed, and nothing after it."""
    module = nnx.merge(graph, params)
    y = module.shared(x)
    if index == 0:
        return y
    probability, chosen, weight = moe.route(
        module.config, module.logits(x, x, jnp.zeros((1, x.shape[-1]))), 2
    )
    last = probability, chosen, weight
    flat, experts = x.reshape(-1, x.shape[-1]), module.config.experts
    if index == 2 and way == "tiled":
        places = tiles.place(chosen[0], experts, experts)
        last = token_rows.spread(flat, places.choice, places.row), places
    elif index == 2:
        order, row, sizes = sort(chosen[0], experts)
        last = token_rows.spread(flat, order, row), sizes
    if index == 3:
        last = _rows(way, module, x, chosen[0])
    last = jax.lax.optimization_barrier(last)
    return y + 1e-9 * sum(a.reshape(-1)[0].astype(y.dtype) for a in jax.tree.leaves(last))


def _rows(way, module, x, chosen):
    """Sorting and the grouped matmuls, without putting their rows back."""
    experts = module.experts.cast(x.dtype)
    order, row, sizes = sort(chosen, module.config.experts)
    tokens = token_rows.spread(x.reshape(-1, x.shape[-1]), order, row)
    hidden = jax.nn.gelu(grouped_matmul.grouped_matmul(tokens, experts[0], sizes, way))
    return (grouped_matmul.grouped_matmul(hidden, experts[2], sizes, way),)


def stacked(function, params, x):
    body = jax.checkpoint(lambda x, _: (x + function(params, x), None))
    return jax.lax.scan(body, x, length=LAYERS)[0]


def loss(function, params, x):
    return jnp.square(stacked(function, params, x).astype(jnp.float32)).mean()


def flops(kind: str, dim: int, tokens: int) -> int:
    """Of a forward pass, as the formula has it: padding and masking are not counted as work."""
    width = 4 * dim if kind == "dense total" else int(ACTIVATED * dim)
    return 4 * tokens * dim * width


def compare(dim: int, tokens: int, rounds: int, peak: float):
    """One row per way and direction, then one per part; times and work are of one layer."""
    x = jax.random.normal(jax.random.key(0), (1, tokens, dim), usual_dtype())
    calls = {}
    for kind in ("dense total", "dense activated", *(f"moe {way}" for way in ways())):
        params, function = layer(kind, dim)
        params = jax.tree.map(lambda a: a.astype(x.dtype), params)
        forward = jax.jit(partial(stacked, function))
        both = jax.jit(jax.grad(partial(loss, function), argnums=(0, 1)))
        calls[kind, "forward"] = lambda f=forward, p=params: f(p, x)
        calls[kind, "forward + backward"] = lambda f=both, p=params: f(p, x)
    parts = TILED if ways()[0] == "tiled" else PARTS
    graph, params = sparse(dim)
    params = jax.tree.map(lambda a: a.astype(x.dtype), params)
    for i, name in enumerate(parts[:-1]):
        cut = jax.jit(partial(stacked, partial(part, i, ways()[0], graph)))
        calls[name, "part"] = lambda f=cut: f(params, x)
    times = {
        key: Times(*(t / LAYERS for t in taken)) for key, taken in measure(calls, rounds).items()
    }
    for (way, direction), (median, low, high, cores) in times.items():
        if direction == "part":
            continue
        # The backward pass costs twice the forward one, which runs twice.
        work = flops(way, dim, tokens) * (1 if direction == "forward" else 4)
        yield {
            "D": dim,
            "tokens": tokens,
            "way": way,
            "direction": direction,
            "ms": 1e3 * median,
            "low": 1e3 * low,
            "high": 1e3 * high,
            "of dense": median / times["dense total", direction].median,
            "GFLOP": work / 1e9,
            "of peak": work / median / peak,
            "cores of dense": cores / times["dense total", direction].cores,
        }
    # On a CPU by what the cores spent: differences of clock times would be the other work's.
    clock = "cores" if on_cpu() else "median"
    ends = [getattr(times[name, "part"], clock) for name in parts[:-1]]
    ends.append(getattr(times[f"moe {ways()[0]}", "forward"], clock))
    for name, start, end in zip(parts, [0.0, *ends], ends, strict=False):
        row = {"D": dim, "tokens": tokens, "way": name, "direction": f"part of {ways()[0]}"}
        yield row | {"ms": 1e3 * (end - start), "of dense": (end - start) / ends[-1]}


def main() -> None:
    options = parser(__doc__)
    dims, tokens = ([256, 512, 1024], [1280]) if on_cpu() else ([3072], [4608, 1536])
    options.add_argument("--dims", type=int, nargs="+", default=dims)
    options.add_argument("--tokens", type=int, nargs="+", default=tokens)
    options.add_argument("--load", choices=LOADS, default="random")
    options = options.parse_args()
    peak = limits()
    print(f"{peak['matmul, FLOP/s'] / 1e9:.0f} GFLOP/s, {peak['copy, bytes/s'] / 1e9:.1f} GB/s;")
    print("`of dense`: of the dense FFN of equal total width, for parts: of the layer")

    def compared():
        for dim in options.dims:
            for tokens in options.tokens:
                with routing(options.load, tokens):
                    yield from compare(dim, tokens, options.rounds, peak["matmul, FLOP/s"])

    columns = {"D": "4d", "tokens": "6d", "way": "<16", "direction": "<18", "ms": "9.3f"}
    columns |= {"low": "9.3f", "high": "9.3f", "of dense": "8.2f", "GFLOP": "8.2f"}
    columns |= {"of peak": "8.2f"} | ({"cores of dense": "14.2f"} if on_cpu() else {})
    finish(options, table(columns, compared()), limits=peak)


if __name__ == "__main__":
    main()
