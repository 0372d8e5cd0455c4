"""Folders of images: captions in a .txt or .json of the same name, or in metadata.jsonl or
metadata.csv of their folder or one above it, as in Hugging Face's imagefolder."""

import csv
import functools
import hashlib
import io
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2m_jax.data.sources import captions
from d2m_jax.data.sources.any_source import BadSample, Sample
from d2m_jax.data.sources.image_size import image_size
from d2m_jax.data.sources.index import Problems, Scanned, name_below, pack
from d2m_jax.data.sources.indexed import Indexed
from d2m_jax.data.sources.stores import Changed, Found, Reader, Window, listed, walk
from d2m_jax.data.sources.tars import SUFFIXES
from d2m_jax.texts import printable

METADATA = ("metadata.jsonl", "metadata.csv")
START = 2**13  # bytes of an image that are read at once for its size
THREADS = 8  # files of a folder that are read at once


class Folder(Indexed):
    """Images below a folder; its parts are the folders in it. Packed columns: "name", "stamp" of
    the file, "captions" in JSON; "bytes", int64 [n], is its size."""

    def key(self, index: int) -> str:
        """The path of an image below the folder."""
        return printable(self._path(index))

    def _path(self, index: int) -> str:
        part = self.index.parts[self.index.part(index)].name
        return posixpath.normpath(f"{part}/{os.fsdecode(self.index.text('name', index))}")

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        size = int(self.index.columns["bytes"][index])
        stamp = self.index.text("stamp", index).decode()
        image = self.read(key, Found(f"{self.base}/{self._path(index)}", size, stamp), 0, size)
        return Sample(key, image, tuple(json.loads(self.index.text("captions", index))))


@dataclass
class Survey:
    """What is in a folder: how many files of each suffix, the shards, the folders with images."""

    suffixes: Counter[str] = field(default_factory=Counter)
    shards: list[Found] = field(default_factory=list)
    folders: list[Found] = field(default_factory=list)


def survey(root: str, shards: tuple[str, ...]) -> Survey:
    """Look through a folder; `shards` are suffixes of files that have many samples."""
    found, metadata = Survey(), {}
    for folder, files in walk(root):
        metadata[folder] = [f.stamp for f in files if posixpath.basename(f.path) in METADATA]
        found.suffixes.update(_suffix(file.path) for file in files)
        found.shards += [file for file in files if file.path.endswith(shards)]
        own = [file for file in files if _suffix(file.path) in (*SUFFIXES, "txt", "json")]
        if any(_suffix(file.path) in SUFFIXES for file in own):
            digest = hashlib.sha256()
            for file in own:
                digest.update(os.fsencode(f"{posixpath.basename(file.path)} {file.stamp}\n"))
            for above in _from(root, folder):
                digest.update(json.dumps(metadata[above]).encode())
            size = sum(file.size for file in own)
            found.folders.append(Found(folder, size, digest.hexdigest()[:32]))
    return found


def scan(root: str, folder: Found) -> Scanned:
    """The images in one folder, without those in folders below it."""
    files = {posixpath.basename(file.path): file for file in listed(folder.path)[1]}
    images = [file for name, file in files.items() if _suffix(name) in SUFFIXES]
    problems, told = Problems(), dict[str, dict]()
    for above in _from(root, folder.path):  # what is said nearer to an image comes later
        here = above == folder.path
        for file in files.values() if here else listed(above)[1]:
            if posixpath.basename(file.path) in METADATA:
                rows, wrong = _metadata(file)
                told |= rows.get(name_below(folder.path, above), {})
                for message in wrong if here else ():
                    problems.add(message, 0)
    for name in told.keys() - files.keys():
        problems.add(f"{folder.path}/{name}: the metadata name it, but there is no such file")
    with ThreadPoolExecutor(THREADS) as pool:
        known = list(pool.map(functools.partial(_look, Reader(), files, told), images))
    for row in known:
        if isinstance(row, str):
            problems.add(row)
    rows = [row for row in known if not isinstance(row, str)]
    columns = {
        "size": np.array([row.size for row in rows], np.int32).reshape(-1, 2),
        "bytes": np.array([row.file.size for row in rows], np.int64),
    }
    packed = {
        "name": [os.fsencode(posixpath.basename(row.file.path)) for row in rows],
        "stamp": [row.file.stamp.encode() for row in rows],
        "captions": [json.dumps(row.captions).encode() for row in rows],
    }
    joined = {}
    for name, texts in packed.items():
        columns[f"{name} ends"], joined[name] = pack(texts)
    return Scanned(columns, joined, problems)


@dataclass(frozen=True)
class _Row:
    file: Found
    size: tuple[int, int]
    captions: tuple[str, ...]


def _look(
    reader: Reader, files: dict[str, Found], told: dict[str, dict], image: Found
) -> _Row | str:
    """What is known of an image, or what is wrong with it."""
    name = posixpath.basename(image.path)
    stem = posixpath.splitext(name)[0]
    try:
        if image.size == 0:
            raise BadSample(f"{image.path}: is empty")
        found: tuple[str, ...] = ()
        for beside, read, most in (
            (f"{stem}.txt", captions.from_text, captions.LONGEST),
            (f"{stem}.json", captions.from_json, captions.LONGEST_JSON),
        ):
            if beside in files and not found:
                file = files[beside]
                captions.check_length(file.path, file.size, most)
                found = read(file.path, reader.read(file, 0, file.size))
        if not found and name in told:
            found = captions.from_fields(image.path, told[name])
        size = _size(reader, image)
    except BadSample as error:
        return str(error)
    except (Changed, OSError) as error:
        return f"{image.path}: {getattr(error, 'strerror', None) or error}"
    return _Row(image, size, found)


def _size(reader: Reader, image: Found) -> tuple[int, int]:
    peek = Window(functools.partial(reader.read, image), START).read
    return image_size(peek(0, START), peek)


@functools.lru_cache(8)
def _metadata(file: Found) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """Folder below that of the file → name of an image → its fields; and what is wrong."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    wrong = []
    text = Reader().read(file, 0, file.size).decode("utf-8-sig", errors="replace")
    for line, row in _rows(file.path, text):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            wrong.append(f"{file.path}, line {line}: expected an object with file_name")
            continue
        name = posixpath.normpath(name)
        found.setdefault(posixpath.dirname(name) or ".", {})[posixpath.basename(name)] = row
    return found, wrong


def _rows(path: str, text: str) -> Iterator[tuple[int, Any]]:
    """Line and fields of each row; no fields where a line has none."""
    if path.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield reader.line_num, row
        return
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            try:
                yield line, json.loads(row)
            except ValueError:
                yield line, None


def _from(root: str, folder: str) -> list[str]:
    """The folders from the root down to a folder, both among them."""
    found = [folder]
    while found[-1] != root:
        found.append(found[-1].rsplit("/", 1)[0])
    return found[::-1]


def _suffix(path: str) -> str:
    return path.rsplit("/", 1)[-1].rpartition(".")[2].lower() if "." in path else ""
