"""A run that is killed again and again ends with what an uninterrupted one reports.

Minutes, so it runs alone: make test-slow
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KILLS = 5


def start(directory: Path, cache: Path) -> subprocess.Popen:
    # The programs of one start are compiled again at the next: a cache spares the test that.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "train.py", "configs/tiny.py", "--run-dir", str(directory)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def results(directory: Path) -> list:
    rows = json.loads((directory / "report.json").read_text())["rows"]
    return [(row["name"], row["steps"], row["scores"], row["error"]) for row in rows]


def seconds(directory: Path, cache: Path) -> float:
    """How long a whole run takes."""
    begin = time.monotonic()
    assert start(directory, cache).wait() == 0
    return time.monotonic() - begin


@pytest.mark.slow
def test_killed_at_any_moment_it_reports_the_same(tmp_path):
    cache = tmp_path / "cache"
    seconds(tmp_path / "first", cache)  # fills the cache
    whole = seconds(tmp_path / "whole", cache)
    expected = results(tmp_path / "whole")
    assert len(expected) == 5 and any(row[3]["seen"] > 0 for row in expected)
    assert results(tmp_path / "first") == expected

    moments, killed = random.Random(0), 0
    for _ in range(KILLS):
        process = start(tmp_path / "killed", cache)
        try:
            # Long enough to get on a little, with what a start costs.
            process.wait(moments.uniform(0.3, 0.5) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            killed += 1
    assert killed >= 3, "no kill came in time"
    assert start(tmp_path / "killed", cache).wait() == 0
    assert results(tmp_path / "killed") == expected
