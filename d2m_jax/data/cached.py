"""A cache of encoded samples as data: nothing of it needs text encoders or an autoencoder."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from d2m_jax.config import (
    AutoencoderConfig,
    CacheConfig,
    ConfigError,
    ModelConfig,
    PixelsConfig,
    check,
    check_same,
)
from d2m_jax.data import preprocessed, records
from d2m_jax.data.batches import Bad, Batches, Endless, endless, held_out
from d2m_jax.data.buckets import Part, Rows, Schedule, Size
from d2m_jax.data.preprocessed import Preprocessed
from d2m_jax.data.prompt_files import prompts_of
from d2m_jax.data.protocol import Asked, Split, Tokenizer
from d2m_jax.data.records import BFLOAT16, Cache, Record
from d2m_jax.data.sources.any_source import BadSample
from d2m_jax.keys import named_generator

LOG_VARIANCE = (-30.0, 20.0)  # within which diffusers and we take it


class Cached:
    """The data of a CacheConfig (data/protocol.py, Data).

    ConfigError where its folder is no cache, is not finished, or was made by other encoders than
    this model's; and where it holds other people's samples, of which this model reads none.
    """

    encoded = True

    def __init__(self, config: CacheConfig, model: ModelConfig):
        self.config, self.model = config, model
        self.bad = Bad(config.max_bad, "CacheConfig.max_bad")  # of all its batches together
        self.cache = stored(config, model)
        if isinstance(self.cache, Cache):
            _check(self.cache, model, config)
        if config.caption_dropout:
            _ = self.cache.empty  # told now where it is not there
        self.shards = self.cache.samples
        runs = self.cache.runs
        self.buckets: tuple[Size, ...] = tuple(sorted({size for size, _ in runs}))
        numbers = [self.buckets.index(size) for size, _ in runs]
        self._bucket_of = np.repeat(np.array(numbers, np.int16), [count for _, count in runs])
        count = len(self._bucket_of)
        found = f"{config.path}: found {count:,} samples"
        self._held_out = held_out(str, np.arange(count), config.validation, found, "CacheConfig")
        if config.prompts is not None:
            prompts_of(Path(config.prompts))  # what is wrong with it is told now

    @property
    def tells_padding(self) -> bool:
        """Older caches, and those of others, do not."""
        ours = isinstance(self.cache, Cache) and len(self.shards) > 0
        return ours and "text_length" in self.shards[0].arrays

    def __len__(self) -> int:
        return len(self._bucket_of)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Those that it holds."""
        return self.buckets

    def fingerprint(self) -> str:
        """Another one when the samples are others."""
        return self.cache.fingerprint

    def vocabulary(self) -> tuple[str, ...]:
        """Every word of its captions."""
        captions = (self.shards[i].facts.get("caption", "") for i in range(len(self)))
        words = {word for caption in captions for word in caption.split()}
        return tuple(sorted(words))

    def batches(
        self,
        tokenizer: Tokenizer,
        size: int,
        seed: int = 0,
        split: Split = "train",
        rows: slice = slice(None),
    ) -> Endless:
        """Endless encoded batches, each of one height and width; the tokenizer is not asked."""
        parts, train = self._parts(split), split == "train"
        entries = sum(len(part.entries) for mine in parts for part in mine)
        check(
            entries > 0, f"CacheConfig.validation = {entries}: expected at least 1 to validate on"
        )
        empty = self.cache.empty if train and self.config.caption_dropout else None
        make = functools.partial(_encoded, self.config, self.model, empty, seed)
        schedule = Schedule(parts, size, seed, split)
        source = Batches(schedule, rows, self._read, make, self.bad, self.buckets)
        return endless(source, self.config.workers, self.fingerprint())

    def prompts(self, count: int, held_out: bool = False) -> Sequence[Asked]:
        """Those of the file, or captions of what never trains, if it has any."""
        if self.config.prompts is not None:
            return [Asked(prompt) for prompt in prompts_of(Path(self.config.prompts))[:count]]
        facts = (self.shards[int(i)].facts for i in self._held_out[:count])
        return [Asked(one["caption"]) for one in facts if "caption" in one]

    def _read(self, entry: int, bucket: int) -> Record:
        try:
            return self.shards[entry]
        except ConfigError:  # of no record's
            raise
        except (ValueError, OSError, RuntimeError) as error:
            raise BadSample(f"{self.config.path}, record {entry}: {error}") from None

    def _parts(self, split: Split) -> list[list[Part]]:
        validation = np.zeros(len(self), bool)
        validation[self._held_out] = True
        mine = np.where(validation == (split != "train"), self._bucket_of, -1)
        found = [np.flatnonzero(mine == bucket) for bucket in range(len(self.buckets))]
        return [[Part(entries)] if len(entries) else [] for entries in found]


