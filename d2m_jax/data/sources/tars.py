"""Tars of img2dataset and WebDataset: a sample is the files of one name, up to its first dot."""

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from d2m_jax.config import ConfigError
from d2m_jax.data.sources import captions
from d2m_jax.data.sources.any_source import Sample
from d2m_jax.data.sources.image_size import image_size
from d2m_jax.data.sources.index import Problems, Scanned, pack
from d2m_jax.data.sources.indexed import Indexed
from d2m_jax.data.sources.stores import Changed, Found, Window, is_remote, reading

BLOCK = 512  # bytes: all of a tar lies in blocks
SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")  # of images
IMAGE, TEXT, JSON = 0, 1, 2  # what a member is of its sample
ROLES = dict.fromkeys((s.encode() for s in SUFFIXES), IMAGE) | {b"txt": TEXT, b"json": JSON}
NEAR = 2**18  # bytes between members of a sample up to which they are read at once
ON_DISK, IN_STORE = 2**13, 2**23  # bytes that are read at once while a tar is scanned
PADDING = 2**20  # bytes that may follow a tar's end mark
AT_HAND = 1024  # bytes of an image that mostly tell its size
SLASH, LONG_NAME, EXTENDED = b"/Lx"
FILES = b"0\0007"  # kinds of members that are files
MORE = b"LKxg"  # that tell more about the next one, a name that is too long for a header


class Members(Indexed):
    """Samples of many tars. The columns "block" and "bytes", uint32 [n, roles], are block and size
    of what plays each role in a sample; a size of 0 is one that is not there."""

    def members(self, index: int) -> dict[int, memoryview]:
        """Role → bytes. BadSample where they cannot be read."""
        key, file = self.key(index), self.files[self.index.part(index)]
        starts = [BLOCK * int(block) for block in self.index.columns["block"][index]]
        sizes = self.index.columns["bytes"][index].tolist()
        there = [role for role, size in enumerate(sizes) if size]
        first = min(starts[role] for role in there)
        end = max(starts[role] + sizes[role] for role in there)
        if end - first <= sum(sizes) + NEAR:
            data = memoryview(self.read(key, file, first, end - first))
            begins = [start - first for start in starts]
            return {role: data[begins[role] : begins[role] + sizes[role]] for role in there}
        return {r: memoryview(self.read(key, file, starts[r], sizes[r])) for r in there}


class Tars(Members):
    """Captioned images: IMAGE, TEXT and JSON are the roles."""

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        sizes = self.index.columns["bytes"][index].tolist()
        captions.check_length(key, sizes[TEXT])
        captions.check_length(key, sizes[JSON], captions.LONGEST_JSON)
        members = {role: bytes(data) for role, data in self.members(index).items()}
        found = captions.from_text(key, members.get(TEXT, b""))
        if not found and JSON in members:
            found = captions.from_json(key, members[JSON])
        return Sample(key, members[IMAGE], found)


def scan(file: Found) -> Scanned:
    """The samples of one tar. Of what is damaged is told what was lost, and the rest is found."""
    problems, rows = Problems(), dict[bytes, list[int]]()  # block, bytes: 3, 3; height and width
    checked = b""
    try:
        with reading(file) as read:
            window = Window(read, IN_STORE if is_remote(file.path) else ON_DISK)
            headers = headers_of(file, window, problems)
            checked = headers.checksum
            rows = _rows(file, window, headers, problems)
    except ConfigError:  # of no tar's
        raise
    except (Changed, OSError, ValueError) as error:
        problems.add(f"{file.path}: cannot be read to its end: {error}")
    kept = [name for name, row in rows.items() if row[3]]
    table = np.array([rows[name] for name in kept], np.int64).reshape(-1, 8)
    ends, names = pack(kept)
    columns = {
        "size": table[:, 6:].astype(np.int32),
        "block": table[:, :3].astype(np.uint32),
        "bytes": table[:, 3:6].astype(np.uint32),
        "name ends": ends,
    }
    return Scanned(columns, {"name": names}, problems, checked)


def headers_of(file: Found, window: Window, problems: Problems) -> "Headers":
    """Those of all files in a tar. ValueError where it cannot be read to its end."""
    try:
        return _walk(file, window, problems, careful=False)
    except ValueError:
        return _walk(file, window, problems, careful=True)


