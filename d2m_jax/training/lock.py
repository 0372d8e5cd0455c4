"""A run directory is one run's at a time: who has it, and when that is over.

Two signs, for neither is enough on every file system: a lock of the operating system (flock), which
a process that dies gives back, and a heartbeat, which other hosts see where flock does not reach.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from d2m_jax import hosts
from d2m_jax.config import ConfigError
from d2m_jax.weights.output import check_writable

FILE = ".lock"
BEAT = 15.0  # seconds between heartbeats
PATIENCE = 60.0  # seconds without one after which a process of another host is taken for dead


@contextlib.contextmanager
def held(directory: Path | str) -> Iterator[None]:
    """Have a run directory for the time of the block; the first process does it for all.

    Raises ConfigError that names host and process where another run has it. A process that died on
    this machine does not count. One of another host does for PATIENCE seconds after its last
    heartbeat: that long the start waits, and says so.
    """
    directory = Path(os.path.abspath(directory))
    opened: list[TextIO] = []
    hosts.by_first(lambda: opened.append(_take(directory)))
    done = threading.Event()
    beats = threading.Thread(target=_beat, args=(directory / FILE, done), daemon=True)
    if opened:
        beats.start()
    try:
        yield
    finally:
        done.set()
        if opened:
            beats.join()
            with contextlib.suppress(OSError):
                (directory / FILE).unlink()
                directory.rmdir()  # where nothing came of the run
            opened[0].close()


def _take(directory: Path) -> TextIO:
    path = directory / FILE
    check_writable(path)
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            local = _flock(file)
            if local is False:
                raise ConfigError(_in_use(directory, _read(file)))
            # Between opening and locking, the one before may have removed the file.
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                continue
            before = _read(file)
            if before and not (local and before.get("machine") == _machine()):
                _wait(directory, before)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        file.truncate()
        json.dump(_me(), file)
        file.flush()
        return file


def _flock(file: TextIO) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _wait(directory: Path, before: dict[str, Any]) -> None:
    """Until the heartbeat of another's lock is old. ConfigError where it goes on."""
    path, told = directory / FILE, False
    seen = path.stat().st_mtime
    while True:
        age = _now(directory) - seen
        if age > PATIENCE:
            return
        if not told:
            left = round(PATIENCE - age)
            seen_ago = f"last seen {age:.0f} s ago; this run begins in {left} s unless it is again"
            hosts.say(f"{_in_use(directory, before)}, {seen_ago}")
            told = True
        time.sleep(min(1.0, PATIENCE / 10))
        if not path.exists():
            return
        if path.stat().st_mtime > seen:
            raise ConfigError(_in_use(directory, before))


def _now(directory: Path) -> float:
    """The file system's clock: those of hosts may differ."""
    probe = directory / f"{FILE}.{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _me() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    me = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    return me | {"machine": _machine()}


def _machine() -> str:
    """This boot of this machine: names of hosts are not always different."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        value = json.loads(file.read() or "{}")
    except ValueError:  # written at this moment
        return {}
    return value if isinstance(value, dict) else {}


def _in_use(directory: Path, who: dict[str, Any]) -> str:
    by = f"process {who['process']} on {who['host']} since {who['since']}" if who else "another run"
    return f"{directory}: in use by {by}"
