"""An index made, or made anew for the parts that have changed, and written whole."""

import contextlib
import os
import posixpath
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from d2m_jax.config import ConfigError
from d2m_jax.data.sources.helpers import Helpers
from d2m_jax.data.sources.index import (
    Index,
    Part,
    Scanned,
    aligned,
    header,
    name_below,
)
from d2m_jax.data.sources.stores import Found, is_remote, look, patiently, store
from d2m_jax.output import check_writable, new_file
from d2m_jax.progress import bar

try:
    import fcntl
except ImportError:  # on Windows: two that build at once both do, and the last one's stays
    fcntl = None

THREADS = 16  # parts that are read at once
WORTH_PROCESSES = 2**32  # bytes of parts from which it pays to start processes
SAVED = 300.0  # seconds after which what was found so far is written, for whoever comes after

SUFFIX = ".d2m_jax_index"

Scan = Callable[[Found], Scanned]


def place(pattern: str, base: str, folder: str | None, kind: str) -> str:
    """Where the index of a source lies: in a folder given, else beside its files."""
    where = folder or base
    named = os.path.abspath(pattern) if folder and not is_remote(pattern) else pattern
    own = named if folder else named.removeprefix(base).strip("/")
    return posixpath.join(where, f"{kind}-{zlib.crc32(os.fsencode(own)):08x}{SUFFIX}")


def indexed(kind: str, files: list[Found], base: str, path: str, scan: Scan, pure: bool) -> Index:
    """The index at `path` of these parts, whose names are told from `base` on. Parts that it lacks,
    or has otherwise, are scanned; `pure` says that they are tars on disk: work of Python more than
    of the disk.

    Told on stderr: which parts have changed, and how far it is. ConfigError where it cannot be
    written, before the work starts.
    """
    local = path if not is_remote(path) else _copy_of(path)
    if (index := _current(kind, files, base, local)) is not None:
        return index
    _check_place(path)
    with _locked(local, path):
        index = _current(kind, files, base, local)  # another process may have made it
        if index is None:
            _build(kind, files, base, local, scan, pure)
            if is_remote(path):
                _upload(local, path)
            index = Index(local)
    return index


def _current(kind: str, files: list[Found], base: str, path: str) -> Index | None:
    """The index at a path, if it knows all parts as they are."""
    index = _read(kind, path)
    if index is None:
        return None
    known = [(part.name, part.stamp) for part in index.parts]
    return index if known == [(name_below(f.path, base), f.stamp) for f in files] else None


def _read(kind: str, path: str) -> Index | None:
    """An index of this kind, or none; a damaged one is told and made anew."""
    try:
        index = Index(path)
    except FileNotFoundError:
        return None
    except (ConfigError, OSError, ValueError, KeyError, TypeError) as error:
        _say(f"{path}: {error}; it is made anew")
        return None
    return index if index.kind == kind else None


def _build(kind: str, files: list[Found], base: str, path: str, scan: Scan, pure: bool) -> None:
    old = _read(kind, path)
    numbers = {part.name: i for i, part in enumerate(old.parts)} if old is not None else {}
    done: dict[int, tuple[Part, Scanned]] = {}
    changed = []
    for i, file in enumerate(files):
        name = name_below(file.path, base)
        if old is not None and name in numbers:
            part = old.parts[numbers[name]]
            if part.stamp == file.stamp:
                done[i] = part, old.scanned(numbers[name])
            else:
                changed.append(name)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        said = "has changed" if len(changed) == 1 else "have changed"
        _say(f"{base}: {', '.join(changed[:3])}{more} {said} since the index was made; read again")
    missing = {i: file for i, file in enumerate(files) if i not in done}
    size, saved = sum(file.size for file in missing.values()), time.monotonic()
    with bar(size, f"indexing {base}") as advance:
        for i, scanned in _scanned(missing, scan, pure):
            done[i] = _part_of(files[i], base, scanned), scanned
            advance(files[i].size)
            if time.monotonic() - saved > SAVED:
                _write(kind, path, [done[i] for i in sorted(done)])
                saved = time.monotonic()
    _write(kind, path, [done[i] for i in sorted(done)])


