"""Conversion of a FLUX.1 [dev] file to a model directory: speed beside a plain copy, and memory.

    python benchmarks/convert.py --output convert.json

The file has the true header of BFL's layout in bfloat16, and zeros: it is sparse and takes no disk.
--depth 19 38 is the whole model (23.8 GB); fewer blocks give the same rate. Memory is the peak of
anonymous pages of the process that converts, without the page cache, as Linux counts it (RssAnon).
"""

import argparse
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from timing import finish, parser, table

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.convert import convert
from d2m_jax.weights.keys import flux_keys, key_table


def zeros(file: Path, doubles: int, singles: int) -> int:
    """Write the file of a model of this depth; its size in bytes."""
    config = replace(FluxConfig(), double=(StackConfig(doubles),), single=(StackConfig(singles),))
    shapes = sizes(abstract(config))
    header, offset = {}, 0
    for name, shape in key_table.their_shapes(flux_keys.keys("bfl", config), shapes).items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + offset)
    return file.stat().st_size


def copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy, byte by byte through memory as a program would."""
    start = time.perf_counter()
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 2**24)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


class Peak(threading.Thread):
    """The most anonymous memory that this process held, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self):
        while True:
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, 1024 * int(line.split()[1]))
            time.sleep(0.02)


def measure(file: Path, target: Path) -> dict:
    """Seconds and peak memory of one conversion, in this process."""
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    convert(file, target)
    return {"seconds": time.perf_counter() - start, "peak": peak.bytes}


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument(
        "--depth", type=int, nargs=2, default=[19, 38], metavar=("DOUBLE", "SINGLE")
    )
    options.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    options.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.measure:  # a process of its own, so that the memory is the conversion's alone
        print(json.dumps(measure(*options.measure)))
        return

    def rows():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            file, target = Path(folder) / "flux.safetensors", Path(folder) / "model"
            size = zeros(file, *options.depth)
            command = [sys.executable, __file__, "--measure", str(file), str(target)]
            for _ in range(options.rounds):
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                row = json.loads(done.stdout)
                shutil.rmtree(target)
                copied = copy(file, Path(folder) / "copy")
                yield {
                    "depth": "{} + {}".format(*options.depth),
                    "GB": size / 1e9,
                    "seconds": row["seconds"],
                    "GB/s": size / row["seconds"] / 1e9,
                    "copy, GB/s": size / copied / 1e9,
                    "peak, GB": row["peak"] / 1e9,
                }

    columns = {"depth": "<8", "GB": "6.1f", "seconds": "8.1f", "GB/s": "6.2f"}
    finish(options, table(columns | {"copy, GB/s": "10.2f", "peak, GB": "8.2f"}, rows()))


if __name__ == "__main__":
    main()
