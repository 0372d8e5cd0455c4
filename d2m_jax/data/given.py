"""Data that somebody hands over in Python: batches, a config, a folder, prompts."""

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from d2m_jax import hosts
from d2m_jax.config import CacheConfig, ConfigError, DataConfig, ModelConfig, check
from d2m_jax.data.generate import generate
from d2m_jax.data.protocol import Data, Prompt, Split, Tokenizer
from d2m_jax.data.source import open_data
from d2m_jax.sampling.options import captions_of
from d2m_jax.sampling.pipeline import Pipeline

# A config of data; the folder of a cache; data that are open; batches; prompts, of which the
# teacher makes a cache.
Given = DataConfig | str | Path | Data | Iterable[dict[str, Any]] | Sequence[str]
RAW, ENCODED = {"image", "text"}, {"latents", "txt", "y"}
# What a teacher sampled of prompts, for as long as it is there.
_sampled: weakref.WeakKeyDictionary[Pipeline, dict[tuple[str, ...], Path]]
_sampled = weakref.WeakKeyDictionary()


def opened(given: Given, teacher: Pipeline) -> Data:
    """Whatever is given as Data. ConfigError where it is none, or this teacher cannot read it."""
    if isinstance(given, Data):
        return given
    if isinstance(given, DataConfig):
        return open_data(given, teacher.config)
    if isinstance(given, str | Path):
        return open_data(CacheConfig(path=str(given)), teacher.config)
    check(
        isinstance(given, Iterable),
        f"data: found {type(given).__name__}, expected a config of data, the folder of a cache,"
        " prompts, or an iterable of batches",
    )
    if isinstance(given, Sequence) and given and isinstance(given[0], str):
        return open_data(_cache(teacher, captions_of(given)), teacher.config)
    return Handed(given, teacher.config)


def _cache(teacher: Pipeline, captions: list[str]) -> CacheConfig:
    """What the teacher samples of the prompts, once, in a folder that goes when it does."""
    known, prompts = _sampled.setdefault(teacher, {}), tuple(captions)
    if prompts not in known:
        folder = tempfile.mkdtemp(prefix="d2m_jax_")
        weakref.finalize(teacher, shutil.rmtree, folder, ignore_errors=True)
        generate(teacher, captions, Path(folder) / "cache")
        known[prompts] = Path(folder) / "cache"
    return cache_of(known[prompts], len(prompts))


def cache_of(folder: Path, count: int) -> CacheConfig:
    """The config of a cache of so many samples, an eighth of which never train, but no more than
    usual."""
    usual = CacheConfig(path=str(folder))
    return replace(usual, validation=min(usual.validation, max(1, count // 8)))


class Handed:
    """Data (data/protocol.py) of an iterable of batches, raw or encoded, as its `Batches` says;
    captions may be a list of strings.

    Every batch is taken once, by the calibration or by a step. ConfigError where there is none
    left, and for a batch of other arrays or another number of samples than the first.
    """

    def __init__(self, given: Iterable[Any], model: ModelConfig):
        self.model, batches = model, iter(given)
        first = next(batches, None)
        check(first is not None, "data: expected at least one batch, found none")
        self._first = _checked(first)
        self._left = itertools.chain([self._first], batches)
        self.taken = 0

    @property
    def encoded(self) -> bool:
        """Whether training needs no encoders."""
        return "latents" in self._first

    @property
    def tells_padding(self) -> bool:
        """Of raw batches it is found out."""
        return not self.encoded or "text_length" in self._first

    @property
    def count(self) -> int:
        """Samples in every batch, those of all processes together."""
        return hosts.count() * _count(self._first)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of the first batch."""
        stride = self.model.image.stride if self.encoded else 1
        height, width = self._first["latents" if self.encoded else "image"].shape[1:3]
        return ((height * stride, width * stride),)

    def fingerprint(self) -> str:
        """Unknown: they are taken as they come."""
        return ""

    def vocabulary(self) -> tuple[str, ...]:
        """Unknown."""
        return ()

    def prompts(self, count: int, held_out: bool = False) -> Sequence[Prompt]:
        """Unknown."""
        return ()

    def batches(
        self,
        tokenizer: Tokenizer,
        size: int,
        seed: int = 0,
        split: Split = "train",
        rows: slice = slice(None),
    ) -> "_Left":
        """What is left of them; `size` is their own, and every process is handed its own rows."""
        return _Left(self, tokenizer)

    def take(self) -> dict[str, Any]:
        """The next batch."""
        batch = next(self._left, None)
        check(
            batch is not None,
            f"data: ended after {self.taken} batches, expected one for every step and for all that"
            " measures before it",
        )
        self.taken += 1
        batch = _checked(batch)
        found, first = ((_count(b), sorted(b)) for b in (batch, self._first))
        check(
            found == first,
            f"data: batch {self.taken} has {found[0]} samples of {', '.join(found[1])}, expected"
            f" {first[0]} of {', '.join(first[1])} as in the first",
        )
        return batch


class _Left:
    """Batches; the state is how many were taken, and those are passed over."""

    def __init__(self, data: Handed, tokenizer: Tokenizer):
        self._data, self._tokenizer = data, tokenizer
        self._begin = data.taken

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self._data.take()
        if isinstance(batch.get("text"), list):
            batch = batch | {"text": self._tokenizer.ids(batch["text"])}
        return batch

    def get_state(self) -> dict[str, int]:
        return {"taken": self._data.taken - self._begin}

    def set_state(self, state: dict[str, int]) -> None:
        for _ in range(state["taken"]):
            self._data.take()


def _count(batch: dict[str, Any]) -> int:
    return len(batch["latents" if "latents" in batch else "image"])


def _checked(batch: Any) -> dict[str, Any]:
    """A batch with arrays on the host. ConfigError for what is none."""
    names = set(batch) if isinstance(batch, dict) else {type(batch).__name__}
    if not (names == RAW or names >= ENCODED):
        raise ConfigError(
            f"data: found a batch of {', '.join(sorted(map(str, names)))}; expected image (uint8"
            " [b, H, W, 3]) and text (captions), or latents, txt and y"
        )
    if names == RAW:
        image = np.asarray(batch["image"])
        check(
            image.dtype == np.uint8 and image.ndim == 4 and image.shape[-1] == 3,
            f"data: image is {image.dtype} {list(image.shape)}, expected uint8 [b, H, W, 3]",
        )
        text = batch["text"]
        text = list(text) if isinstance(text, list | tuple) else text
        found = jax.tree.leaves(text)
        count = len(found if isinstance(text, list) else found[0])
        check(count == len(image), f"data: found {count} of text, {len(image)} of image")
        return {"image": image, "text": text}
    return {name: np.asarray(array) for name, array in batch.items()}
