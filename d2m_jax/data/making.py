"""How a cache is made: shard after shard, by all processes, from where an earlier start stopped."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from d2m_jax import hosts
from d2m_jax.config import PromptsConfig
from d2m_jax.data import records
from d2m_jax.data.buckets import Size
from d2m_jax.data.records import BFLOAT16, Record, shard_name, write_shard
from d2m_jax.encoders import Encoders
from d2m_jax.output import full_disk
from d2m_jax.progress import bar
from d2m_jax.sharding import batch_shards, local_mesh, put_batch
from d2m_jax.tokenizers import Tokenizers

# Bytes of a shard, about: what is lost at most when a process is killed takes a minute or two.
SHARD = 500_000_000
KEPT = "the shards that were finished are kept, and the same command goes on from there"


@dataclass(frozen=True)
class Shard:
    """What one shard is made of: samples of one height and width, by their numbers."""

    name: str
    size: Size
    items: Int[np.ndarray, " n"]


def cut(items: dict[Size, Int[np.ndarray, " n"]], bytes_of: Callable[[Size], int]) -> list[Shard]:
    """Shards of all samples, by size."""
    found = []
    for size, numbers in sorted(items.items()):
        each = max(1, SHARD // bytes_of(size))
        parts = [numbers[start : start + each] for start in range(0, len(numbers), each)]
        found += [Shard(shard_name(size, i), size, part) for i, part in enumerate(parts)]
    return found


def make(
    folder: Path,
    made: dict[str, Any],
    shards: Sequence[Shard],
    empty: Callable[[], Record],
    records_of: Callable[[Shard, Callable[[int], None]], Iterator[Record]],
    what: str,
) -> dict[str, int]:
    """Make the shards that are not there yet, this process every n-th of them; records by shard.

    `records_of(shard, advance)` gives the records of one, and tells `advance` how many of its items
    are done. ConfigError where the folder holds something else (records.begin), and where the disk
    fills.
    """
    hosts.by_first(lambda: records.begin(folder, made))
    if hosts.first() and not (folder / records.EMPTY).exists():
        write_shard(folder / records.EMPTY, [empty()])
    mine = shards[jax.process_index() :: jax.process_count()]
    left = [shard for shard in mine if not (folder / shard.name).exists()]
    total = sum(len(shard.items) for shard in left)
    if len(left) < len(mine):
        hosts.say(f"{folder}: {len(mine) - len(left)} of {len(mine)} shards are there already")
    progress = bar(total, what, "images", "compiling …") if total else _nothing()
    with full_disk(folder, KEPT), progress as advance:
        for shard in left:
            write_shard(folder / shard.name, records_of(shard, advance))
    hosts.barrier("cache")
    counts = hosts.by_first(lambda: _counts(folder, shards))
    if hosts.first():
        records.finish(folder, counts)
    return counts


@contextlib.contextmanager
def _nothing() -> Iterator[Callable[[int], None]]:
    yield lambda count: None


def _counts(folder: Path, shards: Sequence[Shard]) -> dict[str, int]:
    from array_record.python.array_record_module import ArrayRecordReader

    counts = {}
    for shard in shards:
        reader = ArrayRecordReader(str(folder / shard.name))
        counts[shard.name] = reader.num_records()
        reader.close()
    return counts


def placed(mesh: Mesh, batch: Any) -> Any:
    """On the devices of this process, cut over them where they divide the batch."""
    count = len(jax.tree.leaves(batch)[0])
    return put_batch(mesh, batch) if count % batch_shards(mesh) == 0 else batch


class TextFeatures:
    """Captions as a cache holds them: features in bfloat16, those of padding kept or not."""

    def __init__(self, encoders: Encoders, padding: str):
        self.encoders, self.padding = encoders, padding

    def __call__(self, captions: list[str]) -> list[dict[str, np.ndarray]]:
        """`txt` [l, e], `y` [v] and `text_length` [], how much is no padding, of each."""
        tokenizer = self.encoders.tokenizer
        ids = tokenizer.ids(captions)
        mesh = local_mesh()
        with jax.set_mesh(mesh):
            features = self.encoders.text(placed(mesh, ids))
        txt, y = (np.asarray(a).astype(BFLOAT16) for a in features)
        if isinstance(tokenizer, Tokenizers):
            assert isinstance(ids, dict)  # which is what Tokenizers gives
            lengths, dropped = tokenizer.lengths(ids), self.padding == "drop"
        else:
            lengths, dropped = (np.asarray(ids) != tokenizer.padding).sum(1), False
        kept = [t[:length] if dropped else t for t, length in zip(txt, lengths, strict=True)]
        return [
            {"txt": t, "y": one, "text_length": np.asarray(length, np.int32)}
            for t, one, length in zip(kept, y, lengths, strict=True)
        ]

    def bytes(self) -> int:
        """Of the features of one caption, at most."""
        text, transformer = self.encoders.config.text, self.encoders.config.transformer
        kept = text.length if self.padding == "keep" or not isinstance(text, PromptsConfig) else 128
        return 2 * (kept * transformer.context_in_dim + transformer.vec_in_dim)


def name_bad(folder: Path, lines: Sequence[str]) -> int:
    """Name what was left out, in a file of this process beside the shards, each once; how many it
    names, of earlier starts too."""
    file = folder / f"left_out.{jax.process_index()}.txt"
    known = file.read_text().splitlines() if file.exists() else []
    new = [line for line in lines if line not in known]
    if new:
        with file.open("a") as opened:
            opened.writelines(f"{line}\n" for line in new)
    return len(known) + len(new)
