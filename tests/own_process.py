"""Scripts that need a process of their own: devices must be asked for before JAX starts."""

import subprocess
import sys
from pathlib import Path


def run(script: str, *arguments: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    """A finished script; it may import from tests."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=timeout,
    )


def assert_equal(script: str, *arguments: str, timeout: int = 900) -> None:
    """A script that compares says `equal`, and nothing else."""
    done = run(script, *arguments, timeout=timeout)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
