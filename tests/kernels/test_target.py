"""The device that a program is traced for, and the kernels of TPUs compiled without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from d2m_jax.kernels.target import failure, target

ROOT = Path(__file__).parents[2]

# In a process of its own: libtpu reads the environment when it is loaded.
SCRIPT = """
import json
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from d2m_jax.config import FluxConfig, MoEConfig, StackConfig
from d2m_jax.kernels.attention import attention
from d2m_jax.kernels.target import target
from d2m_jax.models.experts import run_experts

TOKENS, DIM, EXPERTS, WIDTH = 4608, 3072, 12, 768  # FLUX.1's
dtype = jnp.dtype(sys.argv[2])
devices = topologies.get_topology_desc(sys.argv[1], platform="tpu").devices
mesh = Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
found = {}

def shape(*sizes, dtype=dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

def loss(qkv, x, chosen, weight, experts):
    found["target"] = target()
    y = attention(*qkv).reshape(x.shape)
    return jnp.square(run_experts("auto", (x + y, chosen, weight), experts)).mean()

with jax.set_mesh(mesh), jax.default_matmul_precision(dtype.name):
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 3, 4))).lower(
        (shape(1, TOKENS, DIM // 128, 128),) * 3,
        shape(1, TOKENS, DIM),
        shape(1, TOKENS, 2, dtype=jnp.int32),
        shape(1, TOKENS, 2, dtype=jnp.float32),
        (shape(EXPERTS, DIM, WIDTH), shape(EXPERTS, WIDTH), shape(EXPERTS, WIDTH, DIM)),
    )
    compiled = lowered.compile()
found["kernels"] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
found["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
print(json.dumps(found))
"""


def test_target_is_the_backend_where_there_is_no_mesh():
    assert target() == jax.default_backend() == "cpu"
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert target() == "cpu"


def test_failure_is_one_line():
    assert failure(lambda: None) == ""
    assert failure(lambda: int("a\nb")).startswith("ValueError: invalid literal")
    assert "\n" not in failure(lambda: exec("raise ValueError('a\\nb')"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for_a_tpu_that_is_not_there(topology, dtype):
    """Attention and routed experts, forward and backward, by the real compiler: at FLUX.1's size,
    for what fits a core's memory in bfloat16 need not fit in float32, in which a teacher is
    calibrated."""
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # else it asks a metadata server which TPU this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other tests may compile too
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, topology, dtype],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["target"] == "tpu"
    # Splash: forward, dq, dkv. Experts: two forward, two for rows, two for weights.
    assert found["kernels"] == 9
    assert found["temporaries"] < 2**30  # the scores alone would be 2 GB
