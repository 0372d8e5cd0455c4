"""Files and directories that appear whole or not at all, on a disk that has room for them."""

import contextlib
import errno
import functools
import glob
import json
import os
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d2m_jax.config import ConfigError, check
from d2m_jax.progress import size

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TEXTS = tuple(map(os.strerror, FULL))  # of tensorstore, without errno
LEFT_OVER = 3600  # seconds without a change after which a write of another machine has died


class FullDisk(ConfigError):
    """There was no room for all of an output; nothing of it was left."""


def check_space(path: Path, needed: int) -> None:
    """Raise ConfigError where the disk of `path` has less than `needed` bytes free."""
    parent = next(p for p in Path(os.path.abspath(path)).parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"{path}: needs {size(needed)} on the disk of {parent}, found {size(free)} free"
        )


def check_writable(path: Path | str) -> None:
    """Raise ConfigError where `path` and what its name needs cannot be made; leaves nothing."""
    path = Path(os.path.abspath(path))
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # tells of a name that is too long
        folder = next(p for p in path.parents if os.path.lexists(p))
        if not folder.is_dir():
            raise ConfigError(f"{path}: cannot be written: {folder} is a file, expected a folder")
        with tempfile.TemporaryFile(dir=folder):  # what os.access says is not true for root
            pass
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def check_free(path: Path | str, overwrite: bool) -> None:
    """Raise ConfigError where something is at `path` that nobody asked to replace."""
    path = Path(path)
    empty = path.is_dir() and not any(path.iterdir())
    check(
        overwrite or empty or not os.path.lexists(path),
        f"{path}: exists; expected a free name, or --overwrite (in Python overwrite=True)",
    )


@contextlib.contextmanager
def new_file(path: Path | str) -> Iterator[Path]:
    """A free name beside `path`; what was written there is `path` in the end, or gone on errors.

    A full disk is a ConfigError.
    """
    path = Path(os.path.abspath(path))
    new = _beside(path, "new")
    _clear_left_over(path)
    try:
        with full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield new
            new.rename(path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """A file of JSON that appears whole or not at all. A full disk is a ConfigError."""
    with new_file(path) as new:
        new.write_text(json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def new_directory(
    path: Path | str, replaces: Callable[[Path], bool], kind: str, overwrite: bool = False
) -> Iterator[Path]:
    """A new folder beside `path`, which is `path` in the end, or gone on errors.

    Where `path` exists it is replaced, then and only then, with `overwrite` and if replaces(path);
    else, and where the disk is full, ConfigError. `kind` names in the message what is written. Of a
    link what it points to is replaced; the link stays.
    """
    named = path = Path(os.path.abspath(path))
    _clear_left_over(named)
    if named.is_symlink():
        path = Path(os.path.realpath(named))
        _clear_left_over(path)
    check_free(named, overwrite)
    if path.exists() and not replaces(path):
        raise ConfigError(f"{named}: exists and is no {kind}; expected a free name")
    new, old = _beside(path, "new"), _beside(path, "old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with full_disk(path):
            new.mkdir(parents=True)
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """A name beside `path` that says which process uses it, on which machine."""
    return path.with_name(f".{path.name}.{machine()}.{os.getpid()}.{kind}")


def _clear_left_over(path: Path) -> None:
    """Clear away what processes that died while they wrote `path` have left beside it.

    What `path` was before comes back where it is missing: the process died between two renamings.
    Of another machine it cannot be told whether a process lives: what changed lately stays.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        *_, where, process, kind = left.name.split(".")
        if kind not in ("new", "old") or not process.isdigit():
            continue
        if where == machine():
            dead = not lives(int(process))
        else:
            changed = [p.lstat().st_mtime for p in (left, *left.rglob("*"))]
            dead = time.time() - max(changed) > LEFT_OVER
        if not dead:
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


@functools.cache
def machine() -> str:
    """Where a process's number means something: this boot of this machine, and this container."""
    boot, container = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return f"{zlib.crc32(socket.gethostname().encode()):08x}"
    inside = str(container.readlink()) if container.is_symlink() else ""
    return f"{zlib.crc32((boot.read_text() + inside).encode()):08x}"


def lives(process: int) -> bool:
    """Whether a process of this machine may not have ended."""
    if os.name == "nt":  # where this call would interrupt it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def full_disk(path: Path, kept: str = "nothing was written") -> Iterator[None]:
    """Make a FullDisk, or a ConfigError for a lack of permission, of what tells of it inside:
    Orbax and tensorstore have errors of their own. `kept` says what is there then."""
    try:
        yield
    except FullDisk:  # of a file inside, whose name is a temporary one
        raise _full(path, kept) from None
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in FULL or any(text in str(error) for text in FULL_TEXTS):
            raise _full(path, kept) from None
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG):
            raise ConfigError(f"{path}: cannot be written ({os.strerror(number)})") from None
        raise


def _full(path: Path, kept: str) -> FullDisk:
    return FullDisk(f"{path}: the disk is full; {kept}")
