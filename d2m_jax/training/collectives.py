"""What a compiled program communicates, read from its optimised HLO text.

Loops are multiplied out. Read are XLA's dialects for CPU, GPU (`-start`, `-done`) and TPU
(`all-reduce-scatter` and asynchronous collectives as fusions, sends between slices).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
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


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # from the opcode's bracket on
    root: bool


_Computation = dict[str, _Instruction]


def collectives(hlo: str) -> tuple[Collective, ...]:
    """All collectives of `compiled.as_text()`; equal ones are one, with their counts added."""
    computations, entry = _parse(hlo)
    devices = re.search(r"num_partitions=(\d+)", hlo[: hlo.find("\n")])
    program = _Program(computations, int(devices[1]) if devices else 1)
    total: Counter = Counter()
    for found in program.of(entry):
        total[replace(found, count=1)] += found.count
    return tuple(replace(found, count=count) for found, count in total.items())


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current: _Computation = {}
    entry = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY ") else entry
        elif match := _INSTRUCTION.match(line):
            root, name, shape, opcode, text = match.groups()
            operands = tuple(re.findall(r"%([\w.-]+)", text[: text.find(")")]))
            current[name] = _Instruction(name, shape, opcode, operands, text, bool(root))
    return computations, entry


class _Program:
    def __init__(self, computations: dict[str, _Computation], devices: int):
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

    def _called(self, instruction: _Instruction, computation: _Computation):
        text, opcode = instruction.text, instruction.opcode
        if opcode == "while":
            trips = self._trips(instruction, computation)
            for part in re.findall(r"(?:body|condition)=%?([\w.-]+)", text):
                for found in self.of(part):
                    certain = found.certain and trips is not None
                    count = found.count * (1 if trips is None else trips)
                    yield replace(found, count=count, certain=certain)
        elif opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", text)
            names = branches[1].replace("%", "").split(", ") if branches else _CALLED.findall(text)
            yield from max((self.of(n) for n in names), key=_all_moved, default=())
        elif not opcode.endswith(("-done", "-update")):
            for part in _CALLED.findall(text):
                for found in self.of(part):
                    yield replace(found, asynchronous=found.asynchronous or opcode == "async-start")

    def _collective(
        self, kind: str, instruction: _Instruction, computation: _Computation, where: str
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
            kind, moved = "reduce-scatter", moved - (size - _bytes_of(root.shape))
        asynchronous = instruction.opcode.endswith("-start") and '"is_sync":true' not in text
        return Collective(kind, size, moved, groups, group, asynchronous)

    def _bytes(self, operand: str, computation: _Computation) -> float:
        """Bytes of an operand, in the dtype it had before the CPU's compiler, which has no bf16
        collectives, made it float32."""
        size = _bytes_of(computation[operand].shape)
        return size / 2 if self._widened(operand, computation) else size

    def _widened(self, name: str, computation: _Computation) -> bool:
        for _ in range(8):
            instruction = computation.get(name)
            if instruction is None or not instruction.shape.startswith("f32"):
                return False
            if instruction.opcode == "fusion":
                called = _CALLED.search(instruction.text)
                computation = self.computations[called[1]]
                name = next(i.name for i in computation.values() if i.root)
            elif instruction.opcode == "convert":
                return computation[instruction.operands[0]].shape.startswith("bf16")
            elif instruction.opcode in ("bitcast", "copy", "reshape", "transpose"):
                name = instruction.operands[0]
            else:
                return False
        return False

    def _trips(self, loop: _Instruction, computation: _Computation) -> int | None:
        """How often a loop runs: as the compiler says, or from a condition `i < limit`."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        part = {w: re.search(rf"{w}=%?([\w.-]+)", loop.text)[1] for w in ("condition", "body")}
        condition, body = (self.computations[part[w]] for w in ("condition", "body"))
        test = next(i for i in condition.values() if i.root)
        if test.opcode != "compare" or "direction=LT" not in test.text:
            return None
        counter = _element(test.operands[0], condition)
        limit = _constant(test.operands[1], condition)
        initial = computation.get(loop.operands[0])
        after = next(i for i in body.values() if i.root)
        if counter is None or initial is None or {initial.opcode, after.opcode} != {"tuple"}:
            return None
        if limit is None and (place := _element(test.operands[1], condition)) is not None:
            if _element(after.operands[place], body) == place:  # the loop leaves it as it is
                limit = _constant(initial.operands[place], computation)
        start = _constant(initial.operands[counter], computation)
        added = _source(after.operands[counter], body)
        step = None
        if added is not None and added.opcode == "add":
            step = next((c for o in added.operands if (c := _constant(o, body)) is not None), None)
        if limit is None or start is None or not step:
            return None
        return max(0, math.ceil((limit - start) / step))


def _source(name: str, computation: _Computation) -> _Instruction | None:
    instruction = computation.get(name)
    while instruction and instruction.opcode in ("copy", "bitcast", "convert", "copy-done"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _constant(name: str, computation: _Computation) -> int | None:
    instruction = _source(name, computation)
    if instruction is None or instruction.opcode != "constant":
        return None
    value = instruction.text[: instruction.text.find(")")]
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _element(name: str, computation: _Computation) -> int | None:
    instruction = _source(name, computation)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.text)[1])


def _moved(kind: str, size: float, group: int) -> float:
    """Bytes that one device sends; a ring's, which no algorithm without a switch's help beats."""
    if kind == "all-gather":
        return size * (group - 1)
    if kind.startswith("collective"):
        return size
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _all_moved(found: tuple[Collective, ...]) -> float:
    return sum(one.moved * one.count for one in found)


def _between_slices(send: _Instruction) -> Collective:
    """A transfer of the TPU runtime over the network; its payload is what one chip sends."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.text)[1]
    kind = kind.lower().replace("_", "-")
    slices = re.search(r'_xla_megascale_target="\{([\d,]*)\}', send.text)
    group = len(slices[1].split(",")) if slices else 2
    size = _bytes_of(send.shape.split("},")[0])
    return Collective(kind, size, _moved(kind, size, group), (), group, asynchronous=True)


def _bytes_of(shape: str) -> float:
    """Bytes of all arrays in an HLO shape."""
    total = 0.0
    for letters, bits, dims in _ARRAY.findall(shape):
        bits = 8 if letters == "pred" else int(bits or 0)
        total += math.prod(int(n) for n in dims.split(",") if n) * bits / 8
    return total


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
