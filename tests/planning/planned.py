"""Small programs for the planner's tests, compiled in a process of its own: devices must be asked
for before JAX starts.

    python -m tests.planning.planned TOPOLOGY collectives | plan [dim=64 …]
"""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from d2m_jax.planning import hardware
from d2m_jax.planning.collectives import collectives
from d2m_jax.planning.plan import plan


def skip_without_compiler(name):
    tpu = name.startswith("v") and not importlib.util.find_spec("libtpu")
    if tpu or (name.startswith("h") and not hardware.has_gpu_compiler()):
        pytest.skip(f"the compiler for {name} is not installed")


def run(*arguments):
    """What this file prints, given these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def make_mesh(devices, data, fsdp):
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    options = {"allow_split_physical_axes": True}
    if slices > 1:
        shape = (data // slices, fsdp)
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1), devices, **options)
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices, **options)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def abstract(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def communicating(mesh, rows=1024, columns=256):
    """Lowered: each kind of collective on float32[rows, columns], in loops of known lengths."""

    def local(x):
        def inner(x, _):  # 5 × 3 times
            return jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), None

        def outer(x, _):  # 5 times
            x = jax.lax.psum(jnp.sin(x), "data")
            gathered = jax.lax.all_gather(jnp.cos(x), "fsdp")  # [fsdp, rows, columns]
            x, _ = jax.lax.scan(inner, gathered[0], None, length=3)
            scattered = jax.lax.psum_scatter(jnp.tan(x), "data", tiled=True)
            return x + jnp.tile(scattered, (jax.lax.axis_size("data"), 1)), None

        x, _ = jax.lax.scan(outer, x, None, length=5)
        # The larger branch has a psum, the other one has none.
        x = jax.lax.cond(jnp.sum(jax.lax.pmax(x, ("data", "fsdp"))) > 0, branch, jnp.sin, x)
        return jax.lax.all_to_all(x, "data", 0, 1, tiled=True)

    def branch(x):
        return jax.lax.psum(x, "data")

    spec = P(("data", "fsdp"))
    function = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = abstract(mesh, (mesh.size * rows, columns), jnp.float32, ("data", "fsdp"))
    return jax.jit(function).lower(x)


def block(weights, x, heads):
    """A transformer's block without norms."""
    weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
    qkv = (x @ weights["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
    x = x + jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0)).reshape(x.shape) @ weights["o"]
    return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"]


def training(mesh, dim=64, depth=4, tokens=32, heads=4, batch=1):
    """(lowered, parts): a step that distils `depth` blocks in one scan, as the real one does."""
    shapes = {"qkv": (dim, 3 * dim), "o": (dim, dim), "up": (dim, 4 * dim), "down": (4 * dim, dim)}

    def stack(dtype):
        return {k: abstract(mesh, (depth, *s), dtype, None, "fsdp") for k, s in shapes.items()}

    frozen, trainable = stack(jnp.bfloat16), stack(jnp.float32)
    optimizer = optax.adam(1e-4)

    def place(path, leaf):
        name = next((k.key for k in path if getattr(k, "key", None) in shapes), None)
        spec = trainable[name].sharding.spec if name else ()
        return abstract(mesh, leaf.shape, leaf.dtype, *spec)

    state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, trainable))
    x = abstract(mesh, (batch * mesh.size, tokens, dim), jnp.bfloat16, ("data", "fsdp"))

    def loss(trainable, frozen, x):
        def body(carry, weights):
            teacher, student, error = carry
            teacher, student = (
                jax.lax.with_sharding_constraint(block(w, a, heads), P(("data", "fsdp")))
                for w, a in zip(weights, (teacher, student), strict=True)
            )
            return (teacher, student, error + difference(teacher, student)), None

        carry = (x, x, jnp.float32(0))
        body = jax.checkpoint(body, prevent_cse=False)
        return jax.lax.scan(body, carry, (frozen, trainable))[0][2]

    def difference(a, b):
        return jnp.square((a - b).astype(jnp.float32)).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, state, frozen, x):
        gradient = jax.grad(loss)(trainable, frozen, x)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    with jax.set_mesh(mesh):
        lowered = step.lower(trainable, state, frozen, x)
    return lowered, {"trainable": trainable, "optimizer": state, "frozen": frozen, "batch": x}


def training_flops(mesh, dim=64, depth=4, tokens=32, heads=4, batch=1):
    """Of one step: the teacher's forward, the student's and its backward; and recomputed ones."""
    forward = depth * batch * mesh.size * tokens * (24 * dim**2 + 4 * tokens * dim)
    return 4 * forward, 2 * forward


def main(name, what, **sizes):
    if name == "cpu":
        jax.config.update("jax_num_cpu_devices", 8)
        devices = jax.devices()
    else:
        topology = hardware.parse(name)
        hardware.prepare(topology)
        devices = hardware.devices(topology)
    if what == "collectives":
        text = communicating(make_mesh(devices, len(devices) // 2, 2)).compile().as_text()
        return [vars(one) for one in collectives(text)]
    data = max(topology.slices, len(devices) // 64)
    mesh = make_mesh(devices, data, len(devices) // data)
    lowered, parts = training(mesh, **sizes)
    flops, recomputed = training_flops(mesh, **sizes)
    return plan(lowered, topology, mesh, parts, flops, recomputed).to_json()


if __name__ == "__main__":
    sizes = {key: int(value) for key, value in (a.split("=") for a in sys.argv[3:])}
    print(json.dumps(main(sys.argv[1], sys.argv[2], **sizes)))
