"""Accelerators as their makers describe them, and devices to compile for where there are none."""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.experimental import topologies

from d2m_jax.config import ConfigError, check, suggestion

GIB = 2**30
GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Accelerator:
    """One chip and its links; rates per second, links one way."""

    kind: str
    platform: Literal["tpu", "cuda"]
    flops: float  # bf16, dense
    memory: float  # bytes that a program may use
    memory_bandwidth: float
    link: float  # TPU: of one link, of which an axis of the torus has two; GPU: of all NVLinks
    network: float  # of one chip's share in the network between hosts (GPU) or pods (TPU)
    axes: int  # of the torus; 1 where a switch joins the chips of a host
    shapes: tuple[str, ...] = ()  # the slices on offer, where they are few


# TPUs: https://cloud.google.com/tpu/docs/{v5e,v5p,v6e} (FLOP/s, HBM bandwidth, bidirectional ICI
# bandwidth per chip over its 4 or 6 links, DCN bandwidth per chip or per pod). Memory is what
# libtpu 0.0.42 says is available, of 16, 96 and 32 GiB.
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# GPUs: https://www.nvidia.com/en-us/data-center/h100/ (SXM, 989.4 TFLOP/s without sparsity,
# 3.35 TB/s, NVLink 900 GB/s both ways) and …/h200/ (the same chip, 4.8 TB/s); one NIC of 400 Gb/s
# for each GPU (DGX H100). Memory is what CUDA reports: 79.1 GiB of "80 GB", 139.8 GiB of "141 GB"
# (nvidia-smi: 81,559 and 143,771 MiB), times MEMORY_FRACTION.
MEMORY_FRACTION = 0.95  # XLA_PYTHON_CLIENT_MEM_FRACTION; JAX takes 0.75 unless told otherwise
ACCELERATORS = {
    accelerator.kind: accelerator
    for accelerator in (
        Accelerator("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 50e9, 25e9 / 8, 2, _SQUARES),
        Accelerator("v5p", "tpu", 459e12, 95.74 * GIB, 2765e9, 100e9, 50e9 / 8, 3),
        Accelerator("v6e", "tpu", 918e12, 31.25 * GIB, 1638e9, 100e9, 100e9 / 8, 2, _SQUARES),
        Accelerator(
            "h100", "cuda", 989.4e12, MEMORY_FRACTION * 79.1 * GIB, 3.35e12, 450e9, 400e9 / 8, 1
        ),
        Accelerator(
            "h200", "cuda", 989.4e12, MEMORY_FRACTION * 139.8 * GIB, 4.8e12, 450e9, 400e9 / 8, 1
        ),
    )
}

# What XLA's GPU compiler asks of a device; the H100's own answers, as in openxla/xla issue 25910.
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""


@dataclass(frozen=True)
class Topology:
    """Chips to compile for: a slice of a TPU pod, several joined by the network, or GPUs."""

    accelerator: Accelerator
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips in all."""
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.accelerator.kind}:{shape}" + (f":{self.slices}" if self.slices > 1 else "")


def parse(text: str) -> Topology:
    """`v5p:4x4x4`, `h100:8`; `v6e:16x16:4` is four pods. ConfigError says what is on offer."""
    kind, _, rest = text.partition(":")
    known = ", ".join(ACCELERATORS)
    check(
        kind in ACCELERATORS,
        f"topology {text}: unknown kind {kind!r}{suggestion(kind, ACCELERATORS)} (one of {known})",
    )
    accelerator = ACCELERATORS[kind]
    form = {1: "8", 2: "4x8", 3: "4x4x4"}[accelerator.axes]
    shape, _, slices = rest.partition(":")
    sizes = shape.split("x")
    check(
        all(size.isdecimal() and int(size) > 0 for size in [*sizes, slices or "1"])
        and len(sizes) == accelerator.axes,
        f"topology {text}: expected {kind}:{form}"
        + (f", or {kind}:{form}:2 for two slices" if accelerator.platform == "tpu" else ""),
    )
    topology = Topology(accelerator, tuple(map(int, sizes)), int(slices or 1))
    _check_shape(text, topology)
    return topology


def _check_shape(text: str, topology: Topology) -> None:
    accelerator, shape = topology.accelerator, topology.shape
    if accelerator.platform == "cuda":
        check(topology.slices == 1, f"topology {text}: GPUs have no slices, expected {shape[0]}")
        check(
            shape[0] <= GPUS_PER_HOST or shape[0] % GPUS_PER_HOST == 0,
            f"topology {text}: found {shape[0]} GPUs, expected whole hosts of {GPUS_PER_HOST}",
        )
    elif accelerator.shapes:
        offered = ", ".join(accelerator.shapes)
        name = "x".join(map(str, shape))
        check(name in accelerator.shapes, f"topology {text}: expected one of {offered}")
    else:  # whole cubes of 4 × 4 × 4 chips, or a part of one
        part = all(size in (1, 2, 4) for size in shape) and shape[:2] != (1, 1)
        cubes = all(size % 4 == 0 for size in shape) and math.prod(shape) <= 6144
        check(
            part or cubes or math.prod(shape) == 1,
            f"topology {text}: expected axes of 2 or 4 (the last also 1), or multiples of 4 with at"
            " most 6144 chips",
        )
    check(
        topology.slices == 1 or math.prod(shape) >= 4,
        f"topology {text}: expected slices of at least 4 chips",
    )


def prepare(topology: Topology) -> None:
    """Call before anything asks JAX for its devices: it then computes on the CPU alone, which has
    as many devices as the topology has chips where the compiler for GPUs is missing."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if topology.accelerator.platform == "tpu":
        # Else libtpu asks a metadata server which TPU this is, and tells of it at length.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
        # It guards the chips of this machine, which are not used, by a lock.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    elif not has_gpu_compiler():
        jax.config.update("jax_num_cpu_devices", topology.chips)


def has_gpu_compiler() -> bool:
    """Whether XLA's compiler for CUDA is installed; it needs no GPU."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def devices(topology: Topology) -> list[Any]:
    """Devices of a mesh to compile for; nothing can run on them.

    TPUs and GPUs that need not be there, or, for GPUs where their compiler is not installed, CPU
    devices. ConfigError where libtpu is not installed.
    """
    accelerator = topology.accelerator
    if accelerator.platform == "cuda":
        return _gpus(topology) if has_gpu_compiler() else jax.devices("cpu")[: topology.chips]
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError(
            f"topology {topology}: the TPU compiler (libtpu) is not installed, expected"
            " pip install 'd2m_jax[tpu]'"
        )
    options: dict[str, Any] = {}
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # the default is a host of 2 × 2
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = str(Topology(accelerator, topology.shape))
    return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)


def _gpus(topology: Topology) -> list[Any]:
    accelerator, chips = topology.accelerator, topology.chips
    target = _GPU_TARGET.format(
        bandwidth=int(accelerator.memory_bandwidth),
        memory=int(accelerator.memory),
        kind=accelerator.kind,
    )
    hosts = max(1, chips // GPUS_PER_HOST)
    return list(
        topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x{hosts}x{chips // hosts}"
        ).devices
    )


def link(topology: Topology, members: Sequence[Any]) -> tuple[str, float]:
    """The slowest link within a group of devices, and the bytes per second that each device can
    send over it while all members do.

    Within a TPU slice (ICI) a group uses the axes of the torus along which its members differ:
    both links of an axis that it closes to a ring, else one. What other groups send over the same
    links is left out. Across hosts (GPU) the members on a host share their NICs.
    """
    accelerator = topology.accelerator
    if accelerator.platform == "cuda":
        hosts = {device.id // GPUS_PER_HOST for device in members}
        if len(hosts) == 1:
            return "NVLink", accelerator.link
        return "network", min(accelerator.link, accelerator.network * len(members) / len(hosts))
    if len({getattr(device, "slice_index", 0) for device in members}) > 1:
        return "network", accelerator.network
    rings = 0
    for axis, size in enumerate(topology.shape):
        places = len({device.coords[axis] for device in members})
        if places > 1:
            rings += 2 if places == size and _closed(topology, size) else 1
    return "ICI", accelerator.link * max(1, rings)


def _closed(topology: Topology, size: int) -> bool:
    """Whether an axis is a ring: v5p from whole cubes on, v5e and v6e where it has all 16 chips
    (https://jax-ml.github.io/scaling-book/tpus/)."""
    if topology.accelerator.axes == 3:
        return all(axis % 4 == 0 for axis in topology.shape)
    return size == 16
