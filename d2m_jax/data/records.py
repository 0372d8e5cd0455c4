"""A cache on disk: encoded samples in ArrayRecord shards, and what made them.

A folder holds `cache.json` (what the samples were made with, and, once all are there, the shards),
`empty` (the features of the empty caption) and shards like `1024x768-00003.array_record`, each of
samples of one height and width. A shard appears whole: what was half-written when a process was
killed is made anew.
"""

import bisect
import hashlib
import itertools
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from d2m_jax.config import ConfigError, ModelConfig, PromptsConfig, check, check_same, to_json
from d2m_jax.data.buckets import Size
from d2m_jax.data.sources.array_records import open_records
from d2m_jax.data.sources.stores import Kept
from d2m_jax.output import new_file, write_json

FILE, EMPTY, SUFFIX = "cache.json", "empty.array_record", ".array_record"
FORMAT = 1  # of this layout
THREADS = 16  # shards that are opened at once
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Record:
    """One sample: facts that are JSON, and arrays."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """Length of the head, a head in JSON, the arrays one after the other."""
        shapes = {name: [str(a.dtype), list(a.shape)] for name, a in self.arrays.items()}
        head = json.dumps({"facts": self.facts, "arrays": shapes}).encode()
        content = [np.ascontiguousarray(a).tobytes() for a in self.arrays.values()]
        return b"".join([struct.pack("<I", len(head)), head, *content])

    @staticmethod
    def from_bytes(data: bytes) -> "Record":
        """The inverse. ValueError for bytes that are something else, or that end too early."""
        try:
            (size,) = struct.unpack_from("<I", data)
            head = json.loads(data[4 : 4 + size])
            start, arrays = 4 + size, {}
            for name, (dtype, shape) in head["arrays"].items():
                kind = np.dtype(dtype)
                count = int(np.prod(shape, dtype=np.int64))
                arrays[name] = np.frombuffer(data, kind, count, start).reshape(shape)
                start += count * kind.itemsize
            return Record(head["facts"], arrays)
        except (struct.error, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"no record of a cache ({error})") from None


def shard_name(size: Size, number: int) -> str:
    """The file of a shard, which tells the height and width of its samples."""
    return f"{size[0]}x{size[1]}-{number:05d}{SUFFIX}"


def size_of(name: str) -> Size:
    """Height and width of the samples of a shard."""
    height, width = name.split("-")[0].split("x")
    return int(height), int(width)


def write_shard(file: Path, records: Iterable[Record]) -> int:
    """A shard that appears whole; how many records it has."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count = 0
    with new_file(file) as new:
        writer = ArrayRecordWriter(str(new), "group_size:1,uncompressed")
        try:
            for record in records:
                writer.write(record.to_bytes())
                count += 1
        finally:
            writer.close()  # tells of a full disk
    return count


class Shards:
    """The records of many shards, by number; for threads, and for worker processes."""

    def __init__(self, files: list[Path], starts: list[int] | None = None):
        """`starts`: the first record of each shard, and the number of all; None: they are read.
        ConfigError for a file that is no shard."""
        self.files = files
        self._kept: Kept[str, Any] = Kept(open_records)
        if starts is None:
            with ThreadPoolExecutor(THREADS) as pool:
                starts = list(itertools.accumulate(pool.map(_count, files), initial=0))
        self.starts = starts

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Record:
        """ValueError or RuntimeError where it is damaged; ConfigError where too many files are
        open."""
        if not 0 <= index < len(self):
            raise ValueError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self.starts, index) - 1
        (data,) = self._kept(str(self.files[shard])).read([index - self.starts[shard]])
        return Record.from_bytes(data)

    def __reduce__(self) -> tuple[type, tuple]:
        return Shards, (self.files, self.starts)


def _count(file: Path) -> int:
    try:
        return open_records(str(file)).num_records()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: {error}; expected a shard of a cache") from None


@dataclass(frozen=True)
class Cache:
    """A cache that is whole."""

    folder: Path
    made: dict[str, Any]  # with what
    counts: dict[str, int]  # records by shard

    @cached_property
    def samples(self) -> Shards:
        """Samples by number."""
        return Shards([self.folder / name for name in self.counts])

    @property
    def runs(self) -> list[tuple[Size, int]]:
        """Height and width in pixels of so many samples, one after the other."""
        return [(size_of(name), count) for name, count in self.counts.items()]

    @property
    def fingerprint(self) -> str:
        """A digest of what they were made of, and how they lie in shards."""
        return digest([self.made, self.counts])

    @cached_property
    def empty(self) -> Record:
        """The features of the empty caption."""
        return Shards([self.folder / EMPTY])[0]


def digest(value: Any) -> str:
    """A short name of what JSON can say."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def open_cache(folder: Path) -> Cache:
    """The cache in a folder. ConfigError where there is none, or one that is not finished."""
    value = _read(folder)
    check(
        value.get("shards") is not None,
        f"{folder}: a cache that is not finished; give the command that made it again, and it goes"
        " on",
    )
    lost = [name for name in value["shards"] if not (folder / name).is_file()]
    check(not lost, f"{folder / (lost or [''])[0]}: no such file, but {folder / FILE} names it")
    return Cache(folder, value["made"], value["shards"])


def begin(folder: Path, made: dict[str, Any]) -> None:
    """Say what a cache is made with, or see that the one in the folder is made with the same.

    ConfigError that names what differs: a cache is never changed into another.
    """
    made = json.loads(json.dumps(made))
    if (folder / FILE).exists():
        found = _read(folder)["made"]
        check_same(found, made, folder / FILE, "expected the same, or another folder")
        return
    others = list(folder.iterdir()) if folder.is_dir() else []
    check(not others, f"{folder}: holds other files than a cache, expected a new or empty folder")
    write_json(folder / FILE, {"format": FORMAT, "made": made, "shards": None})


def finish(folder: Path, counts: dict[str, int]) -> None:
    """Say that all shards are there."""
    write_json(folder / FILE, _read(folder) | {"shards": dict(sorted(counts.items()))})


def model_facts(model: ModelConfig) -> dict[str, Any]:
    """What of a model decides what its encoders make of images and captions."""
    text, image = to_json(model.text), to_json(model.image)
    for name in ("vocabulary", "length"):  # other words change nothing; the length is its own fact
        text.pop(name, None)
    for name in ("height", "width"):
        image.pop(name)
    prompts = isinstance(model.text, PromptsConfig)
    encoders = _encoders(Path(model.encoders)) if model.encoders and prompts else None
    return {"text": text, "image": image, "encoders": encoders}


def checksum(texts: Iterable[str]) -> str:
    """Of many strings."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode() + b"\0")
    return total.hexdigest()[:16]


def _encoders(folder: Path) -> dict[str, str]:
    """Checksums of the beginnings of the encoders' files, by part; weights that train change what
    lies at the beginning too."""
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    found = {}
    for part in parts:
        files = sorted(file for file in (folder / part).glob("*") if file.is_file())
        total = 0
        for file in files:
            total = zlib.crc32(f"{file.name} {file.stat().st_size} ".encode(), total)
            total = zlib.crc32(_beginning(file), total)
        found[part] = f"{total:08x}"
    return found


def _beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4_000_000)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    check(file.is_file(), f"{file}: no such file, expected a cache (python -m d2m_jax.data.cache)")
    try:
        value = json.loads(file.read_text())
        check(
            value["format"] == FORMAT,
            f"{file}: format {value['format']}, expected {FORMAT}, this version's",
        )
        return value
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: damaged, expected the JSON of a cache") from None
