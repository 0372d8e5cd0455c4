"""A run directory is one run's at a time: who has it, and when that is over.

Two signs, for neither is enough on every file system: a lock of the operating system (flock), which
a process that dies gives back, and a heartbeat, which other hosts see where flock does not reach.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from d2m_jax import hosts
from d2m_jax.config import ConfigError
from d2m_jax.output import check_writable, full_disk, lives, machine

try:
    import fcntl
except ImportError:  # on Windows: the heartbeat alone tells
    fcntl = None

FILE = ".lock"
BEAT = 15.0  # seconds between heartbeats
PATIENCE = 60.0  # seconds without one after which a process of another host is taken for dead
SETTLING = 1.0  # seconds after which, where there is no flock, the last who wrote the file has it


@contextlib.contextmanager
def held(directory: Path | str) -> Iterator[None]:
    """Have a run directory for the time of the block; the first process does it for all.

    Raises ConfigError where the disk is full, and where another run has it one that names host and
    process. A process that died on this machine does not count. One of another host does for
    PATIENCE seconds after its last heartbeat: that long the start waits, and says so. A process
    that finds at a heartbeat that another run has its directory (it was suspended for longer than
    that) exits with code 2.
    """
    directory = Path(os.path.abspath(directory))
    opened: list[TextIO] = []

    def take() -> None:
        with full_disk(directory):
            opened.append(_take(directory))

    hosts.by_first(take)
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
                if _read(directory / FILE) == _me():
                    (directory / FILE).unlink()
                    directory.rmdir()  # where nothing came of the run
            opened[0].close()


def holder(directory: Path) -> tuple[str | None, float | None]:
    """Which process on which host has a run directory, and how many seconds ago it was last seen;
    None where nobody has it, or who had it is dead for all that is known."""
    path = directory / FILE
    who = _read(path)
    try:
        age = max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None, None
    here = who.get("machine") == machine()
    if not who or (here and not lives(who["process"])) or (not here and age > PATIENCE):
        return None, None
    return f"process {who['process']} on {who['host']} since {who['since']}", age


def _take(directory: Path) -> TextIO:
    path = directory / FILE
    check_writable(path)
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # the one before has just removed its empty directory
            continue
        try:
            local = _flock(file)
            before = _read(path)
            if local is False:
                raise ConfigError(_in_use(directory, before))
            # Between opening and locking, the one before may have removed the file.
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                continue
            if before and not _died_here(before, local):
                _wait(directory, before)
            _write(directory, file if local else None)
            if not local:  # of several that write now, each whole, the last has it
                time.sleep(SETTLING)
                if (now := _read(path)) != _me():
                    raise ConfigError(_in_use(directory, now))
        except BaseException:
            with contextlib.suppress(OSError):  # it tries again to write what had no room
                file.close()
            raise
        return file


def _write(directory: Path, file: TextIO | None) -> None:
    """Write who has the directory into its locked file, or without one in the place of the file.

    What failed leaves no empty lock, nor a directory for it.
    """
    path, mine = directory / FILE, _own_name(directory)
    try:
        if file is not None:
            file.truncate(0)
            json.dump(_me(), file)
            file.flush()
        else:
            mine.write_text(json.dumps(_me()))
            mine.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)
            if not _read(path):
                path.unlink()
                directory.rmdir()
        raise


def _flock(file: TextIO) -> bool | None:
    """Whether the lock is ours now; None where the file system or the system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _died_here(who: dict[str, Any], local: bool | None) -> bool:
    """Whether it was a process of this machine: one that lived would have the lock."""
    here = who["machine"] == machine()
    return here and (local is True or not lives(who["process"]))


def _wait(directory: Path, before: dict[str, Any]) -> None:
    """Until the heartbeat of another's lock is old. ConfigError where it goes on."""
    path = directory / FILE
    seen = path.stat().st_mtime
    age = max(0.0, _now(directory) - seen)  # hosts whose clocks go wrong write times to come
    if age > PATIENCE:
        return
    end = time.monotonic() + PATIENCE - age
    hosts.say(
        f"{_in_use(directory, before)}, which last gave a sign of life {age:.0f} s ago; this run"
        f" begins in {PATIENCE - age:.0f} s unless it gives another"
    )
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if not path.exists():
            return
        if path.stat().st_mtime != seen:
            raise ConfigError(_in_use(directory, _read(path)))


def _now(directory: Path) -> float:
    """The file system's clock: those of hosts may differ."""
    probe = _own_name(directory)
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _own_name(directory: Path) -> Path:
    return directory / f"{FILE}.{machine()}.{os.getpid()}"


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):  # of a network's file system, for a while
            if (now := _read(path)) != _me():
                taken = _in_use(path.parent, now) if now else f"{path}: was removed or overwritten"
                said = f"error: {taken}, while this process did not run; it ends here"
                print(said, file=sys.stderr, flush=True)
                os._exit(2)
            os.utime(path)


_SINCE = time.strftime("%Y-%m-%d %H:%M:%S")


def _me() -> dict[str, Any]:
    me = {"host": socket.gethostname(), "process": os.getpid(), "since": _SINCE}
    return me | {"machine": machine()}


def _read(path: Path) -> dict[str, Any]:
    """Who wrote the file; empty where nobody did, or does at this moment."""
    try:
        value = json.loads(path.read_text() or "{}")
    except (FileNotFoundError, ValueError):
        return {}
    whole = isinstance(value, dict) and _me().keys() <= value.keys()
    return value if whole else {}


def _in_use(directory: Path, who: dict[str, Any]) -> str:
    by = f"process {who['process']} on {who['host']} since {who['since']}" if who else "another run"
    return f"{directory}: in use by {by}"
