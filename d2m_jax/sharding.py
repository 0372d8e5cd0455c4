"""The device mesh and where arrays live on it: batches over (data, fsdp), parameters everywhere."""

import math
import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2m_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")


def use_cores() -> None:
    """On a CPU, a device per core (a power of two, at most 8), so that batches are cut over them.

    XLA runs small matrix products on one core whatever it has: two devices on two cores are nearly twice as quick
    as one (docs/decisions.md). Call it before anything asks JAX for its devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", 2 ** min(3, int(math.log2(cores or 1))))


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over this job's devices; one axis of -1 takes what the others leave.

    Raises ConfigError where the sizes are larger than, or do not divide, the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    found = jax.device_count()
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(
                f"MeshConfig.{axis} = {size}: expected at least 1, or -1 for the rest"
            )
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(
            f"MeshConfig.{free[1]} = -1: expected one axis of -1, found {', '.join(free)}"
        )
    used = math.prod(size for size in sizes.values() if size != -1)
    asked = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if size != 1)
    if used > found:
        raise ConfigError(f"MeshConfig ({asked}): needs {used} devices, found {found}")
    if found % used:
        raise ConfigError(f"MeshConfig ({asked}): {used} devices do not divide the {found} found")
    if free:
        sizes[free[0]] = found // used
    count = math.prod(sizes.values())
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=jax.devices()[:count],
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Parts into which a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
