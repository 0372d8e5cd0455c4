"""Images of many sizes in batches of one size each: which sizes, and which image in which batch.

Whatever a batch holds follows from the seed and its number alone. So any process can make any
batch, all agree without asking each other, and the state of an iterator is one number.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, Int32

from d2m_jax.config import check
from d2m_jax.keys import named_generator

PARTS = 16  # a bucket's width and height are multiples of about a 16th of its resolution
CHUNK = 1_000_000  # images that are assigned at once

Size = tuple[int, int]  # height and width in pixels


def bucket_sizes(resolution: int, aspect_ratio: float, stride: int) -> tuple[Size, ...]:
    """Heights and widths of about `resolution`² pixels, multiples of `stride`, from the tallest to
    the widest; width over height, or height over width, is at most `aspect_ratio`.

    At 1024, 2.0 and 16 these are 13 sizes from 1408 × 768 to 768 × 1408. ConfigError where tokens
    do not divide the resolution.
    """
    check(
        resolution >= stride and resolution % stride == 0,
        f"ImagesConfig.resolutions: found {resolution}, expected multiples of {stride}, the pixels"
        " of a token",
    )
    step = max(1, round(resolution / PARTS / stride)) * stride
    found = {(resolution, resolution)}
    for width in range(resolution, math.ceil(resolution * math.sqrt(aspect_ratio)) + step, step):
        height = max(step, round(resolution**2 / width / step) * step)
        if width <= aspect_ratio * height:
            found |= {(height, width), (width, height)}
    return tuple(sorted(found, key=lambda size: size[1] / size[0]))


def all_of(resolutions: Sequence[Sequence[Size]]) -> tuple[Size, ...]:
    """The buckets of several resolutions, each once: near ones may share some."""
    return tuple(dict.fromkeys(size for of_one in resolutions for size in of_one))


def assign(
    sizes: Int32[np.ndarray, "n 2"], resolutions: Sequence[Sequence[Size]]
) -> Int[np.ndarray, " n"]:
    """The bucket of every image, as a number in `all_of(resolutions)`: nearest in aspect ratio, and
    of several resolutions, the smallest first, the largest that does not enlarge the image, or the
    smallest; −1 for images without a size."""
    buckets = all_of(resolutions)
    bucket = np.array(buckets, np.float32)
    aspect, area = np.log(bucket[:, 1] / bucket[:, 0]), bucket.prod(1)
    numbers = [np.array([buckets.index(size) for size in of_one]) for of_one in resolutions]
    # Of equally near ones the smaller.
    by_area = [members[np.argsort(area[members], kind="stable")] for members in numbers]
    result = np.empty(len(sizes), np.int16)
    for start in range(0, len(sizes), CHUNK):
        image = np.maximum(sizes[start : start + CHUNK], 1).astype(np.float32)
        wanted = np.log(image[:, 1] / image[:, 0])[:, None]
        chosen = np.full(len(image), -1)
        for members in by_area:
            nearest = members[np.abs(wanted - aspect[members]).argmin(1)]
            fits = (image >= bucket[nearest]).all(1)
            chosen = np.where(fits | (chosen < 0), nearest, chosen)
        result[start : start + CHUNK] = chosen
    result[(sizes <= 0).any(1)] = -1
    return result


@dataclass(frozen=True)
class Part:
    """Entries that are drawn alike: those of one source in one bucket."""

    entries: Int[np.ndarray, " n"]  # numbers of samples
    weight: float = 1.0  # how often one pass over the data takes each


@dataclass(frozen=True)
class Rows:
    """One batch: its bucket, and the samples of the rows that were asked for."""

    bucket: int
    entries: Int[np.ndarray, " r"]
    positions: Int[np.ndarray, " r"]  # of the rows since the start, for draws of their own


@dataclass(frozen=True)
class Schedule:
    """Endless batches of `size` over buckets, each of which has parts.

    A pass takes every entry `weight` times; nothing is dropped between passes, so that a bucket or
    a whole data set may be smaller than a batch. Buckets take turns in proportion to what a pass
    takes of them, in an order that is drawn anew for each round of about a pass.
    """

    buckets: Sequence[Sequence[Part]]  # one that has no part gives no batch
    size: int
    seed: int
    name: str = "train"
    _orders: dict[str, tuple[int, Int[np.ndarray, " n"]]] = field(default_factory=dict)

    def __call__(self, batch: int, rows: slice = slice(None)) -> Rows:
        """The batch of this number."""
        wanted = self._round_of(batch)
        before, after = self._given(wanted), self._given(wanted + 1)
        turns = np.repeat(np.arange(len(self.buckets)), after - before)
        place = self._order("round", wanted, len(turns))[batch - int(before.sum())]
        bucket = int(turns[place])
        number = before[bucket] + place - int((after - before)[:bucket].sum())
        within = np.arange(self.size)[rows] + int(number) * self.size
        positions = np.arange(self.size)[rows] + batch * self.size
        return Rows(bucket, self._stream(bucket, within), positions)

    def instead(self, batch: int, rows: slice = slice(None)) -> Iterator[Rows]:
        """What can take the place of a batch in whose bucket no sample can be used: one of every
        other bucket, in an order that follows from seed and number as all else does."""
        own, of_pass = self(batch, slice(0)).bucket, self._passes()
        of_pass[own] = 0
        generator = named_generator(self.seed, f"{self.name}/instead of batch/{batch}")
        positions = np.arange(self.size)[rows] + batch * self.size
        while of_pass.sum() > 0:
            bucket = int(generator.choice(len(of_pass), p=of_pass / of_pass.sum()))
            of_pass[bucket] = 0
            entries = np.array([self.any(bucket, generator) for _ in range(self.size)])
            yield Rows(bucket, entries[rows], positions)

    def any(self, bucket: int, generator: np.random.Generator) -> int:
        """One of the samples of a bucket."""
        part = self.buckets[bucket][int(generator.integers(len(self.buckets[bucket])))]
        return int(part.entries[generator.integers(len(part.entries))])

    def _of_pass(self, bucket: int) -> Float[np.ndarray, " parts"]:
        return np.array([part.weight * len(part.entries) for part in self.buckets[bucket]])

    def _passes(self) -> Float[np.ndarray, " buckets"]:
        """Entries that a pass takes of each bucket."""
        return np.array([self._of_pass(bucket).sum() for bucket in range(len(self.buckets))])

    def _given(self, rounds: int) -> Int[np.ndarray, " buckets"]:
        """How many batches each bucket gave in so many rounds."""
        return np.floor(rounds * self._passes() / self.size).astype(np.int64)

    def _round_of(self, batch: int) -> int:
        """The round that a batch is in."""
        low, high = 0, 1
        while self._given(high).sum() <= batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._given(middle).sum() > batch else (middle, high)
        return low

    def _stream(self, bucket: int, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r"]:
        """Entries of a bucket's endless stream: pass after pass, its parts mixed."""
        of_pass, found = self._of_pass(bucket), np.empty(len(rows), np.int64)

        def taken(passes: int) -> Int[np.ndarray, " parts"]:
            return np.floor(passes * of_pass).astype(np.int64)

        done = 0
        while done < len(rows):
            row = int(rows[done])
            number = int(row // of_pass.sum())  # of its pass, but for what was rounded
            while taken(number).sum() > row:
                number -= 1
            while taken(number + 1).sum() <= row:
                number += 1
            before, after = taken(number), taken(number + 1)
            here = rows[done:][rows[done:] < after.sum()] - before.sum()
            order = self._order(f"{bucket}", number, int((after - before).sum()))[here]
            ends = np.cumsum(after - before)
            part = np.searchsorted(ends, order, side="right")
            for i in np.unique(part):
                mine = part == i
                places = order[mine] - (ends[i] - (after - before)[i]) + before[i]
                found[done : done + len(here)][mine] = self._part(bucket, int(i), places)
            done += len(here)
        return found

    def _part(self, bucket: int, i: int, places: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r"]:
        """Entries of a part's endless stream: all of them, again and again, each time in another
        order."""
        entries = self.buckets[bucket][i].entries
        found = np.empty(len(places), np.int64)
        for again in np.unique(places // len(entries)):
            mine = places // len(entries) == again
            order = self._order(f"{bucket}/{i}", int(again), len(entries))
            found[mine] = entries[order[places[mine] % len(entries)]]
        return found

    def _order(self, name: str, number: int, count: int) -> Int[np.ndarray, " n"]:
        """A permutation; the one that was asked for last is kept by name."""
        kept = self._orders.get(name)
        if kept is None or kept[0] != number:
            generator = named_generator(self.seed, f"{self.name}/{name}/{number}")
            order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
            generator.shuffle(order)
            kept = self._orders[name] = number, order
        return kept[1]