def _rows(
    file: Found, window: Window, headers: "Headers", problems: Problems
) -> dict[bytes, list[int]]:
    """Name of a sample → block of image, text, JSON; bytes of them; height, width."""
    rows: dict[bytes, list[int]] = {}
    broken = set()  # names whose image is there, and is no use
    twice = set()  # names whose image came again: what follows may be of that one
    for path, start, size, head in headers.files():
        dot = path.find(b".", path.rfind(b"/") + 1)
        role = ROLES.get(path[dot + 1 :].lower())
        # A name that begins with a dot is none: macOS writes files about files so.
        if role is None or dot <= 0 or path[dot - 1] == SLASH:
            continue
        name = path[:dot]
        row = rows.get(name)
        if row is None:
            row = rows[name] = [0] * 8
        if row[3 + role]:
            wrong = "comes a second time; the first is used"
            if role == IMAGE:
                twice.add(name)
        elif name in twice:
            wrong = "follows a second image of its name, and is not used"
        elif start + size > file.size or size >= 2**32:
            wrong = f"is cut off: its {size} bytes go on after the file"
        elif size == 0 and role == IMAGE:
            wrong = "is empty"
        else:
            row[role], row[3 + role] = start // BLOCK, size
            if role == IMAGE:
                row[6:] = image_size(head[:size], functools.partial(_peek, window, start, size))
            continue
        problems.add(f"{told(file, path)}: {wrong}", int(role == IMAGE))
        if role == IMAGE and not row[3]:
            broken.add(name)
    for name, row in rows.items():
        if not row[3] and name not in broken:
            problems.add(f"{told(file, name)}: has no image")
    return rows


def _peek(window: Window, start: int, size: int, at: int, count: int) -> bytes:
    return window.read(start + at, max(0, min(count, size - at)))


