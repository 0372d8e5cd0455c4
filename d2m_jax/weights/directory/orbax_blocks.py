"""Parameters written as an Orbax checkpoint block after block, so that few bytes are held."""

import asyncio
import contextlib
import gc
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from d2m_jax import quiet
from d2m_jax.named_arrays import Fingerprint, fingerprint
from d2m_jax.weights.keys.key_table import Parameter

WHOLE = 2**28  # bytes up to which an array is one block
IN_FLIGHT = 2**29  # bytes that wait to be written


def save(
    directory: Path, params: Mapping[str, Any], progress: Callable[[int], None] | None = None
) -> None:
    """Write params by name, arrays or Parameter, as an ordinary Orbax checkpoint.

    It carries their fingerprint; `progress` is told the bytes of every block. One process is
    enough. Raises FloatingPointError that names the first parameter which holds a NaN or an
    infinity.
    """
    wrapped = {name: parameter(value) for name, value in params.items()}
    note: dict[str, str] = {}
    handler = _Handler(sorted(wrapped), note, progress)
    registry = ocp.type_handlers.create_type_handler_registry((Parameter, handler))
    arguments = ocp.args.PyTreeSave(
        wrapped,
        save_args={
            name: ocp.SaveArgs(shard_axes=tuple(range(_leading(p)))) for name, p in wrapped.items()
        },
    )
    with quiet.without("absl", "No jax.Array in TypeHandlerRegistry"):  # nor need there be one
        writer = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="alone",
    )
    with ocp.Checkpointer(writer, multiprocessing_options=alone) as checkpointer:
        try:
            # Orbax writes the metadata last, and by then the handler has filled it in.
            checkpointer.save(directory, args=arguments, custom_metadata=note)
        finally:
            handler.settle()


def parameter(value: Any) -> Parameter:
    """An array as a Parameter, whose regions are taken from its device; a Parameter as it is."""
    if isinstance(value, Parameter):
        return value

    def take(region: tuple[slice, ...]):
        whole = all(part == slice(0, n) for part, n in zip(region, value.shape, strict=True))
        return np.asarray(value if whole else value[region])

    return Parameter(value.shape, np.dtype(value.dtype), take)


def _leading(param: Parameter) -> int:
    """How many of the first axes a block has one index of."""
    return 0 if param.nbytes <= WHOLE else max(0, len(param.shape) - 2)


def blocks(param: Parameter) -> Iterator[tuple[slice, ...]]:
    """The regions of a parameter's blocks, in the order of its bytes."""
    count = _leading(param)
    rest = (slice(None),) * (len(param.shape) - count)
    for index in itertools.product(*map(range, param.shape[:count])):
        yield tuple(slice(i, i + 1) for i in index) + rest


class _Handler(ocp.type_handlers.NumpyHandler):
    """Orbax' handler of NumPy arrays, given those that are read block by block instead.

    Orbax starts `_open_and_write` for all arrays together, in the order of their names.
    """

    def __init__(
        self, names: list[str], note: dict[str, str], progress: Callable[[int], None] | None
    ):
        super().__init__(deepcopy_host_arrays=False)
        self._names, self._note, self._progress = iter(names), note, progress
        self._fingerprint, self._before = Fingerprint(), None
        self._opened: list[tensorstore.Future] = []
        self._pending: deque[tuple[tensorstore.WriteFutures, int]] = deque()

    async def _open_and_write(
        self, value: Parameter, tspec: dict, ts_context: tensorstore.Context | None
    ) -> None:
        name, before, done = next(self._names), self._before, asyncio.Event()
        self._before = done
        # All are opened at once, for every change of an OCDBT store that is waited for costs a
        # file; then they take turns, by their names.
        opened = tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=ts_context
        )
        self._opened.append(opened)
        store = await opened
        if before is not None:
            await before.wait()
        try:
            written = await self._write(name, value, store)
        except BaseException:
            self.settle()  # or tensorstore would report to a loop that is closed
            raise
        self._note["fingerprint"] = self._fingerprint.hex()
        done.set()
        for future in written:
            await future

    async def _write(
        self, name: str, value: Parameter, store: tensorstore.TensorStore
    ) -> list[tensorstore.WriteFutures]:
        self._fingerprint.begin(name, value.dtype, value.shape)
        written = []
        for region in blocks(value):
            block = np.asarray(value[region], order="C")
            self._fingerprint.add(block, value.finite)
            await self._room(block.nbytes)
            # Written by other threads, while the next one is read here.
            future = store[region].write(block, can_reference_source_data_indefinitely=True)
            self._pending.append((future, block.nbytes))
            written.append(future)
            if self._progress is not None:
                self._progress(block.nbytes)
        return written

    async def _room(self, size: int) -> None:
        while self._pending and size + sum(held for _, held in self._pending) > IN_FLIGHT:
            await self._pending.popleft()[0]

    def settle(self) -> None:
        """Wait, after an error too, until no thread writes any more."""
        for future in [*self._opened, *(future for future, _ in self._pending)]:
            with contextlib.suppress(Exception):  # Orbax has told of it
                future.result()


def save_together(directory: Path, params: Mapping[str, jax.Array]) -> None:
    """The same for arrays that are cut over processes: all call it, each writes what it holds."""
    note = {"fingerprint": fingerprint(params)}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        arguments = ocp.args.StandardSave(dict(params))
        checkpointer.save(directory, args=arguments, custom_metadata=note)


def read(directory: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Arrays by name, placed as `wanted` says. OSError with what Orbax says of damage.

    Where one cannot be read, Orbax closes its event loop under the others, and Python would print
    pages of what becomes of each, in threads and where objects are collected: they are not told.
    """
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        try:
            arguments = ocp.args.StandardRestore(dict(wanted))
            handler = ocp.StandardCheckpointHandler()
            return handler.restore(directory, args=arguments)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # Orbax and tensorstore each have their own
            why = str(error).strip().split(" See full TensorStore")[0] or type(error).__name__
        time.sleep(0.1)
        gc.collect()
    finally:
        sys.unraisablehook = before
    raise OSError(why)
