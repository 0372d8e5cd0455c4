"""Encoded samples of the FLUX.1 benchmark of MLPerf Training, as its reference keeps them.

A sample is four arrays in bfloat16, each as np.save writes it viewed as uint16: T5's features
[l, e], CLIP's pooled vector [v], mean and log-variance of the latents [c, h, w]. Those to validate
on have a time, k/8. Captions are not kept. A folder beside the samples, `empty_encodings`, holds
the features of the empty caption.

Source: pytorch/torchtitan, branch mlperf-training-flux.1, torchtitan/experiments/flux,
dataset/flux_mlperf.py, scripts/preprocess_flux_dataset.py and scripts/save_empty_encodings.py.
It saves the samples with Hugging Face's `datasets` (arrow.py); NVIDIA makes tars of that folder
(encoded_tars.py).
"""

import functools
import io
import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from d2m_jax import numpy_files
from d2m_jax.config import (
    AutoencoderConfig,
    CacheConfig,
    ConfigError,
    ModelConfig,
    PromptsConfig,
    check,
)
from d2m_jax.data import arrow, encoded_tars
from d2m_jax.data.buckets import Size
from d2m_jax.data.records import BFLOAT16, Record, digest
from d2m_jax.data.sources.any_source import BadSample

AXES = {"t5_encodings": 2, "clip_encodings": 1, "mean": 3, "logvar": 3}  # of the arrays
KEY, TIME = "__key__", "timestep"
EIGHTHS = 8  # times
EMPTY = "empty_encodings"
TRIES = 100  # samples, of which one must be whole
HEADER = 4096  # bytes; np.save writes 128

Shape = tuple[int, ...]


@runtime_checkable
class Rows(Protocol):
    """Samples as they are stored, for many threads and for worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Buffers of the arrays, key and time; None for what is not there. BadSample or ValueError
        where it cannot be read."""
        ...


def is_there(folder: Path) -> bool:
    """Whether a folder holds such samples, or others in the same files."""
    return arrow.is_there(folder) or any(folder.glob("*.tar"))


class Preprocessed:
    """The samples of a folder, all of the same size. All processes of a run must open it.

    ConfigError where they do not fit the model: other widths or channels, a longer text. Which
    encoders made them is written nowhere, and cannot be checked.
    """

    def __init__(self, config: CacheConfig, model: ModelConfig):
        self.folder = folder = Path(config.path)
        self.rows: Rows
        if arrow.is_there(folder):
            self.rows = arrow.Table(folder, tuple(AXES), (KEY, TIME))
        else:
            self.rows = encoded_tars.open_tars(folder, config.index, config.max_bad)
        self.shapes, self.timed = _first(folder, self.rows)
        self.size = _checked(folder, self.shapes, model)

    @property
    def samples(self) -> "Preprocessed":
        """Itself: samples by number."""
        return self

    @property
    def runs(self) -> list[tuple[Size, int]]:
        """Height and width in pixels of so many samples, one after the other."""
        return [(self.size, len(self))]

    @property
    def fingerprint(self) -> str:
        """A digest of how many there are, and of what shapes."""
        return digest([len(self), {name: list(shape) for name, shape in self.shapes.items()}])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """BadSample or ValueError where it is damaged, or of another shape than the first."""
        row = self.rows[index]
        found = {name: _array(row, name) for name in AXES}
        for name, shape in self.shapes.items():
            if found[name].shape != shape:
                raise ValueError(
                    f"{row[KEY]}: {name} has the shape {found[name].shape}, that of the first"
                    f" sample has {shape}"
                )
        facts: dict[str, Any] = {"key": row[KEY]}
        if self.timed:
            if row[TIME] not in range(EIGHTHS):
                raise ValueError(f"{row[KEY]}: {TIME} = {row[TIME]}, expected 0 to {EIGHTHS - 1}")
            facts["eighth"] = row[TIME]
        arrays = {
            "txt": found["t5_encodings"],
            "y": found["clip_encodings"],
            "mean": found["mean"].transpose(1, 2, 0),
            "logvar": found["logvar"].transpose(1, 2, 0),
        }
        return Record(facts, arrays)

    @functools.cached_property
    def empty(self) -> Record:
        """The features of the empty caption. ConfigError where they are not there."""
        places = [place / EMPTY for place in [self.folder, *self.folder.absolute().parents[:2]]]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise ConfigError(
                f"CacheConfig.caption_dropout: none of {', '.join(map(str, places))} is there;"
                " expected t5_empty.npy and clip_empty.npy in one of them"
            )
        arrays = {}
        for name, file, like in (
            ("txt", folder / "t5_empty.npy", "t5_encodings"),
            ("y", folder / "clip_empty.npy", "clip_encodings"),
        ):
            try:
                array = numpy_files.load(file)
            except (OSError, ValueError, EOFError) as error:
                raise ConfigError(f"{file}: cannot be read ({error})") from None
            shape = (1, *self.shapes[like])
            check(array.shape == shape, f"{file}: shape {array.shape}, the samples have {shape}")
            arrays[name] = array[0].astype(BFLOAT16)
        return Record({}, arrays)


def _first(folder: Path, rows: Rows) -> tuple[dict[str, Shape], bool]:
    """The shapes of the first sample that can be read, and whether it has a time."""
    wrong = ""
    for index in range(min(TRIES, len(rows))):
        try:
            row = rows[index]
            return {name: _array(row, name).shape for name in AXES}, row[TIME] is not None
        except (ValueError, BadSample) as error:
            wrong = wrong or f": {error}"
    raise ConfigError(f"{folder}: {len(rows)} samples, found none to read{wrong}")


def _checked(folder: Path, shapes: dict[str, Shape], model: ModelConfig) -> Size:
    """Height and width of the images in pixels, of samples that this model reads."""
    image, transformer = model.image, model.transformer
    if not isinstance(image, AutoencoderConfig) or not isinstance(model.text, PromptsConfig):
        raise ConfigError(
            f"{folder}: holds features of T5, CLIP and an autoencoder, expected a model that has"
            " these"
        )
    (length, width), (pooled,) = shapes["t5_encodings"], shapes["clip_encodings"]
    channels, height, breadth = shapes["mean"]
    for what, found, expected in [
        ("the width of T5's features", width, transformer.context_in_dim),
        ("the width of CLIP's vectors", pooled, transformer.vec_in_dim),
        ("the channels of the latents", channels, image.latent_channels),
        ("the shape of logvar", shapes["logvar"], shapes["mean"]),
    ]:
        check(found == expected, f"{folder}: {what}: found {found}, expected {expected}")
    check(
        length <= model.text.length,
        f"{folder}: the length of T5's features: found {length}, the model reads"
        f" {model.text.length}",
    )
    size = height * image.stride // 2, breadth * image.stride // 2
    try:
        model.grid(*size)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return size


def _array(row: dict[str, Any], name: str) -> Shaped[np.ndarray, "..."]:
    """One array of a sample, where it lies. ValueError for bytes that are something else."""
    try:
        if row[name] is None:
            raise ValueError("nothing")
        data = memoryview(row[name])
        start = io.BytesIO(data[:HEADER])
        shape, by_columns, dtype = numpy_files.header(start)
        if dtype != np.uint16 or len(shape) != AXES[name]:
            raise ValueError(f"{dtype} {shape}")
        found = np.frombuffer(data, dtype, math.prod(shape), start.tell())
        return found.reshape(shape, order="F" if by_columns else "C").view(BFLOAT16)
    except ValueError as error:
        raise ValueError(
            f"{row[KEY]}: {name}: expected {AXES[name]} axes of uint16 from np.save, found {error}"
        ) from None
