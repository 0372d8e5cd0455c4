"""ArrayRecord files whose records are serialised tf.train.Example, as TFDS and MaxText write them.

Features: an encoded image, and a caption or several. TensorFlow is not needed: an Example is three
levels of lists with length and tag, which are read here.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from d2m_jax.config import ConfigError
from d2m_jax.data.sources import captions
from d2m_jax.data.sources.any_source import BadSample, Sample
from d2m_jax.data.sources.image_size import image_size
from d2m_jax.data.sources.index import Index, Problems, Scanned
from d2m_jax.data.sources.indexed import Indexed
from d2m_jax.data.sources.stores import Found, Kept, Opened, is_remote, look
from d2m_jax.texts import printable

IMAGES = ("image", "image/encoded", "jpg", "jpeg", "png", "webp", "img")  # names of the feature
AT_ONCE = 64  # records that are read at once while a file is indexed


class ArrayRecords(Indexed):
    """Records of many files. Column: "record" of its file, uint32 [n]."""

    def __init__(self, index: Index, base: str):
        super().__init__(index, base)
        self._kept: Kept[str, Any] = Kept(open_records)

    def name(self, part: int, index: int) -> str:
        """The record's number."""
        return str(int(self.index.columns["record"][index]))

    def __getitem__(self, index: int) -> Sample:
        key, part = self.key(index), self.index.part(index)
        file = self.files[part]
        try:
            if look(file.path).stamp != file.stamp:
                raise BadSample(f"{key}: {printable(file.path)} has changed since it was indexed")
            (record,) = self._kept(file.path).read([int(self.index.columns["record"][index])])
            found = features(record)
        except ConfigError:  # of no sample's
            raise
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            raise BadSample(f"{key}: {_line(error)}") from None
        return Sample(key, _image(found), _captions(key, found))


def scan(file: Found) -> Scanned:
    """The records of one file that have an image."""
    problems, contents = Problems(), hashlib.sha256()
    sizes, records = list[tuple[int, int]](), list[int]()
    try:
        reader = open_records(file.path)
        for number, record in _records(reader):
            try:
                if isinstance(record, Exception):
                    raise record
                contents.update(f"{len(record)} ".encode() + record[:512])
                image = _image(features(record))
            except (ValueError, RuntimeError) as error:
                problems.add(f"{file.path}: {number}: {_line(error)}")
                continue
            sizes.append(image_size(image, lambda start, size, of=image: of[start : start + size]))
            records.append(number)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        problems.add(f"{file.path}: {_line(error)}")
    columns = {
        "size": np.array(sizes, np.int32).reshape(-1, 2),
        "record": np.array(records, np.uint32),
    }
    return Scanned(columns, {}, problems, contents.digest())


def open_records(path: str) -> Any:
    """A reader of an ArrayRecord file, for many threads at once, which closes it when nobody holds
    it any more. ValueError for what is none, ConfigError where too many files are open."""
    import array_record.python.array_record_module as module

    if is_remote(path):
        raise ConfigError(
            f"{path}: ArrayRecord files are read from a disk only, expected a local path"
        )
    # What is best for reading here and there.
    options = "readahead_buffer_size:0,max_parallelism:0"
    reader = module.ArrayRecordReader(path, options=options)
    if not reader.ok():
        Opened(path)  # says what the reader does not: that it is not there, that too many are open
        raise ValueError("is no ArrayRecord file, or is cut off")
    return reader


def _records(reader: Any) -> Iterator[tuple[int, bytes | Exception]]:
    """All records in their order, or what is wrong with one."""
    for start in range(0, reader.num_records(), AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, reader.num_records()))
        try:
            yield from zip(numbers, reader.read(numbers.start, numbers.stop), strict=True)
        except RuntimeError:  # of one of them
            for number in numbers:
                try:
                    yield number, reader.read([number])[0]
                except RuntimeError as error:
                    yield number, error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _image(found: dict[str, list[bytes]]) -> bytes:
    for name in IMAGES:
        if any(found.get(name, [])[:1]):
            return found[name][0]
    raise ValueError(
        f"has the features {', '.join(found) or 'none'}; expected an encoded image:"
        f" {' or '.join(IMAGES)}"
    )


def _captions(key: str, found: dict[str, list[bytes]]) -> tuple[str, ...]:
    texts = {name: found[name] for name in captions.FIELDS if name in found}
    try:
        fields = {name: [text.decode() for text in held] for name, held in texts.items()}
    except UnicodeDecodeError as error:
        raise BadSample(f"{key}: its caption is no UTF-8: {error.reason}") from None
    return captions.from_fields(key, fields)


def features(record: bytes) -> dict[str, list[bytes]]:
    """The features of a serialised tf.train.Example that are bytes; of numbers an empty list.

    ValueError for what is none. Its form: message Example { Features features = 1; }, Features {
    map<string, Feature> feature = 1; }, Feature { BytesList bytes_list = 1; … }, BytesList {
    repeated bytes value = 1; }; tensorflow/core/example/{example,feature}.proto.
    """
    found = {}
    for holder in _fields(record, 1):
        for entry in _fields(holder, 1):
            name = next(_fields(entry, 1), b"").decode()
            feature = next(_fields(entry, 2), b"")
            found[name] = [v for values in _fields(feature, 1) for v in _fields(values, 1)]
    return found


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The values of a field of a protocol buffer that have a length; others are passed over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("is no tf.train.Example")
            if tag >> 3 == wanted:
                yield message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("is no tf.train.Example")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("is no tf.train.Example")
