"""Tars as data: an index made of them beside `tar -t`, samples read beside webdataset's own reader.

    pip install webdataset
    python benchmarks/data.py --output data.json

The tars are written by webdataset, as img2dataset does it: photographs (smooth noise with grain, in
JPEG of quality 90), JSON and text. --from reads others; nothing is written there. What is compared
takes turns, the best of --rounds counts, and it reads what the system holds in memory, but for
`from disk`. Per core: by the seconds that all cores spent on it.
"""

import argparse
import contextlib
import io
import itertools
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from timing import finish, parser, table

from d2m_jax.data.decode import decode
from d2m_jax.data.sources.open import open_source

BATCH = 32


def photograph(number: int, side: int) -> bytes:
    """A JPEG that compresses about as a photograph does."""
    draw = np.random.default_rng(number)
    few = draw.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
    smooth = Image.fromarray(few).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth) + draw.normal(0, 6, (side, side, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write(folder: Path, shards: int, each: int, side: int) -> None:
    """Tars of `each` samples."""
    import webdataset

    kept = [photograph(number, side) for number in range(40)]
    folder.mkdir()
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as out:
            for i in range(each):
                key, caption = f"{shard:05d}{i:04d}", "a photograph of something nice, " * 3
                about = {"caption": caption, "key": key, "width": side, "height": side}
                about |= {"url": f"https://example.com/{key}", "status": "success", "exif": "{}"}
                image = kept[(7 * i + shard) % len(kept)]
                out.write({"__key__": key, "jpg": image, "json": about, "txt": caption})
    os.sync()  # what is not yet on disk cannot be forgotten


def spent() -> float:
    """Seconds that this process's cores, and those of processes that it waited for, spent."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def measured(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """The least seconds by the clock and of all cores; the calls take turns. The first round, which
    imports and opens, does not count."""
    best = dict.fromkeys(calls, (float("inf"), float("inf")))
    for again in range(rounds + 1):
        for name, call in calls.items():
            began, used = time.perf_counter(), spent()
            call()
            if again:
                seconds = time.perf_counter() - began, spent() - used
                best[name] = min(best[name][0], seconds[0]), min(best[name][1], seconds[1])
    return best


def forget(files: list[Path]) -> None:
    """Let the system drop what it holds in memory of files."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def index_rows(folder: Path, rounds: int) -> Iterator[dict]:
    """An index beside a listing, of files in memory and on disk."""
    files = sorted(folder.glob("*.tar"))
    size = sum(file.stat().st_size for file in files)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as new:
            open_source(str(folder), new)

    def listing() -> None:
        for file in files:
            subprocess.run(["tar", "-tf", file], check=True, stdout=subprocess.DEVNULL)

    def cold(call: Callable[[], None]) -> Callable[[], None]:
        return lambda: (forget(files), call())[1]

    for where, change in (("in memory", lambda call: call), ("from disk", cold)):
        found = measured({"index": change(ours), "tar -t": change(listing)}, rounds)
        for name, (seconds, used) in found.items():
            yield {
                "what": f"{name}, {where}",
                "GB/s": size / seconds / 1e9,
                "GB/s per core": size / used / 1e9,
                "ratio": found["tar -t"][0] / seconds,
                "ratio per core": found["tar -t"][1] / used,
            }


def read_rows(folder: Path, count: int, side: int, target: int, rounds: int) -> Iterator[dict]:
    """Samples read, and decoded into batches, beside webdataset."""
    import webdataset

    files = [str(file) for file in sorted(folder.glob("*.tar"))]
    source = open_source(str(folder))
    order = np.random.default_rng(0).permutation(len(source))[:count].tolist()
    size = (target, target)

    def ours(decoded: bool) -> None:
        for start in range(0, count, BATCH):
            batch = order[start : start + BATCH]
            samples = [source[i] for i in batch]
            if decoded:
                np.stack([decode(sample.image, size).pixels for sample in samples])

    def shrunk(image: Image.Image) -> np.ndarray:
        small = image.convert("RGB").resize((target, target), Image.Resampling.LANCZOS)
        return np.asarray(small)

    def theirs(decoded: bool) -> None:
        data = webdataset.WebDataset(files, shardshuffle=False)
        if not decoded:
            chosen = data.to_tuple("jpg", "txt").batched(BATCH, collation_fn=list)
        else:
            pixels = data.decode("pil").to_tuple("jpg", "txt").map_tuple(shrunk, str)
            chosen = pixels.batched(BATCH)
        for _ in itertools.islice(chosen, count // BATCH):
            pass

    for what, decoded in (("read", False), (f"read, {side} to {target} px, batched", True)):
        calls = {
            "ours, random order": lambda decoded=decoded: ours(decoded),
            "webdataset, in order": lambda decoded=decoded: theirs(decoded),
        }
        found = measured(calls, rounds)
        for name, (seconds, used) in found.items():
            yield {
                "what": f"{what}: {name}",
                "images/s": count / seconds,
                "images/s per core": count / used,
                "ratio per core": found["webdataset, in order"][1] / used,
            }


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--shards", type=int, default=20)
    options.add_argument("--each", type=int, default=1000, help="samples of a tar")
    options.add_argument("--side", type=int, default=512, help="of a stored image")
    options.add_argument("--target", type=int, default=512, help="of a decoded image")
    options.add_argument("--count", type=int, default=1024, help="images that are decoded")
    options.add_argument("--from", dest="source", type=Path, help="a folder of tars")
    options.add_argument("--only", choices=("index", "read"))
    options: argparse.Namespace = options.parse_args()
    columns = {"what": "<48", "GB/s": "7.2f", "GB/s per core": "7.2f", "images/s": "8.0f"}
    columns |= {"images/s per core": "8.0f", "ratio": "5.2f", "ratio per core": "5.2f"}
    with contextlib.ExitStack() as stack:
        folder = options.source
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shards"
            write(folder, options.shards, options.each, options.side)
        rows = iter(())
        if options.only != "read":
            rows = itertools.chain(rows, index_rows(folder, options.rounds))
        if options.only != "index":
            read = read_rows(folder, options.count, options.side, options.target, options.rounds)
            rows = itertools.chain(rows, read)
        done = table(columns, rows)
    tar = subprocess.run(["tar", "--version"], check=True, capture_output=True, text=True)
    libraries = {name: version(name) for name in ("webdataset", "pillow", "numpy")}
    finish(options, done, libraries=libraries | {"tar": tar.stdout.splitlines()[0]})


if __name__ == "__main__":
    main()
