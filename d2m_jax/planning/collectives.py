"""What a compiled program communicates, read from its optimised HLO text.

Loops are multiplied out. Read are XLA's dialects for CPU, GPU (`-start`, `-done`) and TPU
(`all-reduce-scatter` and asynchronous collectives as fusions, sends between slices).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from d2m_jax.planning.hlo import CALLED, Computation, Instruction, bytes_of, first, parse, trips

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective as one device sees it."""

    kind: str
    bytes: float  # of its operands
    moved: float  # bytes that the device sends each time, by the formulas of rings
    groups: tuple[tuple[int, ...], ...]  # positions in the mesh's order; empty: between slices
    size: int  # of a group
    asynchronous: bool  # other work goes on meanwhile
    count: int = 1  # times per step
    certain: bool = True  # False: in a loop of unknown length, which `count` takes once


def collectives(hlo: str) -> tuple[Collective, ...]:
    """All collectives of `compiled.as_text()`; equal ones are one, with their counts added."""
    computations, entry = parse(hlo)
    devices = re.search(r"num_partitions=(\d+)", hlo[: hlo.find("\n")])
    program = _Program(computations, int(devices[1]) if devices else 1)
    total: Counter = Counter()
    for found in program.of(entry):
        total[replace(found, count=1)] += found.count
    return tuple(replace(found, count=count) for found, count in total.items())


class _Program:
    def __init__(self, computations: dict[str, Computation], devices: int):
        self.computations, self.devices = computations, devices
        self._known: dict[str, tuple[Collective, ...]] = {}

    def of(self, name: str) -> tuple[Collective, ...]:
        """The collectives of a computation and of all that it calls."""
        if name not in self._known:
            self._known[name] = tuple(self._find(name))
        return self._known[name]

    def _find(self, name: str) -> Iterator[Collective]:
        computation = self.computations[name]
        # A TPU's asynchronous collective stands in the fusion that starts it, in those that carry
        # it on and in the one that ends it; it happens once.
        targets = {
            t for i in computation.values() for t in re.findall(r'_target="(Async\w+)"', i.text)
        }
        starts = "AsyncCollectiveStart" in targets
        carried = "AsyncCollectiveDone" in targets or name.startswith("async_collective_fusion")
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                if starts or not carried:
                    found = self._collective(kind, instruction, computation, name)
                    yield replace(found, asynchronous=found.asynchronous or starts)
            elif instruction.opcode == "send" and "_xla_megascale" in instruction.text:
                yield _between_slices(instruction)
            else:
                yield from self._called(instruction, computation)

    def _called(self, instruction: Instruction, computation: Computation):
        text, opcode = instruction.text, instruction.opcode
        if opcode == "while":
            times = trips(instruction, computation, self.computations)
            for part in re.findall(r"(?:body|condition)=%?([\w.-]+)", text):
                for found in self.of(part):
                    certain = found.certain and times is not None
                    count = found.count * (1 if times is None else times)
                    yield replace(found, count=count, certain=certain)
        elif opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", text)
            names = branches[1].replace("%", "").split(", ") if branches else CALLED.findall(text)
            yield from max((self.of(n) for n in names), key=_all_moved, default=())
        elif not opcode.endswith(("-done", "-update")):
            for part in CALLED.findall(text):
                for found in self.of(part):
                    yield replace(found, asynchronous=found.asynchronous or opcode == "async-start")

    def _collective(
        self, kind: str, instruction: Instruction, computation: Computation, where: str
    ) -> Collective:
        text = instruction.text
        size = sum(self._bytes(operand, computation) for operand in instruction.operands)
        pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
        groups = _lists(pairs[1]) if pairs else _groups(text, self.devices)
        group = 2 if pairs else max(map(len, groups))
        moved = _moved(kind, size, group)
        if where.startswith("all-reduce-scatter"):
            # Each device keeps a part of the sums: what it does not keep is not gathered.
            root = next(i for i in computation.values() if i.root)
            kind, moved = "reduce-scatter", moved - (size - bytes_of(root.shape))
        asynchronous = instruction.opcode.endswith("-start") and '"is_sync":true' not in text
        return Collective(kind, size, moved, groups, group, asynchronous)

    def _bytes(self, operand: str, computation: Computation) -> float:
        """Bytes of an operand, in the dtype it had before the CPU's compiler, which has no bf16
        collectives, made it float32."""
        size = bytes_of(computation[operand].shape)
        return size / 2 if self._widened(operand, computation) else size

    def _widened(self, name: str, computation: Computation) -> bool:
        for _ in range(8):
            instruction = computation.get(name)
            if instruction is None or not instruction.shape.startswith("f32"):
                return False
            if instruction.opcode == "fusion":
                computation = self.computations[first(CALLED, instruction.text)]
                name = next(i.name for i in computation.values() if i.root)
            elif instruction.opcode == "convert":
                return computation[instruction.operands[0]].shape.startswith("bf16")
            elif instruction.opcode in ("bitcast", "copy", "reshape", "transpose"):
                name = instruction.operands[0]
            else:
                return False
        return False


