"""Meshes over one device here; tests/training/test_loop.py trains on four."""

import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from d2m_jax import sharding
from d2m_jax.config import ConfigError, FluxConfig, MeshConfig, MoEConfig, StackConfig
from d2m_jax.kernels.quantized import quantized
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import names
from d2m_jax.sharding import (
    AXES,
    PARAMETERS,
    WHOLE,
    axes_of,
    batch_sharding,
    batch_shards,
    make_mesh,
    replicated,
)

DEVICES = jax.device_count()
NAMES = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "PJRT_NPROC")
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())


def test_rest_is_filled():
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == AXES and mesh.shape["data"] == DEVICES
    assert math.prod(mesh.shape.values()) == mesh.size == DEVICES
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_arrays_on_the_mesh():
    mesh = make_mesh(MeshConfig())
    x = jax.device_put(jnp.ones((4 * DEVICES, 3)), batch_sharding(mesh))
    assert x.addressable_shards[0].data.shape == (4 * DEVICES // batch_shards(mesh), 3)
    assert jax.device_put(jnp.ones(3), replicated(mesh)).is_fully_replicated


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MeshConfig(data=1, fsdp=4 * DEVICES),
            f"needs {4 * DEVICES} devices, found {DEVICES}; on a CPU, JAX_NUM_CPU_DEVICES="
            f"{4 * DEVICES} in the environment makes so many",
        ),
        (MeshConfig(data=-1, tensor=3 * DEVICES), "needs"),
        (MeshConfig(data=-1, fsdp=-1), "expected one axis of -1, found data, fsdp"),
        (MeshConfig(expert=0), "MeshConfig.expert = 0: expected at least 1"),
    ],
)
def test_bad_meshes(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)


def test_every_parameter_of_a_transformer_has_its_place():
    moe = MoEConfig(router_input="unmodulated")
    mixed = (StackConfig(2, blocks=2, active=1, ffn="moe"), StackConfig(1))
    config = FluxConfig(double=mixed, single=mixed, moe=moe, modulation_rank=8)
    for name in names(abstract(config)):
        axes_of(name)
        end = ".".join(name.split(".")[-2:])
        assert end in PARAMETERS or end.endswith(WHOLE), name
    jax.eval_shape(partial(quantized, kind="int8"), abstract(config))


@pytest.mark.parametrize("name", ["single.0.block.mlp.low.kernel", "double.1.router.out.kernel"])
def test_an_unknown_parameter_is_no_copy_on_every_device_in_silence(name):
    with pytest.raises(ValueError, match=f"{name}: expected in PARAMETERS or WHOLE"):
        axes_of(name)
    if ".block." in name:
        params = {"single": {0: {"block": {"mlp": {"low": {"kernel": jnp.zeros((2, 2))}}}}}}
        with pytest.raises(ValueError, match=f"{name}: expected in LAYERS or STAYS"):
            quantized(params, "int8")


def test_mesh_that_does_not_divide():
    devices = jax.devices() * 8
    with pytest.raises(ConfigError, match=r"MeshConfig \(data = -1, fsdp = 3\): 3 devices do not"):
        make_mesh(MeshConfig(fsdp=3), devices[:8])


def test_a_mesh_leaves_no_process_without_devices():
    """Of two hosts with eight each, say."""
    devices = [SimpleNamespace(process_index=i // 8) for i in range(16)]
    with pytest.raises(ConfigError, match="takes 8 of 16 devices and leaves process 1 without any"):
        sharding._check_nobody_is_left("MeshConfig (data = 8)", devices, 8)
    sharding._check_nobody_is_left("MeshConfig (data = 9)", devices, 9)


@pytest.mark.parametrize(
    "asked",
    [
        {"JAX_NUM_CPU_DEVICES": "3"},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
        {},
    ],
)
def test_the_number_of_devices_is_the_user_s(asked):
    """Without a wish of theirs it is that of the cores, a power of two up to 8, with two threads
    each at least."""
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    code = (
        "import glob, jax; from d2m_jax.cores import use_cores; use_cores();"
        "print(jax.device_count());"
        "tasks = glob.glob('/proc/self/task/*/comm');"
        "print(sum('XLAEigen' in open(task).read() for task in tasks))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"JAX_PLATFORMS": "cpu"} | asked,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    devices, threads = map(int, done.stdout.split())
    assert devices == (3 if asked else 2 ** min(3, int(math.log2(len(CORES)))))
    if not asked and sys.platform == "linux":
        assert threads == max(len(CORES), 2 * devices)
