"""Timing that stays fair on a busy machine, and what it ran on."""

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np


def measure(
    calls: Mapping[tuple, Callable[[], object]], rounds: int
) -> dict[tuple, tuple[float, float, float]]:
    """Median, lower and upper quartile of every call, in seconds.

    The calls take turns, each round in another order; the first of each compiles, not counted.
    """
    order = np.random.default_rng(0)
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {key: [] for key in calls}
    for _ in range(rounds):
        for i in order.permutation(len(calls)):
            key = list(calls)[i]
            start = time.perf_counter()
            jax.block_until_ready(calls[key]())
            seconds[key].append(time.perf_counter() - start)
    return {key: tuple(np.percentile(s, [50, 25, 75])) for key, s in seconds.items()}


def machine() -> dict:
    """Device, versions, commit and date."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "device": f"{jax.devices()[0].device_kind}, {jax.device_count()} × {platform.processor()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