def _moved(kind: str, size: float, group: int) -> float:
    """Bytes that one device sends; a ring's, which no algorithm without a switch's help beats."""
    if kind == "all-gather":
        return size * (group - 1)
    if kind.startswith("collective"):
        return size
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _all_moved(found: tuple[Collective, ...]) -> float:
    return sum(one.moved * one.count for one in found)


def _between_slices(send: Instruction) -> Collective:
    """A transfer of the TPU runtime over the network; its payload is what one chip sends."""
    kind = first(r'_xla_megascale_transfer_type="(\w+)"', send.text)
    kind = kind.lower().replace("_", "-")
    slices = re.search(r'_xla_megascale_target="\{([\d,]*)\}', send.text)
    group = len(slices[1].split(",")) if slices else 2
    size = bytes_of(send.shape.split("},")[0])
    return Collective(kind, size, _moved(kind, size, group), (), group, asynchronous=True)


def _lists(text: str) -> tuple[tuple[int, ...], ...]:
    groups = re.findall(r"\{([\d,]+)\}", text)
    return tuple(tuple(map(int, group.split(","))) for group in groups)


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Device groups in each of HLO's notations: lists, `[4,2]<=[8]` and `mesh[…] {axes}`."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\](.*?) \{(.*?)\}", text):
        return _mesh_groups(*match.groups())
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        shape, order = match[1].split("<=")
        return tuple(map(tuple, _numbers(order).reshape(_ints(shape)).tolist()))
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _lists(match[1])
    return (tuple(range(devices)),)


def _mesh_groups(axes: str, order: str, chosen: str) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = re.search(r"device_ids=\((.*)\)", order)
    listed = _numbers(ids[1]) if ids else np.arange(math.prod(sizes.values()))
    # An axis may be cut in three, of which the middle forms groups: 'x':(before)size.
    shape, inside = [], []
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    middle = {name: (int(a), int(b)) if b else (1, sizes[name]) for name, a, b in parts}
    for name, size in sizes.items():
        before, own = middle.get(name, (size, 1))
        inside.append(len(shape) + 1)
        shape += [before, own, size // (before * own)]
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    grid = listed.reshape(shape).transpose(*outside, *inside)
    group = math.prod(shape[axis] for axis in inside)
    return tuple(map(tuple, grid.reshape(-1, group).tolist()))


def _numbers(order: str) -> np.ndarray:
    """`[4,16]T(1,0)`: 0 … 63 as 4 × 16, transposed; or a plain list."""
    if "[" not in order:
        return np.array(_ints(order))
    shape, _, axes = order.partition("T")
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (numbers.transpose(_ints(axes)) if axes else numbers).reshape(-1)


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
