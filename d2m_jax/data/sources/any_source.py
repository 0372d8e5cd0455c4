"""What a source of captioned images can do, wherever it keeps them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True)
class Sample:
    """One captioned image as it is stored."""

    key: str  # names it in messages and is unique in its source: "00000.tar: 000001234"
    image: bytes  # an encoded file: JPEG, PNG, WebP, …; not yet known to be whole
    captions: tuple[str, ...]  # one or several, none of them blank; () where none is there


class BadSample(Exception):
    """One sample cannot be used; the message is "KEY: what was found". Who reads a data set counts
    it and goes on."""


@runtime_checkable
class Source(Protocol):
    """Captioned images by number: the same in every process, for many threads at once. It can be
    pickled, which costs next to nothing: what is large stays on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """BadSample where it cannot be used; ConfigError where its store does not answer."""
        ...

    def key(self, index: int) -> str:
        """That of a sample, without reading it."""
        ...

    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Height and width in pixels of every image as it is displayed, its EXIF orientation
        applied; 0 0 where its header cannot be read."""
        ...

    def fingerprint(self) -> str:
        """Another one when the samples are others, or stored otherwise."""
        ...
