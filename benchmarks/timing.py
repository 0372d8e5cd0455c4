"""What the benchmarks share: timing that stays fair on a busy machine, the device's own limits,
tables, and JSON with what it ran on."""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2m_jax.measured_on import measured_on
from d2m_jax.output import new_file

PACKAGES = ("jax", "jaxlib", "flax", "tokamax", "libtpu", "torch", "diffusers", "triton")


def described(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help prints a file's docstring as it stands, with the command in it."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw)


def parser(doc: str, rounds: int = 15) -> argparse.ArgumentParser:
    """The same with the options that most benchmarks share."""
    options = described(doc)
    options.add_argument("--rounds", type=int, default=rounds)
    options.add_argument("--note", default="", help="what else the machine did")
    options.add_argument("--output", type=Path, help="JSON file")
    return options


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def usual_dtype() -> jnp.dtype:
    """Of activations and weights: float32 on a CPU, else bfloat16."""
    return jnp.dtype(jnp.float32 if on_cpu() else jnp.bfloat16)


class Times(NamedTuple):
    """Seconds of a call: median and quartiles by the clock, and the median of what all cores spent
    on it, which counts on a CPU and hardly moves when other work runs beside."""

    median: float
    low: float
    high: float
    cores: float


def measure(calls: Mapping[tuple, Callable[[], object]], rounds: int) -> dict[tuple, Times]:
    """The calls take turns, each round in another order; the first of each, which compiles, does
    not count."""
    order = np.random.default_rng(0)
    for call in calls.values():
        jax.block_until_ready(call())
    seconds, cores = {key: [] for key in calls}, {key: [] for key in calls}
    for _ in range(rounds):
        for i in order.permutation(len(calls)):
            key = list(calls)[i]
            start, spent = time.perf_counter(), time.process_time()
            jax.block_until_ready(calls[key]())
            seconds[key].append(time.perf_counter() - start)
            cores[key].append(time.process_time() - spent)
    return {
        key: Times(
            *np.percentile(seconds[key], [50, 25, 75]).tolist(), float(np.median(cores[key]))
        )
        for key in calls
    }


def limits(dtype=None) -> dict[str, float]:
    """What the device can do at all: FLOP/s of a large matmul and bytes/s of a copy (read and
    written), the best of several."""
    dtype = jnp.dtype(dtype or usual_dtype())
    size, length = (2048, 2**26) if on_cpu() else (8192, 2**30)
    key = jax.random.key(0)
    a = jax.random.normal(key, (size, size), dtype)
    b = jax.random.normal(key, (length // dtype.itemsize,), dtype)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)

    def best(call: Callable[[], object]) -> float:
        jax.block_until_ready(call())
        seconds = []
        for _ in range(40 if on_cpu() else 10):  # other work must not hide what it can do
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return {
        "matmul, FLOP/s": 2 * size**3 / best(lambda: multiply(a, a)),
        "copy, bytes/s": 2 * b.nbytes / best(lambda: copy(b)),
    }


def table(columns: Mapping[str, str], rows: Iterable[dict]) -> list[dict]:
    """Print each row as it comes, under a header; `columns` are names and formats with a width."""
    widths = {name: max(len(name), int(re.search(r"\d+", f)[0])) for name, f in columns.items()}
    left = {name: "<" if "<" in f else ">" for name, f in columns.items()}
    print("  ".join(f"{name:{left[name]}{width}}" for name, width in widths.items()))
    done = []
    for row in rows:
        cells = (f"{row[name]:{columns[name]}}" if name in row else "" for name in columns)
        padded = zip(widths.items(), cells, strict=True)
        print("  ".join(f"{c:{left[name]}{width}}" for (name, width), c in padded), flush=True)
        done.append(row)
    return done


def finish(options: argparse.Namespace, rows: list[dict], **more) -> None:
    """Write --output: the rows, and what they were measured on and with."""
    if options.output:
        asked = {name: value for name, value in vars(options).items() if name != "output"}
        report = measured_on(PACKAGES) | more | {"options": asked, "rows": rows}
        text = json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"
        with new_file(options.output) as new:
            new.write_text(text)
