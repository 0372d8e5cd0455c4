"""What the program that is being traced will run on, and what is told about the choice once."""

import functools
import logging
from collections.abc import Callable

import jax


def target() -> str:
    """What a program is for: "cpu", "gpu" or "tpu".

    The devices of the mesh in force (`jax.set_mesh`), else the default backend. A program for
    devices that are not here, compiled ahead of time, is traced under a mesh of theirs.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None)
    if platform is None:
        return jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


@functools.cache
def log_once(name: str, message: str, level: int = logging.INFO) -> None:
    """One line of `name`'s logger, however often a program is traced."""
    logging.getLogger(name).log(level, message)


def gpu_lacks() -> str:
    """Why kernels for NVIDIA (sm80 and newer) cannot run, or nothing."""
    if jax.default_backend() != "gpu":
        return "needs a GPU at hand, to compile for it as well"
    found = getattr(jax.devices()[0], "compute_capability", "none")
    new = found != "none" and float(found) >= 8
    return "" if new else f"needs compute capability 8.0, found {found}"


def failure(function: Callable, *shapes: jax.ShapeDtypeStruct) -> str:
    """Why a kernel cannot even be traced, in one line, or nothing."""
    try:
        jax.eval_shape(function, *shapes)
    except Exception as error:  # libraries that are missing or do not fit fail in many ways
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return ""
