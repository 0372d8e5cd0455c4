"""Files where they lie, read by ranges: on disk or, through fsspec, in an object store."""

import contextlib
import errno
import functools
import os
import random
import stat
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from d2m_jax.config import ConfigError

OPEN = 256  # files that a source keeps open, where a process may have four times as many
PATIENCE = 300.0  # seconds for which a store is asked again
LONGEST_WAIT = 30.0  # seconds between two times
# What a store says of what will not change when it is asked again.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# What stores call the version of an object, the surest first.
VERSIONS = ("etag", "ETag", "generation", "md5Hash", "content_md5", "crc32c", "blob_id")
VERSIONS += ("mtime", "updated", "last_modified", "LastModified", "created")

K, T = TypeVar("K"), TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A file as it was when it was found."""

    path: str  # on disk, or a URL
    size: int  # bytes
    stamp: str  # another one when the file has changed


class Changed(Exception):
    """A file is no longer what it was when it was found; the message says what is there."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


@functools.lru_cache
def store(url: str) -> Any:
    """fsspec's file system of a URL. ConfigError where a package for it is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:  # of a protocol that needs a package, or unknown
        raise ConfigError(f"{url}: cannot be opened: {error}") from None


def _fresh(url: str) -> Any:
    """The store of a URL, which has forgotten what it knew of its files."""
    files = store(url)
    files.invalidate_cache()
    return files


def patiently(what: str, call: Callable[[], T]) -> T:
    """What `call` gives in the end: a store that fails is asked again, with longer and longer
    pauses, for PATIENCE seconds; then ConfigError. That something is not there is told at once.
    """
    began, pause = time.monotonic(), 0.5
    while True:
        try:
            return call()
        except (*LASTING, ImportError, TypeError, NotImplementedError):
            raise
        except Exception as error:  # every library of a store has its own
            waited = time.monotonic() - began
            said = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if waited + pause > PATIENCE:
                raise ConfigError(f"{said}; the store has failed for {waited:.0f} s") from None
            if pause == 0.5:
                print(
                    f"{said}; trying again for {PATIENCE:.0f} s at most",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(pause * random.uniform(0.5, 1.0))  # not all processes at the same moment
        pause = min(2 * pause, LONGEST_WAIT)


def look(path: str) -> Found:
    """The file at a path. FileNotFoundError where none is there."""
    if not is_remote(path):
        return _of_status(path, Path(path).stat())
    files = _fresh(path)
    return _of_info(path, patiently(path, lambda: files.info(path)))


def matching(pattern: str) -> list[Found]:
    """The files that a pattern with *, ? and [] matches, sorted by path."""
    import glob

    if not is_remote(pattern):
        paths = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (of any folder)
        return [look(path) for path in paths if Path(path).is_file()]
    files = _fresh(pattern)
    found = patiently(pattern, lambda: files.glob(pattern, detail=True))
    infos = sorted(found.items())
    return [_of_info(_url(pattern, p), info) for p, info in infos if info["type"] == "file"]


def is_folder(path: str) -> bool:
    """Whether a folder is at a path."""
    if not is_remote(path):
        return Path(path).is_dir()
    files = _fresh(path)
    try:
        return patiently(path, lambda: files.isdir(path))
    except LASTING:
        return False


def walk(folder: str) -> Iterator[tuple[str, list[Found]]]:
    """Every folder below one, itself first, with its own files, in a fixed order. Names that begin
    with a dot are left out. ConfigError for a folder that cannot be read."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        folders, files = listed(here)
        yield here, files
        waiting += reversed(folders)


def listed(folder: str) -> tuple[list[str], list[Found]]:
    """The folders and the files in a folder, sorted, without what begins with a dot."""
    if is_remote(folder):
        files = _fresh(folder)
        found = patiently(folder, lambda: files.ls(folder, detail=True))
        infos = sorted((_url(folder, info["name"].rstrip("/")), info) for info in found)
        infos = [(p, i) for p, i in infos if p != folder and p.rsplit("/", 1)[1][0] != "."]
        return (
            [path for path, info in infos if info["type"] == "directory"],
            [_of_info(path, info) for path, info in infos if info["type"] == "file"],
        )
    try:
        with os.scandir(folder) as entries:
            inside = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        return (
            [e.path for e in inside if e.is_dir()],
            [_of_status(e.path, e.stat()) for e in inside if e.is_file()],
        )
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror})") from None


