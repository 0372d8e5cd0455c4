"""Processes that scan tars for this one, because parsing them is work of Python.

They are not multiprocessing's, which would run the user's script once more in each of them, and
forking a process that uses JAX is not safe. Each reads a file's description from its standard input
and answers with arrays, one file at a time.
"""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

import numpy as np

from d2m_jax import numpy_files
from d2m_jax.data.sources.index import Problems, Scanned
from d2m_jax.data.sources.stores import Found
from d2m_jax.data.sources.tars import scan

SERVE = "from d2m_jax.data.sources.helpers import serve; serve()"


class Helpers:
    """So many processes; `scan` gives a file to one that is free, and waits for it."""

    def __init__(self, count: int):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._all = [
            subprocess.Popen(
                [sys.executable, "-c", SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(count)
        ]
        self._free: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for process in self._all:
            self._free.put(process)

    def __enter__(self) -> "Helpers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()  # it writes nothing but to this process
            process.communicate()

    def scan(self, file: Found) -> Scanned:
        """What is found in a tar. Where a process has died this one looks itself."""
        process = self._free.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(asdict(file)).encode() + b"\n")
            process.stdin.flush()
            size = int.from_bytes(process.stdout.read(8), "little")
            answer = process.stdout.read(size)
        except OSError:
            size, answer = 0, b""
        finally:
            self._free.put(process)
        return unpacked(answer) if 0 < size == len(answer) else scan(file)


def serve() -> None:
    """What such a process does, until its standard input ends."""
    for line in sys.stdin.buffer:
        answer = packed(scan(Found(**json.loads(line))))
        sys.stdout.buffer.write(len(answer).to_bytes(8, "little") + answer)
        sys.stdout.buffer.flush()


def packed(scanned: Scanned) -> bytes:
    """As bytes, for another process."""
    problems = scanned.problems
    said = json.dumps([problems.left_out, problems.named, scanned.contents.hex()])
    arrays: dict[str, Any] = {f"column {n}": column for n, column in scanned.columns.items()}
    for name, data in scanned.packed.items():
        arrays[f"packed {name}"] = np.frombuffer(data, np.uint8)
    out = io.BytesIO()
    np.savez(out, said=np.frombuffer(said.encode(), np.uint8), **arrays)
    return out.getvalue()


def unpacked(data: bytes) -> Scanned:
    """What `packed` made bytes of."""
    arrays = numpy_files.load_all(io.BytesIO(data))
    left_out, named, contents = json.loads(arrays["said"].tobytes())
    columns = {n.split(" ", 1)[1]: arrays[n] for n in arrays if n.startswith("column ")}
    texts = {n.split(" ", 1)[1]: arrays[n].tobytes() for n in arrays if n.startswith("packed ")}
    return Scanned(columns, texts, Problems(left_out, named), bytes.fromhex(contents))
