"""What all sources share: samples that an index knows, in parts that are read by ranges."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Int32

from d2m_jax.data.sources.any_source import BadSample, Sample
from d2m_jax.data.sources.index import Index
from d2m_jax.data.sources.stores import Changed, Found, Reader
from d2m_jax.texts import printable


class Indexed:
    """The part of a Source (any_source.py) that does not depend on how samples are stored.

    The index has a column "size", int32 [n, 2], and, where rows have names, a packed column "name".
    """

    def __init__(self, index: Index, base: str):
        """`base` is the folder from which the index tells the names of its parts."""
        self.index, self.base = index, base
        self.reader = Reader()

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.index, self.base)

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        """The part's name and the sample's in it."""
        part = self.index.part(index)
        return f"{printable(self.index.parts[part].name)}: {self.name(part, index)}"

    def name(self, part: int, index: int) -> str:
        """What a sample is called in its part: its number there where nothing else is known."""
        if "name" in self.index.columns:
            return self.index.text("name", index).decode(errors="replace")
        return str(index - self.index.starts[part])

    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Height and width of every image."""
        return self.index.columns["size"]

    def fingerprint(self) -> str:
        """Of names, places and sizes of all samples; not of the dates of files."""
        return self.index.fingerprint

    @functools.cached_property
    def files(self) -> list[Found]:
        """The parts as they were when they were indexed."""
        return [Found(f"{self.base}/{p.name}", p.size, p.stamp) for p in self.index.parts]

    def read(self, key: str, file: Found, start: int, size: int) -> bytes:
        """Bytes of a sample. BadSample where they cannot be had."""
        try:
            data = self.reader.read(file, start, size)
        except (Changed, OSError) as error:
            raise BadSample(f"{key}: {printable(file.path)} {_said(error)}") from None
        if len(data) < size:
            raise BadSample(f"{key}: {printable(file.path)} ends within it")
        return data


def _said(error: Any) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return str(error)
