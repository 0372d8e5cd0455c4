"""Settings of JAX and of the C library that make training on a CPU faster."""

import contextlib
import ctypes
import math
import os

import jax

# mallopt's numbers for M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX (malloc.h)
MALLOC = {-1: 2**31 - 1, -4: 0, -8: 1}
DEVICE_COUNT = "xla_force_host_platform_device_count"  # XLA's own flag for CPUs


def use_cores(quick_compilation: bool = False) -> None:
    """Make the most of a CPU; call it before anything asks JAX for its devices.

    A device per core (a power of two, at most 8), so that batches are cut over them: XLA runs
    small matrix products on one core whatever it has; or as many as the user says, by
    JAX_NUM_CPU_DEVICES or XLA_FLAGS. And glibc keeps freed memory: by default it
    returns every large buffer to the system, and the page faults cost a small training step half
    its time (docs/decisions.md). `quick_compilation` leaves optimisations out, on any device.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if asked < 0 and DEVICE_COUNT not in flags:
        found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores = found or 1
        devices = 2 ** min(3, int(math.log2(cores)))
        jax.config.update("jax_num_cpu_devices", devices)
        # Two devices with two threads can wait for each other for ever, each in another collective,
        # of a loop and of what is around it (docs/decisions.md).
        os.environ.setdefault("PJRT_NPROC", str(max(cores, 2 * devices)))
    if jax.__version_info__ < (0, 11):
        # The code generator that came before compiles in half the time what runs as fast.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
    if quick_compilation:
        jax.config.update("jax_disable_most_optimizations", True)
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in MALLOC.items():
            libc.mallopt(parameter, value)
