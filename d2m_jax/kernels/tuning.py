"""Tile sizes of tokamax's kernels: tuned once per device by benchmarks/tune.py, kept in a file, and
used from then on. Without the file tokamax takes its own, which it ships for few devices."""

import functools
import importlib
import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax


def tune(lowered: jax.stages.Lowered) -> Path:
    """Time the tile sizes of all tokamax kernels of a program that are not tuned yet; takes
    minutes. The file."""
    with tuned():
        found = importlib.import_module("tokamax").autotune(lowered)
    file, before = cache_file(), _read()
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.write_text((before | found if before else found).dumps(prune_errors=True))
    new.rename(file)
    _read.cache_clear()
    return file


def tuned() -> AbstractContextManager[Any]:
    """In here kernels are traced with the tile sizes of this device's file, if there is one."""
    return _read() or nullcontext()


def cache_file() -> Path:
    """Of this device and version of tokamax, in ~/.cache/d2m_jax."""
    version = importlib.import_module("tokamax").__version__
    device = re.sub(r"\W+", "_", jax.devices()[0].device_kind)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "d2m_jax" / f"tokamax_{version}_{device}.json"


@functools.cache
def _read() -> Any:
    file = cache_file()
    if not file.exists():
        return None
    return importlib.import_module("tokamax").AutotuningResult.loads(file.read_text())
