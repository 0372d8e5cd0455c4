"""What a training step needs and how long it takes on accelerators that need not be there.

The step is compiled for them. Memory and collectives are the compiled program's own; time is a
roofline: what arithmetic, memory and links take at least, under assumptions that are printed.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from d2m_jax import hosts
from d2m_jax.planning.collectives import Collective, collectives
from d2m_jax.planning.hardware import GIB, Topology, link

# By default XLA's CPU compiler moves casts of whole stacks of parameters out of a scan.
CPU_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


@dataclass(frozen=True)
class Assumptions:
    """What the compiled program does not say."""

    efficiency: float = 0.6  # share of the peak FLOP/s that the program's matmuls reach
    links: float = 0.8  # share of a link's bandwidth that collectives reach
    latency: Mapping[str, float] = field(  # seconds that a collective takes however small it is
        default_factory=lambda: {"ICI": 1e-5, "NVLink": 2e-5, "network": 5e-5}
    )
    overlap: float = 0.5  # share of the communication hidden, where no compiler scheduled it


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over one kind of link, as one device sees them."""

    kind: str
    link: str
    size: int  # devices in a group
    count: int  # per step
    moved: float  # bytes that the device sends per step
    seconds: float
    hidden: float  # of the seconds, those while other work goes on
    certain: bool  # False: at least, for a loop's length is unknown


@dataclass(frozen=True)
class Phase:
    """A program, its arguments by what they are, and what else lies on the devices while it runs:
    name → tree of arrays or ShapeDtypeStructs with shardings, none twice."""

    program: jax.stages.Lowered
    parts: Mapping[str, Any]
    beside: Mapping[str, Any]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device that a program takes, by its compiler. One that the compiler refused has
    no arguments and no code, and its reason."""

    needed: float  # arguments, results and temporaries
    arguments: float
    code: float
    refused: str = ""


@dataclass(frozen=True)
class Plan:
    """Bytes are of one device, FLOPs of one step on all."""

    topology: str
    chips: int
    compiler: str
    memory: float  # that a program may use
    needed: float  # in the phase that needs most
    phases: dict[str, float]  # the peak of each; the first is the step's
    parts: dict[str, float]  # of the step's
    flops: float
    traffic: tuple[Traffic, ...]
    seconds: dict[str, float]  # empty where the program does not fit the compiler
    assumptions: Assumptions
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the program finds the memory that it needs."""
        return self.needed <= self.memory

    def to_json(self) -> dict[str, Any]:
        """All fields, and `fits`; bytes are null where they are not known."""
        sizes = {"phases": _known(self.phases), "parts": _known(self.parts)}
        needed = _known({"needed": self.needed})
        return dataclasses.asdict(self) | sizes | needed | {"fits": self.fits}


def _known(sizes: Mapping[str, float]) -> dict[str, float | None]:
    return {name: size if math.isfinite(size) else None for name, size in sizes.items()}


