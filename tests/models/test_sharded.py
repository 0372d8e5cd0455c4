"""Cut over the devices of a mesh, a model gives what it gives on one device: every axis, all parts.

Devices must be asked for before JAX starts, hence processes of their own.
"""

import pytest

from tests import own_process

START = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 12)
import jax.numpy as jnp
import numpy as np
from flax import nnx
from d2m_jax.config import FluxConfig, MeshConfig, MoEConfig, StackConfig
from d2m_jax.models import experts
from d2m_jax.models.blocks import ffn
from d2m_jax.sharding import (
    make_mesh, parameter_shardings, put_batch, put_parameters, replicated, whole
)
from d2m_jax.planning.collectives import collectives
from tests.models import toy
from tests.seed import generator

experts.SPARSE_TOKENS = 16  # the sparse path at a test's size

def mesh_of(*sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])

def compare(alone, together, tolerance):
    named = jax.tree_util.tree_leaves_with_path(alone)
    for (path, a), b in zip(named, jax.tree.leaves(together), strict=True):
        a, b = whole(a), whole(b)
        error = np.abs(a - b).max() / max(1e-3, np.abs(a).max())
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"
"""

LAYER = """
config = FluxConfig(hidden_size=48, num_heads=4, axes_dim=(4, 4, 4), moe=MoEConfig())
layer = ffn(config, StackConfig(1, ffn="moe"), rngs=nnx.Rngs(0))
graph, params = nnx.split(layer)
draw = generator()
batch = {"x": draw.normal(size=(12, 16, 48)).astype("f"), "dy": draw.normal(size=(12, 16, 48))}

def both(params, batch):
    def product(params, x):
        y, report = nnx.merge(graph, params)(x, x, toy.context(x[:, 0]))
        return (y * batch["dy"]).sum(), (y, report.routing.load)
    gradients, (y, load) = jax.grad(product, (0, 1), has_aux=True)(params, batch["x"])
    return y, load, nnx.to_pure_dict(gradients[0]), gradients[1]

alone = jax.jit(both)(params, batch)
for sizes in ((1, 1, 2, 1), (1, 2, 3, 1), (1, 1, 4, 1), (2, 1, 6, 1), (1, 1, 12, 1),
              (1, 1, 1, 4), (1, 2, 2, 3), (12, 1, 1, 1), (3, 4, 1, 1)):
    mesh = mesh_of(*sizes)
    placed = put_parameters(mesh, params)
    kernel = placed["experts"]["in_kernel"][...]
    assert (sizes[2] == 1) or "expert" in str(kernel.sharding.spec), kernel.sharding.spec
    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(placed, put_batch(mesh, batch)).compile()
        together = compiled(placed, put_batch(mesh, batch))
    # Sums in float32, in another order; gradients of 192 tokens that nearly cancel.
    compare(alone, together, 2e-5)
    text = compiled.as_text()
    if sizes[2] > 1:
        assert "reduce-scatter" in text or "all-to-all" in text, "no expert went to its device"

# The sum of the experts' gradients is cut at once: no device gets all of it.
mesh = mesh_of(1, 4, 1, 1)
placed = put_parameters(mesh, params)
gate = {name: placed[name] for name in ("gate", "scale", "shared")}
with jax.set_mesh(mesh):
    def of_experts(experts, batch):
        return both(nnx.State({"experts": experts, **gate}), batch)[2]["experts"]
    own = parameter_shardings(mesh, {"experts": placed["experts"]})["experts"]
    program = jax.jit(of_experts, out_shardings=nnx.to_pure_dict(own))
    text = program.lower(placed["experts"], put_batch(mesh, batch)).compile().as_text()
summed = dict.fromkeys(("all-reduce", "reduce-scatter"), 0)
for one in collectives(text):
    if one.kind in summed and one.size > 1:
        summed[one.kind] += one.bytes * one.count
biases, kernels = params["experts"]["in_bias"][...].nbytes, 2 * kernel.nbytes
assert summed == {"all-reduce": biases, "reduce-scatter": kernels}, summed
print("equal")
"""

MODEL = """
from d2m_jax import flow
from d2m_jax.config import LossConfig, ModelConfig, PixelsConfig, StageConfig, WordsConfig
from d2m_jax.distillation.stages import distill_loss
from d2m_jax.models.flux import model_of
from d2m_jax.models.parameters import unstacked
from d2m_jax.sampling.denoise import denoise
from d2m_jax.sparsification.groups import align, shapes

sizes = dict(
    in_channels=8, vec_in_dim=8, context_in_dim=8, hidden_size=48, num_heads=4, axes_dim=(4, 4, 4)
)
dense = FluxConfig(**sizes, double=(StackConfig(1),), single=(StackConfig(2),))
sparse = FluxConfig(
    **sizes, double=(StackConfig(1, ffn="moe"),), single=(StackConfig(1, 2, 1, ffn="moe"),),
    moe=MoEConfig(experts=4), modulation_rank=8,
)
def config(transformer):
    return ModelConfig(
        transformer, WordsConfig(dim=8, length=4), PixelsConfig(height=6, width=6, patch=2)
    )

aligned, teacher = align(dense, toy.params(dense), shapes(sparse))
student = toy.params(sparse, 1)
draw = generator()
batch = {
    "latents": draw.normal(size=(8, 3, 3, 8)).astype("f"),
    "txt": draw.normal(size=(8, 4, 8)).astype("f"),
    "y": draw.normal(size=(8, 8)).astype("f"),
}
loss = distill_loss(config(aligned), config(sparse), StageConfig(loss=LossConfig()))

def step(student, teacher, batch):
    value = jax.value_and_grad(loss, has_aux=True)
    return value(student, teacher, batch, jax.random.key(3))

def sample(student, batch):
    text = batch["txt"], batch["y"]
    times = np.linspace(1, 0, 3, dtype="f")
    noise = batch["latents"].reshape(8, 9, 8)
    return denoise(model_of(sparse, student), noise, text, (3, 3), times, 3.5)

alone, images = jax.jit(step)(student, teacher, batch), jax.jit(sample)(student, batch)
for sizes in ((1, 8, 1, 1), (2, 1, 2, 2)):
    mesh = mesh_of(*sizes)
    placed = put_parameters(mesh, (student, teacher))
    everything = replicated(mesh)
    out = (everything, everything), parameter_shardings(mesh, student)
    with jax.set_mesh(mesh):
        together = jax.jit(step, out_shardings=out)(*placed, put_batch(mesh, batch))
    # Sums in float32, in another order: of losses as large as 600, through three blocks.
    compare(alone, together, 2e-4)
for sizes in ((1, 1, 2, 4), (2, 2, 1, 2)):
    mesh = mesh_of(*sizes)
    placed = put_parameters(mesh, student)
    with jax.set_mesh(mesh):
        together = jax.jit(sample)(placed, put_batch(mesh, batch))
    compare(images, together, 1e-4)
with jax.set_mesh(mesh):
    together = jax.jit(sample)(unstacked(placed, release=True), put_batch(mesh, batch))
compare(images, together, 1e-4)
print("equal")
"""


@pytest.mark.parametrize("script", [LAYER, MODEL], ids=["layer", "model"])
def test_cut_over_devices_equals_one_device(script):
    own_process.assert_equal(START + script)
