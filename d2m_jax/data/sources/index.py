"""What is known of the samples of a source, in one file that is mapped into memory.

A row is a sample that can be used: a few numbers (where it lies, how large its image is) and packed
bytes (its name, captions of folders). Rows of one file of the source, a part, stand together, so
that a part that has changed is replaced alone (build.py). In the file: MAGIC, the length of the
header, a header in JSON, then the columns one after the other.
"""

import bisect
import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2m_jax.config import ConfigError

MAGIC = b"d2m_jax index 1\n"
ALIGNED = 64  # bytes
NAMED = 20  # problems of a part that are kept in words; the others are counted


@dataclass(frozen=True)
class Part:
    """A file of a source and how many rows it has; or a folder, of a folder of images."""

    name: str  # its path below the source's folder
    size: int  # bytes
    stamp: str  # stores.Found.stamp
    rows: int
    packed: Mapping[str, int]  # name of a packed column → its bytes of this part
    digest: str  # of all that is known of its samples
    left_out: int  # samples that cannot be used
    problems: tuple[str, ...]  # the first of them in words, and what else is to be told


@dataclass
class Problems:
    """What is wrong with samples of a part: counted, the first ones named."""

    left_out: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, message: str, left_out: int = 1) -> None:
        self.left_out += left_out
        if len(self.named) < NAMED:
            self.named.append(message)


@dataclass(frozen=True)
class Scanned:
    """What was found in one part."""

    columns: dict[str, np.ndarray]  # [rows, …]; of a packed column its ends, uint32
    packed: dict[str, bytes]
    problems: Problems
    contents: bytes = b""  # a digest of more than is kept, of what shall change the fingerprint

    def digest(self) -> str:
        found = hashlib.sha256(self.contents)
        for name in sorted(self.columns):
            found.update(np.ascontiguousarray(self.columns[name]).data)
        for name in sorted(self.packed):
            found.update(self.packed[name])
        return found.hexdigest()[:32]


def pack(texts: list[bytes]) -> tuple[np.ndarray, bytes]:
    """Ends and bytes of a packed column."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.uint64)
    if len(ends) and ends[-1] >= 2**32:
        raise ConfigError(
            "a file of a source has more than 4 GB of captions; expected smaller files"
        )
    return ends.astype(np.uint32), b"".join(texts)


class Index:
    """Reads the file. Pickled it is a path: a process that gets it maps the file itself."""

    def __init__(self, path: str, fingerprint: str | None = None):
        """ConfigError for what is no index, or another than that with a fingerprint; OSError where
        it cannot be read."""
        self.path = path
        with Path(path).open("rb") as file:
            start = file.read(len(MAGIC) + 8)
            if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 8:
                raise ConfigError(f"{path}: is not an index that this version can read")
            (length,) = struct.unpack("<Q", start[len(MAGIC) :])
            size = Path(path).stat().st_size
            if length > size:
                raise ConfigError(f"{path}: is cut off: the file is shorter than it says")
            header = json.loads(file.read(length))
        self.kind: str = header["kind"]
        self.parts = [_part(values) for values in header["parts"]]
        begin = aligned(len(start) + length)
        arrays = header["arrays"]
        if size < begin + max((at + count for at, count, _, _ in arrays.values()), default=0):
            raise ConfigError(f"{path}: is cut off: the file is shorter than it says")
        mapped = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        self.columns: dict[str, np.ndarray] = {
            name: mapped[begin + at : begin + at + count].view(dtype).reshape(-1, *shape)
            for name, (at, count, dtype, shape) in arrays.items()
        }
        self.starts = [0]  # first row of each part, and the number of all rows
        for part in self.parts:
            self.starts.append(self.starts[-1] + part.rows)
        self._packed = {  # first byte of each part
            name: np.cumsum([0, *(part.packed[name] for part in self.parts)]).tolist()
            for name in header["packed"]
        }
        # Single elements are read in a tenth of numpy's time.
        self._views = {n: c.data for n, c in self.columns.items() if c.ndim == 1 and c.size}
        self.fingerprint = self._fingerprint()
        if fingerprint not in (None, self.fingerprint):
            raise ConfigError(
                f"{path}: was made anew, of other samples, since this run opened it; expected the"
                " source to stay as it is while a run reads it: start the run again"
            )

    def __reduce__(self) -> tuple[type, tuple]:
        return Index, (self.path, self.fingerprint)

    def __len__(self) -> int:
        return self.starts[-1]

    def part(self, row: int) -> int:
        """The number of the part that has a row. IndexError for a row that is none."""
        if not 0 <= row < len(self):
            raise IndexError(f"sample {row} of {len(self)}")
        return bisect.bisect_right(self.starts, row) - 1

    def text(self, name: str, row: int) -> bytes:
        """What a row has in a packed column."""
        part, ends = self.part(row), self._views[f"{name} ends"]
        first = self._packed[name][part]
        begin = first + (ends[row - 1] if row > self.starts[part] else 0)
        return bytes(self._views[name][begin : first + ends[row]])

    def scanned(self, part: int) -> Scanned:
        """What is known of a part, to be written again."""
        rows = slice(self.starts[part], self.starts[part + 1])
        columns = {n: c[rows] for n, c in self.columns.items() if n not in self._packed}
        packed = {
            name: self.columns[name][starts[part] : starts[part + 1]].tobytes()
            for name, starts in self._packed.items()
        }
        kept = self.parts[part]
        return Scanned(columns, packed, Problems(kept.left_out, list(kept.problems)))

    def _fingerprint(self) -> str:
        known = [self.kind, *((part.name, part.rows, part.digest) for part in self.parts)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def name_below(path: str, base: str) -> str:
    """A path, told from a folder on; "." for the folder itself."""
    return path.removeprefix(base).strip("/") or "."


def header(kind: str, parts: list[Part], scanned: list[Scanned]) -> bytes:
    """The beginning of an index's file, up to its columns; see `written`."""
    arrays: dict[str, Any] = {}
    at = 0
    for name, column in scanned[0].columns.items():
        count = sum(s.columns[name].nbytes for s in scanned)
        arrays[name] = at, count, column.dtype.str, column.shape[1:]
        at = aligned(at + count)
    for name in scanned[0].packed:
        count = sum(len(s.packed[name]) for s in scanned)
        arrays[name] = at, count, "|u1", ()
        at = aligned(at + count)
    known = {
        "kind": kind,
        "parts": [list(asdict(part).values()) for part in parts],
        "packed": list(scanned[0].packed),
        "arrays": arrays,
    }
    text = json.dumps(known).encode()
    start = MAGIC + struct.pack("<Q", len(text)) + text
    return start.ljust(aligned(len(start)), b"\0")


def aligned(at: int) -> int:
    """The next place where a column may begin."""
    return math.ceil(at / ALIGNED) * ALIGNED


def _part(values: list[Any]) -> Part:
    name, size, stamp, rows, packed, digest, left_out, problems = values
    return Part(name, size, stamp, rows, packed, digest, left_out, tuple(problems))
