"""What numbers were measured on and with: device, processor, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from d2m_jax.config import ROOT


def measured_on(packages: Sequence[str]) -> dict[str, Any]:
    """It all, as JSON; of the packages the versions of those that are installed."""
    devices = jax.devices()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "versions": {"python": platform.python_version()} | _versions(packages),
    }


def _commit() -> str | None:
    """The repository's, where there is one and git to ask; none of a repository that this package
    is only installed in."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return told.stdout.strip() or None


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