def plan(
    lowered: jax.stages.Lowered,
    topology: Topology,
    mesh: Mesh,
    parts: Mapping[str, Any],
    flops: float,
    recomputed: float = 0.0,
    assumptions: Assumptions = Assumptions(),
    compiler_options: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    others: Mapping[str, Phase] | None = None,
    name: str = "step",
    known: MutableMapping[str, Memory] | None = None,
) -> Plan:
    """The plan of a step lowered for `mesh`, which is over `hardware.devices(topology)`.

    `parts` and `beside` as in Phase; `flops` are those of one step on all chips, `recomputed` what
    rematerialisation adds. `others` runs between steps: its memory counts, its time does not.
    `known` keeps what the compiler said of each of these, so that plans for the same mesh that
    share it compile a program once.
    """
    accelerator = topology.accelerator
    platform = mesh.devices.flat[0].platform
    compiler = {"tpu": "XLA for TPU", "cpu": "XLA for CPU"}.get(platform, "XLA for GPU")
    options = dict(compiler_options or (CPU_OPTIONS if platform == "cpu" else {}))
    hosts.say(f"{name}: the compiler is at work")
    memory, compiled = _memory(lowered, platform, options)
    held = _sizes(Phase(lowered, parts, beside or {}), memory)
    phases, notes = {name: sum(held.values())}, []
    known = {} if known is None else known
    for other, phase in (others or {}).items():
        text = hashlib.sha256(phase.program.as_text().encode()).hexdigest()
        if text not in known:
            hosts.say(f"{other}: the compiler is at work")
            known[text], _ = _memory(phase.program, platform, options)
        phases[other] = sum(_sizes(phase, known[text]).values())
        if known[text].refused:
            notes.append(f"{other}: {known[text].refused}")
    common = {
        "topology": str(topology),
        "chips": topology.chips,
        "compiler": compiler,
        "memory": accelerator.memory,
        "needed": max(phases.values()),
        "phases": phases,
        "parts": {name: size for name, size in held.items() if size},
        "flops": flops,
        "assumptions": assumptions,
    }
    if compiled is None:
        notes.append(f"{name}: {memory.refused}")
        return Plan(**common, traffic=(), seconds={}, notes=(*notes,))
    stats, hlo = compiled.memory_analysis(), compiled.as_text()
    if stats is None or hlo is None:
        raise RuntimeError(f"{platform}: its compiler tells no program")
    found = collectives(hlo)
    if platform == "cpu":
        notes.append(
            "compiled for CPU devices, for XLA's compiler for GPUs is not installed (pip install"
            " 'd2m_jax[gpu]'): temporaries and traffic are upper bounds"
        )
    if not all(one.certain for one in found):
        notes.append("collectives stand in loops of unknown length, counted once: at least")
    traffic = _traffic(found, topology, mesh, assumptions, scheduled=platform != "cpu")
    reads = stats.argument_size_in_bytes + stats.output_size_in_bytes
    reads += 2 * held["temporaries"]
    return Plan(
        **common,
        traffic=traffic,
        seconds=_seconds(topology, flops, recomputed, reads, traffic, assumptions),
        notes=(*notes,),
    )


def _memory(
    program: jax.stages.Lowered, platform: str, options: dict[str, Any]
) -> tuple[Memory, jax.stages.Compiled | None]:
    try:
        compiled = program.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = needed_bytes(str(error))
        return Memory(needed, 0.0, 0.0, _reason(needed, str(error))), None
    stats = compiled.memory_analysis()
    if stats is None:
        raise RuntimeError(f"{platform}: its compiler tells no memory")
    arguments = stats.argument_size_in_bytes
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    needed = arguments + fresh + stats.temp_size_in_bytes
    if platform == "tpu":  # whose temporaries lie in donated arguments too; the compiler counts so
        needed = stats.peak_memory_in_bytes
    return Memory(needed, arguments, stats.generated_code_size_in_bytes), compiled


def _sizes(phase: Phase, memory: Memory) -> dict[str, float]:
    """Bytes of one device by what they are."""
    sizes = {name: device_bytes(tree) for name, tree in phase.parts.items()}
    sizes["padding and others"] = max(0.0, memory.arguments - sum(sizes.values()))
    sizes["temporaries"] = max(0.0, memory.needed - sum(sizes.values()))
    sizes["program"] = memory.code
    return sizes | {name: device_bytes(tree) for name, tree in phase.beside.items()}


def _reason(needed: float, message: str) -> str:
    """For people. Without a number it is a core's memory that is too small, not the device's."""
    if math.isfinite(needed):
        return "the compiler gave up: out of memory; temporaries are what it asked for"
    return f"the compiler refused it: {' '.join(message.split())[:500]}"


def device_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of arrays, or of ShapeDtypeStructs with shardings."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype)
            for leaf in jax.tree.leaves(tree)
        )
    )


