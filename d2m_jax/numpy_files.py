"""Arrays that numpy saved, read one at a time.

numpy reads a header with Python's parser. Up to Python 3.11 that parser counts its depth for all
threads together, so that two of them at once may raise SystemError (python/cpython issue 106905).
"""

import io
import threading
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

_ALONE = threading.Lock()


def header(start: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether by columns, and dtype of an array that np.save wrote; `start` is left where
    its values begin. ValueError for what np.save does not write."""
    version = np.lib.format.read_magic(start)
    if version != (1, 0):
        raise ValueError(f"np.save's version {version}")
    with _ALONE:
        return np.lib.format.read_array_header_1_0(start)


def load(file: Path | io.BytesIO) -> Shaped[np.ndarray, "..."]:
    """The array of an .npy file. Errors as np.load's."""
    with _ALONE:
        return np.load(file)


def load_all(file: Path | io.BytesIO) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays of an .npz file by name. Errors as np.load's."""
    with _ALONE, np.load(file) as arrays:
        return dict(arrays)
