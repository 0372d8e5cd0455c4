"""A batch cut over devices gives what one device gives, MoE and MoB included."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Devices must be asked for before JAX starts, hence a process of its own.
SCRIPT = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from d2m_jax import flow
from d2m_jax.config import FluxConfig, MeshConfig, MoEConfig, StackConfig
from d2m_jax.models import moe
from d2m_jax.models.flux import initialise, model_of
from d2m_jax.sharding import batch_sharding, make_mesh, replicated

moe.SORTED_TOKENS = 16  # the sparse path at a test's size
config = FluxConfig(
    in_channels=8, vec_in_dim=8, context_in_dim=8, hidden_size=32, num_heads=2,
    axes_dim=(4, 6, 6), guidance_embed=False, moe=MoEConfig(experts=4, top_k=2),
    double=(StackConfig(1, ffn="moe"),),
    single=(StackConfig(1, ffn="moe"), StackConfig(1, blocks=3, active=2, ffn="moe")),
)
params = initialise(config, 0)
keys = iter(jax.random.split(jax.random.key(1), 100))
# Everything random: gates and last layer start at zero and would hide what the blocks do.
params = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape), params)
batch = {
    "img": jax.random.normal(next(keys), (8, 9, 8)),
    "txt": jax.random.normal(next(keys), (8, 4, 8)),
    "y": jax.random.normal(next(keys), (8, 8)),
    "t": jax.random.uniform(next(keys), (8,)),
}

@jax.jit
def loss_and_gradient(params, batch):
    def loss(params):
        model = model_of(config, params)
        ids = flow.image_ids(3, 3), flow.text_ids(4)
        start = model.embed(batch["img"], ids[0], batch["txt"], ids[1], batch["t"], batch["y"])
        velocity, report = model.run(*start)
        return jnp.square(velocity).mean(), velocity
    return jax.value_and_grad(loss, has_aux=True)(params)

alone = jax.device_get(loss_and_gradient(params, batch))
mesh = make_mesh(MeshConfig(data=2, fsdp=2))
placed = jax.device_put(params, replicated(mesh)), jax.device_put(batch, batch_sharding(mesh))
with jax.set_mesh(mesh):
    text = loss_and_gradient.lower(*placed).as_text()
    together = jax.device_get(loss_and_gradient(*placed))
assert "manual_computation" in text or "shard_map" in text, "nothing ran on its own samples"
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
    # float32 sums in another order
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * max(1e-3, np.abs(a).max()))
print("equal")
"""


def test_cut_over_devices_equals_one_device():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
