"""The door to sources: a path or a pattern, opened as what is there."""

import functools
import itertools
import os
import posixpath
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from d2m_jax import hosts
from d2m_jax.config import ConfigError, check
from d2m_jax.data.sources import array_records, folders, parquet, tars
from d2m_jax.data.sources.any_source import Source
from d2m_jax.data.sources.build import SUFFIX, indexed, place
from d2m_jax.data.sources.index import Index, Scanned
from d2m_jax.data.sources.indexed import Indexed
from d2m_jax.data.sources.stores import Found, is_folder, is_remote, look, matching

# Suffixes of files of many samples → what reads them.
SHARDS: dict[str, tuple[str, Callable[[Found], Scanned], type[Indexed]]] = {
    ".tar": ("tars", tars.scan, tars.Tars),
    ".parquet": ("parquet", parquet.scan, parquet.Parquet),
    ".array_record": ("array_records", array_records.scan, array_records.ArrayRecords),
    ".arrayrecord": ("array_records", array_records.scan, array_records.ArrayRecords),
}
EXPECTED = "expected .tar, .parquet or .array_record files, or a folder with them or with images"
MOST = 1_000_000  # names that braces may stand for
THREADS = 32  # files that are asked for at once

T = TypeVar("T", bound=Indexed)


def open_source(path: str, index: str | None = None, max_bad: int = 100) -> Source:
    """The captioned images at a path: a file, a folder, a pattern with * or {00000..00099}, on disk
    or as a URL that fsspec knows. All processes of a run must call it.

    What is known of them is kept in a file in the folder `index`, or beside them. The first call
    makes it, which takes a while, and later ones only what has changed since. ConfigError where
    nothing is found, where the file cannot be written, and where more than `max_bad` samples cannot
    be used.
    """
    path = _normal(path)
    index = _normal(index) if index is not None else None
    source = first_then_all(lambda: _open(path, index))
    tell_left_out(path, source.index, max_bad, "image")
    return source


def first_then_all(open_it: Callable[[], T]) -> T:
    """What it gives: the other processes wait for the first, and find the index that it made where
    the disk is shared."""
    opened: list[T] = []
    hosts.by_first(lambda: opened.append(open_it()))
    return opened[0] if opened else open_it()


def _open(path: str, where: str | None) -> Indexed:
    kind, scan, reader, files, base = _found(path)
    file = place(path, base, where, kind)
    pure = kind == "tars" and not is_remote(path)
    return reader(indexed(kind, files, base, file, scan, pure), base)


def _found(
    path: str,
) -> tuple[str, Callable[[Found], Scanned], type[Indexed], list[Found], str]:
    """What is at a path: kind, scan and class, its parts, and the folder that they are in."""
    files = _files(path)
    if files is not None:
        check(len(files) > 0, f"{path}: found no file; {EXPECTED}")
        suffixes = {posixpath.splitext(file.path)[1].lower() for file in files}
        others = [f.path for f in files if posixpath.splitext(f.path)[1].lower() not in SHARDS]
        check(not others, f"{(others or [None])[0]}: {EXPECTED}")
        kinds = {SHARDS[suffix] for suffix in suffixes}
        check(len(kinds) == 1, f"{path}: found {' and '.join(sorted(suffixes))}: expected one kind")
        return *kinds.pop(), files, _common(files)
    return _in_folder(path)


def _in_folder(
    path: str,
) -> tuple[str, Callable[[Found], Scanned], type[Indexed], list[Found], str]:
    found = folders.survey(path, tuple(SHARDS))
    by_kind: dict[str, list[Found]] = {}
    for file in found.shards:
        kind, _, _ = SHARDS[posixpath.splitext(file.path)[1]]
        by_kind.setdefault(kind, []).append(file)
    # img2dataset writes a table without images beside its tars, or beside its folders of images.
    if "parquet" in by_kind and (len(by_kind) > 1 or found.folders):
        tables = by_kind.pop("parquet")
        if parquet.has_images(tables[0]):
            by_kind["parquet"] = tables
    kinds = [*by_kind, *(["images"] if found.folders else [])]
    if not kinds:
        most = ", ".join(f"{count} .{s}" for s, count in found.suffixes.most_common(3))
        raise ConfigError(f"{path}: found {most or 'no file'}; {EXPECTED}")
    if len(kinds) > 1:
        raise ConfigError(
            f"{path}: found {' and '.join(kinds)}; expected one kind: a pattern, {path}/*.tar, or"
            " the path of a folder in it names which"
        )
    if kinds == ["images"]:
        return "images", functools.partial(folders.scan, path), folders.Folder, found.folders, path
    files = by_kind[kinds[0]]
    return *next(s for s in SHARDS.values() if s[0] == kinds[0]), files, path


def _files(path: str) -> list[Found] | None:
    """The files that a path or a pattern names; None for a folder. ConfigError for one that is not
    there."""
    if not is_remote(path) and os.path.exists(path):  # whatever its name looks like
        return None if is_folder(path) else [look(path)]
    names = list(itertools.islice(braces(path), MOST + 1))
    check(len(names) <= MOST, f"{path}: stands for more than {MOST} names")
    found: list[Found] = []
    plain = [name for name in names if not re.search(r"[*?\[]", name)]
    for name in names:
        if name not in plain:
            found += [file for file in matching(name) if not file.path.endswith(SUFFIX)]
    if len(names) == 1 and plain and is_folder(path):
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        found += pool.map(functools.partial(_must_be, path), plain)
    return sorted(dict.fromkeys(found), key=lambda file: file.path)


def _must_be(pattern: str, path: str) -> Found:
    try:
        return look(path)
    except FileNotFoundError:
        of = f" ({pattern})" if pattern != path else ""
        raise ConfigError(f"{path}: not found{of}; {EXPECTED}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


def braces(pattern: str) -> Iterable[str]:
    """The names that a pattern stands for: `{00..03}` for four, `{a,b}` for two."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    inside = found[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        first, last = int(span[1]), int(span[2])
        digits = len(span[1]) if span[1][0] == "0" or len(span[1]) == len(span[2]) else 1
        choices: Iterable[str] = (f"{number:0{digits}d}" for number in range(first, last + 1))
    else:
        choices = inside.split(",")
    for choice in choices:
        yield from braces(pattern[: found.start()] + choice + pattern[found.end() :])


def _common(files: list[Found]) -> str:
    """The folder that all files are in."""
    names = [posixpath.dirname(file.path).split("/") for file in files]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*names, strict=False))
    return "/".join(level[0] for level in same)


def _normal(path: str) -> str:
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if is_remote(path):
        return path.rstrip("/")
    return os.path.abspath(Path(path).expanduser())


def tell_left_out(path: str, index: Index, max_bad: int, what: str) -> None:
    """Say which samples cannot be used. ConfigError where they are more than `max_bad`, or all."""
    left_out = sum(part.left_out for part in index.parts)
    said = [problem for part in index.parts for problem in part.problems]
    words = "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if len(said) > 3 else "")
    if left_out > max_bad:
        raise ConfigError(
            f"{path}: {left_out} samples cannot be used, more than max_bad = {max_bad}: {words}"
        )
    check(len(index) > 0, f"{path}: found no {what} that can be used{': ' * bool(said)}{words}")
    if said:
        hosts.say(f"{path}: {len(index)} samples, {left_out} left out: {words}")