@dataclass
class Headers:
    """Those of files in a tar, in their order, and what stands behind them."""

    blocks: bytearray = field(default_factory=bytearray)  # with those about other headers
    which: list[int] = field(default_factory=list)  # of the blocks is a file's
    starts: list[int] = field(default_factory=list)  # first bytes of the files
    sizes: list[int] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)  # the files' beginnings, as far as at hand
    paths: dict[int, bytes] = field(default_factory=dict)  # of files whose header has no room
    path: bytes = b""  # of the next file, if it was told
    size: int | None = None  # in the same way

    def add(self, start: int, size: int, head: bytes) -> int:
        """A file, whose block is the next one; its size."""
        if self.path:
            self.paths[len(self.which)] = self.path
        size = size if self.size is None else self.size
        self.path, self.size = b"", None
        self.which.append(len(self.blocks) // BLOCK)
        self.starts.append(start)
        self.sizes.append(size)
        self.heads.append(head)
        return size

    def pass_over(self, kind: int, content: bytes) -> None:
        """What is no file, but may tell something about the next one."""
        if kind == LONG_NAME:
            self.path = content.rstrip(b"\0")
        elif kind not in MORE:
            self.path, self.size = b"", None
        elif kind == EXTENDED:
            known = _extended(content)
            self.path = known.get(b"path", self.path)
            self.size = int(known[b"size"]) if b"size" in known else None

    @property
    def checksum(self) -> bytes:
        """Another one when files are others, or stored otherwise."""
        return zlib.crc32(self.blocks).to_bytes(4, "big")

    def files(self) -> Iterator[tuple[bytes, int, int, bytes]]:
        """Path, first byte, size and beginning of each."""
        blocks = self.array[self.which]
        names = np.ascontiguousarray(blocks[:, :100]).view("S100").ravel().tolist()
        with_prefix = (blocks[:, 345] != 0) & (blocks[:, 262] == 0)  # not in GNU's form
        for i in np.flatnonzero(with_prefix).tolist():
            prefix = bytes(blocks[i, 345:500]).split(b"\0", 1)[0]
            names[i] = prefix + b"/" + names[i]
        for i, path in self.paths.items():
            names[i] = path
        # numpy cuts zeros off at the end alone
        whole = (name.split(b"\0", 1)[0] if b"\0" in name else name for name in names)
        return zip(whole, self.starts, self.sizes, self.heads, strict=True)

    def check(self) -> None:
        """ValueError unless the sums in all headers are right; in a sum its own place counts as
        blanks."""
        own = self.array[:, 148:156]
        found = self.array.sum(1, dtype=np.int64) - own.sum(1, dtype=np.int64) + 8 * ord(" ")
        digits = own[:, :6].astype(np.int64) - ord("0")
        if not np.all((digits @ 8 ** np.arange(5, -1, -1) == found) & (own[:, 6] == 0)):
            raise ValueError("a header whose checksum is wrong")

    @functools.cached_property
    def array(self) -> UInt8[np.ndarray, "n 512"]:
        return np.frombuffer(self.blocks, np.uint8).reshape(-1, BLOCK)


def _walk(file: Found, window: Window, problems: Problems, careful: bool) -> Headers:
    """All headers of a tar.

    This loop runs ten million times for some millions of samples. So at first headers are taken as
    they come, and checked together: ValueError where one is odd. `careful` checks each, and finds
    the next one behind damage.
    """
    found = Headers()
    blocks = found.blocks
    at, low, data = 0, 0, b""
    while True:
        offset = at - low
        header = data[offset : offset + BLOCK]
        if len(header) < BLOCK:
            low, offset, data = at, 0, window.read(at, window.step)
            header = data[:BLOCK]
        if header[257:262] != b"ustar" or careful:
            if len(header) < BLOCK or not header.strip(b"\0"):
                break
            if not careful:
                raise ValueError("a header that is not a tar's")
            if not _is_header(header):
                at = _behind_damage(file, window, at, problems)
                if at == 0:
                    return found
                continue
        kind = header[156]
        try:
            size = int(header[124:135], 8)
        except ValueError:
            size = -1
        size = size if size >= 0 else _number(header[124:136])
        if kind in FILES:
            head = data[offset + BLOCK : offset + BLOCK + AT_HAND] if size > AT_HAND else b""
            size = found.add(at + BLOCK, size, head)
        elif kind != EXTENDED or not _of_times(data[offset + BLOCK : offset + BLOCK + size], size):
            found.pass_over(kind, window.read(at + BLOCK, size) if kind in MORE else b"")
        blocks += header
        at += (size + 2 * BLOCK - 1) // BLOCK * BLOCK
    if not careful:
        found.check()
    _check_end(file, at, len(header) < BLOCK, problems)
    return found


def _of_times(content: bytes, size: int) -> bool:
    """Whether something told about the next file is at hand, and is neither its path nor size."""
    return len(content) == size and b" path=" not in content and b" size=" not in content


def _check_end(file: Found, at: int, missing: bool, problems: Problems) -> None:
    """Tell of a tar that has no end mark, or more behind it, or nothing before it."""
    if at == 0:
        problems.add(f"{file.path}: {'is no tar' if file.size else 'is empty'}")
    elif missing:
        problems.add(f"{file.path}: is cut off: it has no end mark after byte {file.size}", 0)
    elif file.size - at > PADDING:
        said = f"goes on after its end mark, at byte {at}, which is not read"
        problems.add(f"{file.path}: {said}", 0)


def _behind_damage(file: Found, window: Window, at: int, problems: Problems) -> int:
    """Where reading can go on; 0 where it cannot."""
    found = _next_header(window, file, at + BLOCK)
    to = f"up to byte {found}" if found else "to its end"
    what = "is no tar" if at == 0 and not found else f"damaged from byte {at} {to}"
    problems.add(f"{file.path}: {what}")
    return found


def told(file: Found, path: bytes) -> str:
    """A file in a tar, for a message."""
    return f"{file.path}: {path.decode(errors='replace')}"


def _is_header(header: bytes) -> bool:
    """Whether the sum in a header, and its size, are right."""
    found = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    try:
        _number(header[124:136])
        return found == _number(header[148:156].split(b"\0", 1)[0])
    except ValueError:
        return False


def _next_header(window: Window, file: Found, at: int) -> int:
    """Where the next header begins after a place that is damaged; 0 where there is none."""
    while at < file.size:
        data = window.read(at, 2**20)
        place = 257  # of the mark in a header
        while (place := data.find(b"ustar", place)) >= 0:
            begin = place - 257
            if begin % BLOCK == 0 and _is_header(data[begin : begin + BLOCK].ljust(BLOCK, b"\0")):
                return at + begin
            place += 1
        at += max(BLOCK, (len(data) - BLOCK) // BLOCK * BLOCK)  # the mark may lie across
    return 0


def _number(text: bytes) -> int:
    """A number in octal, or in binary where it is too large for that. ValueError for none."""
    try:
        found = int(text.rstrip(b" \0"), 8)
    except ValueError:
        if not text[0] & 0x80:
            raise
        found = int.from_bytes(text[1:], "big")
    if found < 0:
        raise ValueError(f"{found} where the size of a file belongs")
    return found


def _extended(data: bytes) -> dict[bytes, bytes]:
    """The fields of a PAX header: lines of LENGTH NAME=VALUE."""
    found, at = {}, 0
    while (space := data.find(b" ", at)) >= 0 and data[at:space].isdigit():
        length = int(data[at:space])
        name, _, value = data[space + 1 : at + length - 1].partition(b"=")
        found[name] = value
        at += max(length, 1)
    return found
