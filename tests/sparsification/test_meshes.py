"""The same student from the same teacher, however many devices calibrate it.

Scores are float32 sums, in another order on another mesh: neurons that are nearly equal may trade
places. Devices must be asked for before JAX starts, hence a process of its own.
"""

from tests import own_process

SCRIPT = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from dataclasses import replace
from d2m_jax.config import FluxConfig, MeshConfig, ModelConfig, MoEConfig, SparsifyConfig
from d2m_jax.models.flux import initialise
from d2m_jax.sharding import make_mesh, put_batch, put_parameters, whole
from d2m_jax.sparsification import make_student
from d2m_jax.named_arrays import names
from tests.seed import generator
from tests.sparsification.conftest import CONFIG, batches, noisy, velocity

config = replace(CONFIG, hidden_size=48, num_heads=4, axes_dim=(4, 4, 4))
rng = generator()
params = jax.tree.map(
    # in bfloat16, as a teacher is stored
    lambda a: (whole(a) + 0.1 * rng.standard_normal(a.shape)).astype(jnp.bfloat16),
    initialise(config, 0),
)
sparsify = SparsifyConfig(
    moe=MoEConfig(experts=4), batches=3, batch_size=8, tokens=200,
    shared="sensitivity", refit="weighted",
)

def student(*sizes):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    placed = put_parameters(mesh, params)
    with jax.set_mesh(mesh):
        given = (put_batch(mesh, batch) for batch in batches(3))
        found = make_student(ModelConfig(transformer=config), placed, sparsify, given, noisy, 0)
    return found[0].transformer, jax.tree.map(whole, found[1])

teacher = velocity(config, params)
def loss(sparse, made):
    return float(jnp.square(velocity(sparse, made) - teacher).mean())

alone = student(1, 1, 1, 1)
for sizes in ((8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2)):
    found = student(*sizes)
    same, all_places = 0, 0
    for name, a in names(alone[1]).items():
        if name.endswith(("shared.in_layer.bias", "experts.in_bias")):
            same += (a == names(found[1])[name]).sum()
            all_places += a.size
    losses = loss(*alone), loss(*found)
    assert same > 0.99 * all_places, (sizes, same / all_places)
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0], (sizes, losses)
print("equal")
"""


def test_the_cut_does_not_depend_on_the_mesh():
    own_process.assert_equal(SCRIPT)