class Kept(Generic[K, T]):
    """What `open_it` made of the keys that were asked for last, for many threads at once. One that
    is dropped here is closed when no thread uses it any more."""

    def __init__(self, open_it: Callable[[K], T]):
        self._open_it, self._most = open_it, _most_open()
        self._opened: OrderedDict[K, T] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: K) -> T:
        with self._lock:
            if key in self._opened:
                self._opened.move_to_end(key)
                return self._opened[key]
        new = self._open_it(key)
        with self._lock:
            self._opened[key] = new
            if len(self._opened) > self._most:
                self._opened.popitem(last=False)
        return new


def _most_open() -> int:
    """OPEN, or a quarter of what the system allows this process."""
    try:
        import resource
    except ImportError:  # on Windows
        return OPEN
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed < 0:  # as many as it wants
        return OPEN
    return max(1, min(OPEN, allowed // 4))


class Reader:
    """Reads ranges of files, for many threads at once; a copy in another process opens its own."""

    def __init__(self):
        self._kept: Kept[str, Any] = Kept(lambda p: look(p) if is_remote(p) else Opened(p))

    def __reduce__(self) -> tuple[type, tuple]:
        return Reader, ()

    def read(self, file: Found, start: int, size: int) -> bytes:
        """`size` bytes from `start`, fewer where the file ends. Raises Changed where the file is
        another than it was, OSError where it cannot be read, ConfigError where its store has failed
        for too long."""
        if is_remote(file.path):
            return self._remote(file, start, size)
        opened = self._kept(file.path)
        data = os.pread(opened.number, size, start)
        now = _of_status(file.path, os.fstat(opened.number))
        if now.stamp != file.stamp:
            raise Changed(_difference(file, now))
        return data

    def _remote(self, file: Found, start: int, size: int) -> bytes:
        now: Found = self._kept(file.path)
        if now.stamp != file.stamp:
            raise Changed(_difference(file, now))
        files, end = store(file.path), min(start + size, file.size)
        if start >= end:
            return b""
        data = patiently(file.path, lambda: files.cat_file(file.path, start=start, end=end))
        if len(data) != end - start:
            raise Changed(f"has {len(data)} bytes from {start} on, expected {end - start}")
        return data


class Opened:
    """A file that is closed when nobody holds it any more. ConfigError where too many are open,
    which is no fault of this one."""

    def __init__(self, path: str):
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise ConfigError(
                f"{path}: cannot be opened ({error.strerror}); expected a higher limit: ulimit -n"
                " 65536 before the command"
            ) from None
        weakref.finalize(self, os.close, self.number)


@contextlib.contextmanager
def reading(file: Found) -> Iterator[Callable[[int, int], bytes]]:
    """Reads (start, size) in one file, for one thread, as Reader.read. Whether a file on disk has
    changed meanwhile is looked up once, in the end."""
    if is_remote(file.path):
        yield functools.partial(Reader().read, file)
        return
    opened = Opened(file.path)
    yield lambda start, size: os.pread(opened.number, size, start)
    now = _of_status(file.path, os.fstat(opened.number))
    if now.stamp != file.stamp:
        raise Changed(_difference(file, now))


class Window:
    """A file read from front to back, in pieces of at least `step` bytes; what is jumped over is
    not read."""

    def __init__(self, read: Callable[[int, int], bytes], step: int):
        self.step, self._read = step, read
        self._start, self._data = 0, b""

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes, fewer where the file ends."""
        at = start - self._start
        if at < 0 or at + size > len(self._data):
            self._start, at = start, 0
            self._data = self._read(start, max(size, self.step))
        return self._data[at : at + size]


def _of_status(path: str, status: os.stat_result) -> Found:
    kind = "" if stat.S_ISREG(status.st_mode) else " no file"
    return Found(path, status.st_size, f"{status.st_size} {status.st_mtime_ns}{kind}")


def _of_info(path: str, info: dict[str, Any]) -> Found:
    size = int(info.get("size") or 0)
    version = next((info[name] for name in VERSIONS if info.get(name) is not None), "")
    if isinstance(version, datetime):  # in a list of files some stores tell it in another way
        version = version.timestamp()
    return Found(
        path, size, f"{size} {version:.6f}" if isinstance(version, float) else f"{size} {version}"
    )


def _url(like: str, path: str) -> str:
    """A path as a store names it, as a URL of the protocol of another."""
    protocol = like.split("://", 1)[0]
    return path if "://" in path else f"{protocol}://{path.lstrip('/')}"


def _difference(was: Found, now: Found) -> str:
    if was.size != now.size:
        return f"has {now.size} bytes, had {was.size} when it was indexed"
    return "was written again since it was indexed"
