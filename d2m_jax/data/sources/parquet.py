"""Parquet files of Hugging Face with encoded images in them, read by row group."""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from d2m_jax.config import ConfigError
from d2m_jax.data.sources import captions
from d2m_jax.data.sources.any_source import BadSample, Sample
from d2m_jax.data.sources.image_size import image_size
from d2m_jax.data.sources.index import Index, Problems, Scanned
from d2m_jax.data.sources.indexed import Indexed
from d2m_jax.data.sources.stores import Changed, Found, Reader

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")  # names of a column of images
SIZES = ("height", "width")  # columns that spare reading the images while they are indexed
KEPT = 2**28  # bytes of row groups that a process keeps
LARGE = 2**26  # bytes of a row group from which it is told that an image costs reading all that


class Parquet(Indexed):
    """Rows of parquet files. Columns: "group" and "row" in it, uint32 [n]. A sample is read with
    the images and captions of its whole row group; the last row groups are kept."""

    def __init__(self, index: Index, base: str):
        super().__init__(index, base)
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, part: int, index: int) -> str:
        """Row group and row."""
        group, row = (int(self.index.columns[column][index]) for column in ("group", "row"))
        return f"{group}, {row}"

    def __getitem__(self, index: int) -> Sample:
        key, part = self.key(index), self.index.part(index)
        group, row = (int(self.index.columns[column][index]) for column in ("group", "row"))
        try:
            fields = self._group(part, group).row(row)
        except ConfigError:  # of no file's
            raise
        except (Changed, OSError, ValueError) as error:  # Arrow's are ValueErrors
            raise BadSample(f"{key}: {' '.join(str(error).split())}") from None
        if not fields["bytes"]:
            raise BadSample(f"{key}: has no image")
        return Sample(key, fields["bytes"], captions.from_fields(key, fields))

    def _group(self, part: int, number: int) -> "_Group":
        with self._lock:
            group = self._groups.setdefault((part, number), _Group())
            self._groups.move_to_end((part, number))
        with group.lock:  # of threads that want the same one, the first reads it
            if group.table is None:
                group.table = _Table(self.reader, self.files[part]).group(number)
        with self._lock:
            kept = [g.table.nbytes for g in self._groups.values() if g.table is not None]
            while sum(kept) > KEPT and len(self._groups) > 1:
                self._groups.popitem(last=False)
                kept = [g.table.nbytes for g in self._groups.values() if g.table is not None]
        return group


class _Group:
    """Images and captions of a row group, once they are read."""

    def __init__(self):
        self.lock = threading.Lock()
        self.table: Any = None  # pyarrow.Table

    def row(self, number: int) -> dict[str, Any]:
        return self.table.slice(number, 1).to_pylist()[0]


class _Table:
    """A parquet file whose columns for images and captions have been found."""

    def __init__(self, reader: Reader, file: Found):
        """ValueError for what is no parquet file, or has no images."""
        import pyarrow
        import pyarrow.parquet

        opened = pyarrow.PythonFile(_File(reader, file), "r")
        self.file = pyarrow.parquet.ParquetFile(opened, pre_buffer=True)
        schema = self.file.schema_arrow
        types = pyarrow.types

        def binary(kind: pyarrow.DataType) -> bool:
            return types.is_binary(kind) or types.is_large_binary(kind)

        def inside(kind: pyarrow.DataType) -> bool:
            """Whether it is {bytes, path}, as Hugging Face stores images."""
            place = kind.get_field_index("bytes") if types.is_struct(kind) else -1
            return place >= 0 and binary(kind.field(place).type)

        structs = [f.name for f in schema if inside(f.type)]
        plain = [f.name for f in schema if f.name in IMAGES and binary(f.type)]
        named = [name for name in IMAGES if name in structs + plain]
        if not named and len(structs) != 1:
            raise ValueError(
                f"has the columns {', '.join(schema.names)}; expected one with images: bytes, or"
                f" {{bytes, path}}, called {' or '.join(IMAGES)}"
            )
        self.image = (named or structs)[0]
        self.nested = self.image in structs
        self.captions = [name for name in captions.FIELDS if name in schema.names]
        numbers = [f.name for f in schema if types.is_integer(f.type)]
        self.sizes = [name for name in SIZES if name in numbers]

    def columns(self, number: int, names: list[str]) -> Any:
        """Columns of a row group, without the path of an image."""
        return self.file.read_row_group(number, columns=names, use_threads=False)

    def images(self, table: Any) -> Any:
        """The bytes of images, a chunked array."""
        image = self.image
        return table.flatten().column(f"{image}.bytes") if self.nested else table.column(image)

    def group(self, number: int) -> Any:
        """Images as "bytes", and captions."""
        own = f"{self.image}.bytes" if self.nested else self.image
        table = self.columns(number, [own, *self.captions])
        images = self.images(table)
        return table.drop_columns([self.image]).append_column("bytes", images)