def is_there(folder: Path) -> bool:
    """Whether a folder has samples already."""
    return (folder / records.FILE).is_file() or preprocessed.is_there(folder)


def stored(config: CacheConfig, model: ModelConfig) -> Cache | Preprocessed:
    """The samples in a folder, of a kind that is recognised by what is there."""
    folder = Path(config.path)
    if not (folder / records.FILE).is_file() and preprocessed.is_there(folder):
        return Preprocessed(config, model)
    return records.open_cache(folder)


def _check(cache: Cache, model: ModelConfig, config: CacheConfig) -> None:
    made, mine = cache.made, records.model_facts(model)
    if mine["encoders"] is None:  # a transformer alone: sizes must fit
        mine["encoders"] = made["encoders"]
    found = {name: made.get(name) for name in mine}
    hint = "the cache was made by other encoders; make one for this model"
    check_same(found, mine, cache.folder / records.FILE, hint)
    length = made["text_length"]
    check(
        length <= model.text.length,
        f"{cache.folder / records.FILE}: text_length = {length}, the model reads"
        f" {model.text.length}",
    )
    if config.latents == "sampled" and len(cache.samples):
        whole = "logvar" in cache.samples[0].arrays
        check(
            whole, f"CacheConfig.latents = sampled: {config.path} holds means alone, expected mean"
        )


def _encoded(
    config: CacheConfig,
    model: ModelConfig,
    empty: Record | None,
    seed: int,
    samples: list[Record],
    rows: Rows,
) -> dict[str, Any]:
    """A batch of records; `empty`, of those that train, takes the place of captions left out."""
    made: dict[str, list[np.ndarray]] = {}
    for record, position in zip(samples, rows.positions, strict=True):
        draw = named_generator(seed, f"cached/{position}")
        dropped = draw.random() < config.caption_dropout
        text = (empty if dropped and empty is not None else record).arrays
        values: dict[str, Any] = {
            "latents": _latents(config, model, record, draw),
            "txt": _padded(text["txt"], model.text.length),
            "y": text["y"],
        }
        if "text_length" in text:
            values["text_length"] = text["text_length"]
        if "noisy" in record.arrays:  # points of a teacher's path, of which one is drawn
            point = int(draw.integers(len(record.arrays["noisy"])))
            values["noisy"] = record.arrays["noisy"][point].astype(np.float32)
            values["time"] = record.arrays["time"][point]
            values["guidance"] = np.float32(record.facts["guidance"])
        if "eighth" in record.facts:  # of the way to noise, at which it validates
            values["eighth"] = np.int32(record.facts["eighth"])
        for name, value in values.items():
            made.setdefault(name, []).append(np.asarray(value))
    return {name: np.stack(values) for name, values in made.items()}


def _latents(
    config: CacheConfig, model: ModelConfig, record: Record, draw: np.random.Generator
) -> Float[np.ndarray, "rows columns k"]:
    arrays, image = record.arrays, model.image
    if "latents" in arrays:  # a teacher's own
        return arrays["latents"].astype(np.float32)
    if isinstance(image, PixelsConfig):
        return packed(arrays["image"].astype(np.float32) / 127.5 - 1, image.patch)
    assert isinstance(image, AutoencoderConfig)
    latent = arrays["mean"].astype(np.float32)
    if config.latents == "sampled":
        deviation = np.exp(0.5 * arrays["logvar"].astype(np.float32).clip(*LOG_VARIANCE))
        latent = latent + deviation * draw.standard_normal(latent.shape, np.float32)
    return packed((latent - image.shift_factor) * image.scaling_factor, 2)


def packed(image: Float[np.ndarray, "H W c"], patch: int) -> Float[np.ndarray, "rows columns k"]:
    """As flow.pack has it: channels outermost within a token."""
    height, width, channels = image.shape
    rows, columns = height // patch, width // patch
    parts = image.reshape(rows, patch, columns, patch, channels)
    return parts.transpose(0, 2, 4, 1, 3).reshape(rows, columns, channels * patch * patch)


def _padded(txt: np.ndarray, length: int) -> np.ndarray:
    """Features of padding that were not kept are zeros."""
    return np.concatenate([txt, np.zeros((length - len(txt), txt.shape[1]), BFLOAT16)])