def _scanned(files: dict[int, Found], scan: Scan, pure: bool) -> Iterator[tuple[int, Scanned]]:
    """What is found in the parts, in the order in which they are done."""
    size = sum(file.size for file in files.values())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, len(files))
    with contextlib.ExitStack() as stack:
        if pure and size > WORTH_PROCESSES and count > 1:
            scan = stack.enter_context(Helpers(count)).scan
        pool = stack.enter_context(ThreadPoolExecutor(count if pure else THREADS))
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting = {pool.submit(scan, file): i for i, file in files.items()}
        for future in as_completed(waiting):
            yield waiting.pop(future), future.result()


def _part_of(file: Found, base: str, scanned: Scanned) -> Part:
    rows = len(next(iter(scanned.columns.values())))
    packed = {name: len(data) for name, data in scanned.packed.items()}
    problems = scanned.problems
    return Part(
        name_below(file.path, base),
        file.size,
        file.stamp,
        rows,
        packed,
        scanned.digest(),
        problems.left_out,
        tuple(problems.named),
    )


def _write(kind: str, path: str, known: list[tuple[Part, Scanned]]) -> None:
    parts, scanned = [part for part, _ in known], [s for _, s in known]
    with new_file(path) as new, new.open("wb") as out:
        out.write(header(kind, parts, scanned))
        for name in scanned[0].columns:
            for s in scanned:
                out.write(s.columns[name].tobytes())
            out.write(b"\0" * (aligned(out.tell()) - out.tell()))
        for name in scanned[0].packed:
            for s in scanned:
                out.write(s.packed[name])
            out.write(b"\0" * (aligned(out.tell()) - out.tell()))


@contextlib.contextmanager
def _locked(path: str, told: str) -> Iterator[None]:
    """One process of this machine, or of those that share its disk, builds at a time. Where the
    disk has no locks, all of them do, and write the same."""
    if fcntl is None:
        yield
        return
    name = Path(path)
    name.parent.mkdir(parents=True, exist_ok=True)
    lock = name.with_name(f".{name.name}.lock")
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{told}: another process makes it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # no locks there
            pass
        yield
        # It stays: who waits for it has it open, and a new one would be another lock.


def _check_place(path: str) -> None:
    """ConfigError where the index cannot be written."""
    try:
        if is_remote(path):
            probe = f"{path}.probe"
            patiently(path, lambda: store(path).pipe_file(probe, b""))
            patiently(path, lambda: store(path).rm_file(probe))
        else:
            check_writable(path)
    except (ConfigError, OSError, NotImplementedError) as error:
        said = str(error).removeprefix(f"{path}: ") or type(error).__name__
        raise ConfigError(
            f"{path}: {said}: the index of the data goes there; index = FOLDER in their config"
            " names another place"
        ) from None


def _copy_of(url: str) -> str:
    """The copy on this machine of an index in a store, fetched if there is another one there."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = f"{zlib.crc32(url.encode()):08x}-{posixpath.basename(url)}"
    path = Path(cache) / "d2m_jax" / name
    stamp = path.with_name(f"{name}.stamp")
    with contextlib.suppress(FileNotFoundError):
        found = look(url)
        if not path.exists() or not stamp.exists() or stamp.read_text() != found.stamp:
            with new_file(path) as new:
                patiently(url, lambda: store(url).get_file(url, str(new)))
            stamp.write_text(found.stamp)
    return str(path)


def _upload(path: str, url: str) -> None:
    patiently(url, lambda: store(url).put_file(path, url))
    Path(path).with_name(f"{Path(path).name}.stamp").write_text(look(url).stamp)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