class _File(io.RawIOBase):
    """A file of a store as Python's own, for Arrow."""

    def __init__(self, reader: Reader, file: Found):
        self.reader, self.file, self.at = reader, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.file.size)[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.file.size - self.at)
        data = self.reader.read(self.file, self.at, left if size < 0 else min(size, left))
        self.at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def has_images(file: Found) -> bool:
    """Whether a parquet file has a column of images; those that img2dataset writes have none."""
    try:
        _Table(Reader(), file)
    except ConfigError:  # of no file's
        raise
    except (ValueError, OSError, Changed):
        return False
    return True


def scan(file: Found) -> Scanned:
    """The rows of one file that have an image."""
    problems, found, contents = Problems(), list[tuple[int, int, int, int]](), hashlib.sha256()
    try:
        table = _Table(Reader(), file)
        contents.update(str(table.file.metadata.to_dict()).encode())
        for number in range(table.file.num_row_groups):
            _scan_group(table, number, file, problems, found)
    except ConfigError:  # of no file's
        raise
    except (ValueError, OSError, Changed) as error:
        problems.add(f"{file.path}: {' '.join(str(error).split())}")
    known = np.array(found, np.int64).reshape(-1, 4)
    columns = {
        "size": known[:, :2].astype(np.int32),
        "group": known[:, 2].astype(np.uint32),
        "row": known[:, 3].astype(np.uint32),
    }
    return Scanned(columns, {}, problems, contents.digest())


def _scan_group(table: _Table, number: int, file: Found, problems: Problems, found: list) -> None:
    metadata = table.file.metadata.row_group(number)
    key = f"{file.path}: {number}"
    if number == 0 and metadata.total_byte_size > LARGE:
        problems.add(
            f"{file.path}: has row groups of {metadata.total_byte_size // 2**20} MiB, and to read"
            " an image its whole group is read: faster if written with row groups of 100 rows",
            0,
        )
    try:
        sizes = list(_sizes(table, number))
    except ConfigError:  # of no file's
        raise
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())
        problems.add(f"{key}: its {metadata.num_rows} rows: {said}", metadata.num_rows)
        return
    for row, size in enumerate(sizes):
        if size is None:
            problems.add(f"{key}, {row}: has no image")
        else:
            found.append((*size, number, row))


def _sizes(table: _Table, number: int) -> Iterator[tuple[int, int] | None]:
    """Height and width of each row's image; None where there is none."""
    if len(table.sizes) == 2:
        known = table.columns(number, table.sizes).to_pylist()
        if all((row[name] or 0) > 0 for row in known for name in SIZES):
            yield from ((row["height"], row["width"]) for row in known)
            return
    own = f"{table.image}.bytes" if table.nested else table.image
    for chunk in table.images(table.columns(number, [own])).chunks:
        for value in chunk:
            data = value.as_buffer() if value.is_valid else None
            if not data:
                yield None
                continue
            view = memoryview(data)
            yield image_size(b"", lambda start, size, of=view: bytes(of[start : start + size]))
