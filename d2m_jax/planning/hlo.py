"""Reading XLA's optimised HLO text: computations, sizes, how often loops run."""

import math
import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # from the opcode's bracket on
    root: bool


Computation = dict[str, Instruction]


def first(pattern: str | re.Pattern[str], text: str) -> str:
    """What the group of a pattern found, which must be in the text."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"XLA's text: expected {pattern} in {text!r}")
    return match[1]


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """The computations of `compiled.as_text()` by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY ") else entry
        elif match := _INSTRUCTION.match(line):
            root, name, shape, opcode, text = match.groups()
            operands = tuple(re.findall(r"%([\w.-]+)", text[: text.find(")")]))
            current[name] = Instruction(name, shape, opcode, operands, text, bool(root))
    return computations, entry


def trips(
    loop: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int | None:
    """How often a loop runs: as the compiler says, or from a condition `i < limit`."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    part = {w: first(rf"{w}=%?([\w.-]+)", loop.text) for w in ("condition", "body")}
    condition, body = (computations[part[w]] for w in ("condition", "body"))
    test = next(i for i in condition.values() if i.root)
    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter = _element(test.operands[0], condition)
    limit = _constant(test.operands[1], condition)
    initial = computation.get(loop.operands[0])
    after = next(i for i in body.values() if i.root)
    if counter is None or initial is None or {initial.opcode, after.opcode} != {"tuple"}:
        return None
    place = _element(test.operands[1], condition)
    # A limit that the loop is given and leaves as it is.
    if limit is None and place is not None and _element(after.operands[place], body) == place:
        limit = _constant(initial.operands[place], computation)
    start = _constant(initial.operands[counter], computation)
    added = _source(after.operands[counter], body)
    step = None
    if added is not None and added.opcode == "add":
        step = next((c for o in added.operands if (c := _constant(o, body)) is not None), None)
    if limit is None or start is None or not step:
        return None
    return max(0, math.ceil((limit - start) / step))


def _source(name: str, computation: Computation) -> Instruction | None:
    instruction = computation.get(name)
    while instruction and instruction.opcode in ("copy", "bitcast", "convert", "copy-done"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _constant(name: str, computation: Computation) -> int | None:
    instruction = _source(name, computation)
    if instruction is None or instruction.opcode != "constant":
        return None
    value = instruction.text[: instruction.text.find(")")]
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _element(name: str, computation: Computation) -> int | None:
    instruction = _source(name, computation)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(first(r"index=(\d+)", instruction.text))


def bytes_of(shape: str) -> float:
    """Bytes of all arrays in an HLO shape."""
    total = 0.0
    for letters, bits, dims in _ARRAY.findall(shape):
        bits = 8 if letters == "pred" else int(bits or 0)
        total += math.prod(int(n) for n in dims.split(",") if n) * bits / 8
    return total
