"""Endless batches of samples that are read one by one, some of which cannot be used."""

import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import grain.python as grain
import numpy as np
from absl import flags
from jaxtyping import Int

from d2m_jax import hosts
from d2m_jax.config import ConfigError, check
from d2m_jax.data.buckets import Rows, Schedule, Size
from d2m_jax.data.sources.any_source import BadSample
from d2m_jax.keys import named_generator

T = TypeVar("T")

TRIES = 100  # samples that are drawn for a place, until one is not bad
TOLD = 10  # bad samples that are named; the others are counted
ENDLESS = 2**40  # batches
READ_AHEAD = 8  # batches
THREADS = 4


class Bad:
    """The samples that could not be used, each counted once; of many processes each counts its
    own."""

    def __init__(self, most: int, where: str):
        self.most, self.where = most, where  # the field of the config that says how many may be
        self._keys: dict[str, None] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def told(self) -> list[str]:
        """What was wrong with each."""
        return list(self._keys)

    def add(self, error: BadSample) -> None:
        """Name it on stderr, if it is one of the first. ConfigError when they are too many."""
        with self._lock:
            known = str(error) in self._keys
            # Threads that read ahead may find further ones: those are not asked for any more.
            if len(self._keys) <= self.most:
                self._keys[str(error)] = None
            count = len(self._keys)
        if count > self.most:
            raise ConfigError(
                f"{error}; {count} samples cannot be used, expected at most {self.where} ="
                f" {self.most}"
            )
        if not known and count <= TOLD:
            more = "; further ones are counted, not named" if count == TOLD else ""
            print(f"left out: {error}{more}", file=sys.stderr, flush=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most, "where": self.where}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class _NoneUsable(Exception):
    """No sample of a bucket can be used, as far as was tried; the message is for people."""


class Batches(Generic[T]):
    """A grain source whose elements are the batches of a schedule, of which `rows` are made.

    `read(entry, bucket)` gives a sample or raises BadSample; another of its bucket takes its place,
    which follows from seed and place alone. `make(samples, rows)` makes the batch; `sizes` are
    those of the buckets.

    Where no sample of a bucket can be used, a batch of another takes its place. Of many processes
    each reads rows of its own, so that one may find a sample where another finds none: there it is
    a ConfigError, as batches of two sizes would wait for each other for ever.
    """

    def __init__(
        self,
        schedule: Schedule,
        rows: slice,
        read: Callable[[int, int], T],
        make: Callable[[list[T], Rows], dict[str, Any]],
        bad: Bad,
        sizes: Sequence[Size],
    ):
        self.schedule, self.rows, self.read, self.make, self.bad = schedule, rows, read, make, bad
        self.sizes, self.alone = sizes, hosts.count() == 1

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, batch: int) -> dict[str, Any]:
        rows, others = self.schedule(batch, self.rows), self.schedule.instead(batch, self.rows)
        while True:
            try:
                samples = [
                    self._sample(int(entry), rows.bucket, int(position))
                    for entry, position in zip(rows.entries, rows.positions, strict=True)
                ]
                return self.make(samples, rows)
            except _NoneUsable as error:
                another = next(others, None) if self.alone else None
                if another is None:
                    raise ConfigError(str(error)) from None
                rows = another

    def _sample(self, entry: int, bucket: int, position: int) -> T:
        other = named_generator(self.schedule.seed, f"{self.schedule.name}/instead/{position}")
        count = sum(len(part.entries) for part in self.schedule.buckets[bucket])
        bad: dict[int, BadSample] = {}
        for _ in range(TRIES):
            if entry not in bad:
                try:
                    return self.read(entry, bucket)
                except BadSample as error:
                    self.bad.add(error)
                    bad[entry] = error
            if len(bad) == count:
                break
            entry = self.schedule.any(bucket, other)
        (height, width), (first, *_) = self.sizes[bucket], bad.values()
        raise _NoneUsable(
            f"{first}; of {count} samples of {height} × {width} pixels {len(bad)} were tried, and"
            " none can be used; expected one that can: mend them, or take them out of the data"
        )


class Endless:
    """Batches made ahead (data/protocol.py, Batches). Their state knows the data: where they go on
    in others, that is told, as the batches that follow are others too."""

    def __init__(self, batches: grain.DatasetIterator, fingerprint: str):
        self._batches, self._fingerprint = batches, fingerprint

    def __iter__(self) -> "Endless":
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Where it is, and in what data."""
        return {"position": self._batches.get_state(), "data": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if "position" not in state:  # of a checkpoint from before data were named
            state = {"position": state, "data": self._fingerprint}
        if state["data"] != self._fingerprint:
            hosts.say(
                "the data are not those of the last start: samples came, went, or were written"
                " again; training goes on, but with other batches than it would have had"
            )
        self._batches.set_state(state["position"])


def endless(source: Batches, workers: int, fingerprint: str) -> Endless:
    """Its batches, made ahead: by threads, or by so many processes."""
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=READ_AHEAD)
    elements: Any = source
    dataset = grain.MapDataset.source(elements).to_iter_dataset(options)
    if workers:
        flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for absl's flags
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return Endless(iter(dataset), fingerprint)


def held_out(
    key: Callable[[int], str], entries: Int[np.ndarray, " n"], count: int, found: str, kind: str
) -> Int[np.ndarray, " c"]:
    """The `count` entries whose keys have the least checksums: the same, but for those that leave
    or come, when the data grow. ConfigError where none would be left to train on; `found` says what
    there is, `kind` is the data's config."""
    check(
        len(entries) > count,
        f"{found}, expected more than {kind}.validation = {count}, which never train; where there"
        " are few, give a smaller number (--data.validation 1)",
    )
    if count == 0:
        return entries[:0]
    checksums = np.fromiter(
        (zlib.crc32(key(int(entry)).encode()) for entry in entries), np.uint32, len(entries)
    )
    return entries[np.lexsort((entries, checksums))[:count]]
