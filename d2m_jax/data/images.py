"""Captioned images from disk or from an object store, decoded while training goes on."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from d2m_jax import hosts
from d2m_jax.config import ImagesConfig, check, listed
from d2m_jax.data.batches import Bad, Batches, Endless, endless, held_out
from d2m_jax.data.buckets import Part, Rows, Schedule, Size, all_of, assign, bucket_sizes
from d2m_jax.data.decode import Crop, Undecodable, decode
from d2m_jax.data.prompt_files import prompts_of
from d2m_jax.data.protocol import Asked, Canvas, Split, Tokenizer
from d2m_jax.data.sources.any_source import BadSample, Source
from d2m_jax.data.sources.open import open_source
from d2m_jax.keys import named_generator
from d2m_jax.progress import bar

MOST_WORDS = 100_000  # of a vocabulary


@dataclass(frozen=True)
class Example:
    """A sample as it trains."""

    key: str
    pixels: UInt8[np.ndarray, "h w 3"]
    captions: tuple[str, ...]  # in the template
    original: Size
    crop: Crop


class Images:
    """The data of an ImagesConfig (data/protocol.py, Data). All processes of a run must open it."""

    encoded = False
    tells_padding = True

    def __init__(self, config: ImagesConfig, image: Canvas):
        self.config = config
        self.bad = Bad(config.max_bad, "ImagesConfig.max_bad")  # of all its batches together
        self.sources: list[Source] = [
            open_source(path, config.index, config.max_bad) for path in config.sources
        ]
        self._starts = np.cumsum([0, *map(len, self.sources)])
        resolutions = [
            bucket_sizes(resolution, config.aspect_ratio, image.stride)
            for resolution in sorted(set(config.resolutions))
        ]
        self.buckets = all_of(resolutions)
        sizes = np.concatenate([s.sizes() for s in self.sources])
        self._bucket_of = assign(sizes, resolutions)
        usable = np.flatnonzero(self._bucket_of >= 0)
        found = f"{', '.join(config.sources)}: found {len(usable):,} images"
        self._held_out = held_out(self.key, usable, config.validation, found, "ImagesConfig")
        shown = [f"{height} × {width}" for height, width in self.sizes]
        several = ", each compiled by itself (aspect_ratio = 1 leaves one)" if shown[1:] else ""
        validate = f"{config.validation} of them to validate on"
        hosts.say(f"{found}, {validate}; sizes in pixels: {listed(shown)}{several}")
        smaller = sizes[usable] < np.array(self.buckets)[self._bucket_of[usable]]
        if enlarged := int(smaller.any(1).sum()):
            hosts.say(
                f"{enlarged:,} of them are smaller than the smallest of ImagesConfig.resolutions ="
                f" {tuple(sorted(config.resolutions))} and are enlarged"
            )
        if config.prompts is not None:
            prompts_of(Path(config.prompts))  # what is wrong with it is told now

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Those of the buckets that have images."""
        return tuple(self.buckets[i] for i in np.unique(self._bucket_of[self._bucket_of >= 0]))

    def fingerprint(self) -> str:
        """Another one when the images are others."""
        return "/".join(source.fingerprint() for source in self.sources)

    def key(self, entry: int) -> str:
        """That of a sample."""
        source, index = self._place(entry)
        return self.sources[source].key(index)

    def entries(self) -> dict[Size, Int[np.ndarray, " n"]]:
        """All samples of every size, in the order of their sources."""
        return {
            self.buckets[i]: np.flatnonzero(self._bucket_of == i)
            for i in np.unique(self._bucket_of[self._bucket_of >= 0])
        }

    def read(self, entry: int, size: Size) -> Example:
        """A sample at this size. BadSample where it cannot be used."""
        config, (source, index) = self.config, self._place(entry)
        sample = self.sources[source][index]
        if not sample.captions:
            raise BadSample(f"{sample.key}: no caption")
        try:
            decoded = decode(sample.image, size, config.background, config.max_pixels)
        except Undecodable as error:
            raise BadSample(f"{sample.key}: {error}") from None
        captions = tuple(config.template.replace("{caption}", c) for c in sample.captions)
        return Example(sample.key, decoded.pixels, captions, decoded.original, decoded.crop)

    def _read(self, entry: int, bucket: int) -> Example:
        return self.read(entry, self.buckets[bucket])

    def vocabulary(self) -> tuple[str, ...]:
        """Every word of its captions, in small letters: each is read. ConfigError for too many."""
        words: set[str] = set()
        usable = np.flatnonzero(self._bucket_of >= 0)
        with bar(len(usable), "reading captions", "samples") as advance:
            for entry in usable:
                source, index = self._place(int(entry))
                try:
                    captions = self.sources[source][index].captions
                except BadSample:  # told when it is to train
                    captions = ()
                for caption in captions:
                    words |= set(self.config.template.replace("{caption}", caption).lower().split())
                check(
                    len(words) <= MOST_WORDS,
                    f"{', '.join(self.config.sources)}: found more than {MOST_WORDS:,} words in"
                    " captions, expected fewer: WordsConfig has a vector for each",
                )
                advance(1)
        return tuple(sorted(words))

    def batches(
        self,
        tokenizer: Tokenizer,
        size: int,
        seed: int = 0,
        split: Split = "train",
        rows: slice = slice(None),
    ) -> Endless:
        """Endless batches, each of one bucket. Captions of several are drawn, and left out as
        often as the config says; those that never train are always the first, and whole."""
        parts, train = self._parts(split), split == "train"
        entries = sum(len(part.entries) for mine in parts for part in mine)
        check(
            entries > 0, f"ImagesConfig.validation = {entries}: expected at least 1 to validate on"
        )
        make = functools.partial(_raw, self.config, tokenizer, seed, train)
        schedule = Schedule(parts, size, seed, split)
        source = Batches(schedule, rows, self._read, make, self.bad, self.buckets)
        return endless(source, self.config.workers, self.fingerprint())

    def prompts(self, count: int, held_out: bool = False) -> Sequence[Asked]:
        """Those of the file, or captions of what never trains."""
        if self.config.prompts is not None:
            return [Asked(prompt) for prompt in prompts_of(Path(self.config.prompts))[:count]]
        found: list[Asked] = []
        for entry in self._held_out:
            source, index = self._place(int(entry))
            try:
                captions = self.sources[source][index].captions[:1]
            except BadSample:
                continue
            found += [Asked(self.config.template.replace("{caption}", c)) for c in captions]
            if len(found) >= count:
                break
        return found[:count]

    def _place(self, entry: int) -> tuple[int, int]:
        """Number of the source, and of the sample in it."""
        source = int(np.searchsorted(self._starts, entry, side="right")) - 1
        return source, int(entry - self._starts[source])

    def _parts(self, split: Split) -> list[list[Part]]:
        mine = self._bucket_of.copy()
        if split == "train":
            mine[self._held_out] = -1
        else:
            mine[:] = -1
            mine[self._held_out] = self._bucket_of[self._held_out]
        result: list[list[Part]] = [[] for _ in self.buckets]
        for source, weight in enumerate(self.config.sources.values()):
            start, end = self._starts[source : source + 2]
            order = np.argsort(mine[start:end], kind="stable")
            cuts = np.searchsorted(mine[start:end][order], np.arange(len(self.buckets) + 1))
            for bucket, (low, high) in enumerate(itertools.pairwise(cuts)):
                if high > low:
                    entries = (order[low:high] + start).astype(np.int32)
                    result[bucket].append(Part(entries, weight if split == "train" else 1.0))
        return result


def _raw(
    config: ImagesConfig,
    tokenizer: Tokenizer,
    seed: int,
    train: bool,
    examples: list[Example],
    rows: Rows,
) -> dict[str, Any]:
    captions = []
    for example, position in zip(examples, rows.positions, strict=True):
        caption = example.captions[0]
        if train:
            draw = named_generator(seed, f"caption/{position}")
            caption = example.captions[draw.integers(len(example.captions))]
            caption = "" if draw.random() < config.caption_dropout else caption
        captions.append(caption)
    return {
        "image": np.stack([example.pixels for example in examples]),
        "text": tokenizer.ids(captions),
    }