def _itemsize(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def needed_bytes(message: str) -> float:
    """Bytes that a program needs by XLA's message of being out of memory; infinite if unsaid."""
    said = re.search(r"\(([\d.]+)([KMG])\) exceeds available", message) or re.search(
        r"Used ([\d.]+)([KMG]) of ", message
    )
    return float(said[1]) * UNITS[said[2]] if said else math.inf


def _traffic(
    found: tuple[Collective, ...],
    topology: Topology,
    mesh: Mesh,
    assumptions: Assumptions,
    scheduled: bool,
) -> tuple[Traffic, ...]:
    devices = mesh.devices.flat
    rows: dict[tuple[str, str, int], Traffic] = {}
    for one in found:
        if one.groups:
            ends = [link(topology, [devices[i] for i in group]) for group in one.groups[:64]]
            name, rate = min(ends, key=lambda end: end[1])
        else:
            name, rate = "network", topology.accelerator.network
        if one.size == 1:
            continue
        seconds = one.count * (one.moved / (rate * assumptions.links) + assumptions.latency[name])
        share = float(one.asynchronous) if scheduled else assumptions.overlap
        key = (one.kind, name, one.size)
        before = rows.get(key, Traffic(*key, 0, 0.0, 0.0, 0.0, True))
        rows[key] = Traffic(
            *key,
            count=before.count + one.count,
            moved=before.moved + one.count * one.moved,
            seconds=before.seconds + seconds,
            hidden=before.hidden + share * seconds,
            certain=before.certain and one.certain,
        )
    return tuple(sorted(rows.values(), key=lambda row: -row.seconds))


def _seconds(
    topology: Topology,
    flops: float,
    recomputed: float,
    reads: float,
    traffic: tuple[Traffic, ...],
    assumptions: Assumptions,
) -> dict[str, float]:
    accelerator = topology.accelerator
    peak = topology.chips * accelerator.flops
    compute = (flops + recomputed) / (peak * assumptions.efficiency)
    memory = reads / accelerator.memory_bandwidth
    communication = sum(row.seconds for row in traffic)
    hidden = sum(row.hidden for row in traffic)
    work = max(compute, memory)
    step = max(work, hidden) + communication - hidden
    return {
        "compute": compute,
        "memory": memory,
        "communication": communication,
        "hidden communication": hidden,
        "step": step,
        "step, all hidden": max(work, communication),
        "step, none hidden": work + communication,
        "model FLOP utilisation": flops / (step * peak),
    }


def table(plan: Plan) -> str:
    """The plan for people."""
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{plan.topology}: {plan.chips:,} chip{'s' if plan.chips > 1 else ''}, {plan.compiler}",
        f"{verdict}: needs {_gib(plan.needed)} of {_gib(plan.memory)} GiB per device"
        f" ({_gib(plan.memory - plan.needed)} left)",
        "",
        "memory per device                   GiB",
        *(f"  {name:29} {_gib(size):>8}" for name, size in plan.parts.items()),
    ]
    if len(plan.phases) > 1:
        lines += ["", "peak per phase                      GiB"]
        lines += [f"  {name:29} {_gib(size):>8}" for name, size in plan.phases.items()]
    if plan.traffic:
        lines += ["", "collectives             link     devices   count        GB       ms  hidden"]
        lines += [
            f"  {row.kind:21} {row.link:8} {row.size:7,} {row.count:7,}"
            f" {row.moved / 1e9:9.3f} {1e3 * row.seconds:8.1f} {row.hidden / row.seconds:7.0%}"
            + ("" if row.certain else "  at least")
            for row in plan.traffic
        ]
    if plan.seconds:
        s, a = plan.seconds, plan.assumptions
        latency = " or ".join(
            f"{1e6 * a.latency[name]:.0f} µs ({name})"
            for name in {row.link: 0 for row in plan.traffic}
        )
        lines += [
            "",
            f"FLOPs per step {plan.flops:.4g}, model FLOP utilisation"
            f" {s['model FLOP utilisation']:.1%}",
            f"step {s['step']:.4g} s ({s['step, all hidden']:.4g} if compute hid all communication,"
            f" {s['step, none hidden']:.4g} if none)",
            f"  compute {s['compute']:.4g} s at {a.efficiency:.0%} of the peak, memory at least"
            f" {s['memory']:.4g} s (every argument, result and temporary once)",
        ]
        if plan.traffic:
            lines.append(
                f"  communication {s['communication']:.4g} s at {a.links:.0%} of the links and"
                f" {latency} per collective, {s['hidden communication']:.4g} s of it beside other"
                " work"
            )
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)]) + "\n"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if math.isfinite(size) else "?"
