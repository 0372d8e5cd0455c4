"""How many bytes of weights a forward copies on a GPU, with a loop over blocks and without.

    python benchmarks/copies.py --topology h100:1

Compiles FLUX.1 at full size, 1024² images, batch 1, by XLA for CUDA, which needs no GPU (extra
`gpu`), and reads the compiled program: a loop over stacked blocks takes each block's weights out
of the stack by a copy, which is read and written before a matmul reads it again; a program that is
written out (models/parameters.py, unstacked) has none. The kernels of
attention and of normal experts cannot be compiled without a GPU: the former, which has no weights,
is left out, and something as opaque that takes the same weights stands for the latter.
"""

import re
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from timing import finish, parser, table

from d2m_jax import command_line
from d2m_jax.models import experts, flux, layers, parameters
from d2m_jax.planning import hardware, hlo

MODELS = {
    "FLUX.1 [dev]": "flux_dev",
    "MoE-L": "flux_moe_l",
    "MoE-S": "flux_moe_s",
    "MoE-XS": "flux_moe_xs",
}
SHAPES = (1, 4096, 64), (1, 4096, 3), (1, 512, 4096), (1, 512, 3), (1,), (1, 768), (1,)


def copied(text: str) -> float:
    """Bytes that a program writes by taking slices out of stacks, loops multiplied out."""
    computations, entry = hlo.parse(text)

    def of(name: str) -> float:
        computation, total = computations[name], 0.0
        for one in computation.values():
            called = hlo.CALLED.search(one.text) if one.opcode == "fusion" else None
            inner = computations[called[1]].values() if called else [one]
            # A slice that is all that a fusion gives is a copy; others are read where they are.
            slices = [hlo.bytes_of(i.shape) for i in inner if i.opcode == "dynamic-slice"]
            if hlo.bytes_of(one.shape) in slices:
                total += hlo.bytes_of(one.shape)
            elif one.opcode == "while":
                body = re.search(r"body=%?([\w.-]+)", one.text)[1]
                times = hlo.trips(one, computation, computations)
                if times is None and of(body):
                    print(f"{one.name}: a loop of unknown length, counted once", file=sys.stderr)
                total += of(body) * (1 if times is None else times)
        return total

    return of(entry)


def opaque(way, samples, experts, among=None, cut=None):
    """In the place of grouped matmuls: it wants each array of weights as it is in memory."""
    total = sum(w.astype(jnp.float32).mean() for w in jax.lax.optimization_barrier(experts))
    return samples[0] * total.astype(samples[0].dtype)


def rows(topology: hardware.Topology):
    """A model's program with a loop, then written out."""
    sharding = SingleDeviceSharding(hardware.devices(topology)[0])

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def forward(config, params, *inputs):
        model = flux.model_of(config, params, jnp.bfloat16)
        streams, context = model.embed(*inputs)
        # As in sampling: all modulations at once.
        return model.run(streams, context, model.modulations(context.cond))[0]

    for label, name in MODELS.items():
        config = command_line.load_config(f"configs/{name}.py")
        stacked = flux.abstract(config)
        for way, params in (
            ("a loop", stacked),
            ("written out", jax.eval_shape(parameters.unstacked, stacked)),
        ):
            params = jax.tree.map(lambda a: array(a.shape), params)
            start = time.perf_counter()
            program = jax.jit(partial(forward, config)).lower(params, *map(array, SHAPES))
            size = copied(program.compile().as_text())
            yield {
                "model": label,
                "blocks": way,
                "GB of weights": 2 * sum(a.size for a in jax.tree.leaves(params)) / 1e9,
                "GB copied": size / 1e9,
                # written once, and read once more than there is need
                "ms": 2e3 * size / topology.accelerator.memory_bandwidth,
                "s to compile": time.perf_counter() - start,
            }


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--topology", default="h100:1")
    options = options.parse_args()
    topology = hardware.parse(options.topology)
    hardware.prepare(topology)
    layers.attention = lambda q, k, v: v
    experts.run_experts = opaque
    columns = {"model": "<12", "blocks": "<11", "GB of weights": "13.1f", "GB copied": "9.1f"}
    columns |= {"ms": "6.1f", "s to compile": "12.0f"}
    finish(options, table(columns, rows(topology)))


if __name__ == "__main__":
    main()
