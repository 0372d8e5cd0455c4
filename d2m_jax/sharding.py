"""The device mesh and where arrays live on it: batches over (data, fsdp), parameters everywhere."""

import contextlib
import ctypes
import math
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from d2m_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")
# mallopt's numbers for M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX (malloc.h)
MALLOC = {-1: 2**31 - 1, -4: 0, -8: 1}


def use_cores() -> None:
    """Make the most of a CPU; call it before anything asks JAX for its devices.

    A device per core (a power of two, at most 8), so that batches are cut over them: XLA runs
    small matrix products on one core whatever it has. And glibc keeps freed memory: by default it
    returns every large buffer to the system, and the page faults cost a small training step half
    its time (docs/decisions.md).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", 2 ** min(3, int(math.log2(cores or 1))))
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in MALLOC.items():
            libc.mallopt(parameter, value)


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


def on_own_samples(function: Callable, samples: Any, shared: Any) -> Any:
    """function(samples, shared), every device on its own samples alone.

    Leaves of `samples` and of the result have the batch as first axis. Under `jax.set_mesh` the
    compiler would else sort, gather and loop over the samples of all devices on each of them.
    Without a mesh, inside another such call, or where the batch cannot be cut, it is a plain call.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), ("data", "fsdp")
    batch = jax.tree.leaves(samples)[0].shape[0]
    if mesh.empty or mesh.manual_axes or batch % batch_shards(mesh):
        return function(samples, shared)

    def local(samples, shared):
        # Varying from here on, so that gradients are summed over the devices once, at the entry.
        shared = jax.tree.map(lambda a: jax.lax.pcast(a, axes, to="varying"), shared)
        return function(samples, shared)

    spec = PartitionSpec(axes)
    return jax.shard_map(local, in_specs=(spec, PartitionSpec()), out_specs=spec)(samples, shared)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def spread(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Of a frozen array that all devices share, cut along the last axis that they divide."""
    for axis in reversed(range(len(shape))):
        if mesh.size > 1 and shape[axis] % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))
    return replicated(mesh)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts into which a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
