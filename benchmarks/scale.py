"""Predicted step time and efficiency on 64 to 4096 chips, before any is rented.

    python benchmarks/scale.py configs/flux_distill.py --stage moe --output scale.json

One example per chip, so that the work of a chip is always the same and communication is what
grows. v5p within one pod; v6e in pods of 256 that the network joins, with data parallelism across.
Up to --compile chips each point is `train.py --plan`: the step is compiled for that topology by
the TPU compiler. Beyond, the last compiled point is carried on: a chip's work and the collectives
within its FSDP group stay, those that span the data axis grow as rings do, over links as fast as
before. The JSON is written after every point, and a compiled point that it has is not compiled
again; a PNG is drawn beside it. Takes minutes a point.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from jax.sharding import Mesh
from timing import PACKAGES, described

from d2m_jax import command_line
from d2m_jax.config import AutoencoderConfig, MeshConfig, ModelConfig, PromptsConfig
from d2m_jax.measured_on import measured_on
from d2m_jax.output import new_file
from d2m_jax.planning import hardware
from d2m_jax.planning.plan import Assumptions, plan
from d2m_jax.planning.programs import Lowered, lower
from d2m_jax.sharding import make_mesh

SHAPES = {
    "v5p": ["4x4x4", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"],
    "v6e": ["8x8", "16x16", "16x16:2", "16x16:4", "16x16:8", "16x16:16"],
}


def compiled(topology: hardware.Topology, fsdp: int, program: Callable[[Mesh], Lowered]) -> dict:
    """The point of a topology, compiled for it."""
    devices, data = hardware.devices(topology), topology.chips // fsdp
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), devices)
    step = program(mesh)
    found = plan(
        step.program, topology, mesh, step.parts, step.flops, step.recomputed, beside=step.beside
    )
    own = {"compiled": True, "data": data, "slices": topology.slices}
    return own | found.to_json()


def carried(before: dict, topology: hardware.Topology, fsdp: int) -> dict:
    """The point of a larger topology, from the largest compiled one."""
    chips, seconds, slices = topology.chips, before["seconds"], before["slices"]

    def grows(row: dict) -> bool:
        """Whether a collective spans the data axis: between slices, or summing over all copies."""
        if slices > 1:
            return row["link"] == "network"
        spans = row["size"] in (before["data"], before["chips"])
        return spans and (row["size"] != fsdp or row["kind"] == "all-reduce")

    traffic = []
    for row in before["traffic"]:
        if grows(row):
            size = row["size"] * chips // before["chips"]
            wider = (size - 1) / size / ((row["size"] - 1) / row["size"])
            grown = {key: row[key] * wider for key in ("moved", "seconds", "hidden")}
            row = row | grown | {"size": size}
        traffic.append(row)
    communication, hidden = (sum(row[key] for row in traffic) for key in ("seconds", "hidden"))
    work = max(seconds["compute"], seconds["memory"])
    step = max(work, hidden) + communication - hidden
    flops = before["flops"] * chips / before["chips"]
    return before | {
        "topology": str(topology),
        "chips": chips,
        "compiled": False,
        "data": chips // fsdp,
        "slices": topology.slices,
        "flops": flops,
        "traffic": traffic,
        "seconds": seconds
        | {
            "communication": communication,
            "hidden communication": hidden,
            "step": step,
            "step, all hidden": max(work, communication),
            "step, none hidden": work + communication,
            "model FLOP utilisation": flops / (step * chips * topology.accelerator.flops),
        },
    }


def curve(
    topologies: list[hardware.Topology],
    fsdp: int,
    compile_up_to: int,
    program: Callable[[Mesh], Lowered],
    known: dict[str, dict],
) -> Iterator[dict]:
    """Points of one kind of chip, smallest first; those of `known` are taken from it."""
    last = None
    for topology in topologies:
        point = known.get(str(topology))
        if point is None and topology.chips <= compile_up_to:
            point = compiled(topology, fsdp, program)
        # Only from one that has the same kinds of collectives.
        alike = last and last["data"] > 1 and (last["slices"] > 1) == (topology.slices > 1)
        if point is None and alike:
            point = carried(last, topology, fsdp)
        if point is None or not point["seconds"]:
            continue
        last = point if point["compiled"] else last
        yield point


def draw(points: list[dict], file: Path) -> None:
    """Step time and efficiency over chips; hollow marks are not compiled."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for kind in dict.fromkeys(point["topology"].split(":")[0] for point in points):
        mine = [p for p in points if p["topology"].startswith(kind)]
        chips = [p["chips"] for p in mine]
        steps = [p["seconds"]["step"] for p in mine]
        (line,) = left.plot(chips, steps, label=kind)
        most, least = ([p["seconds"][f"step, {k} hidden"] for p in mine] for k in ("none", "all"))
        left.fill_between(chips, least, most, alpha=0.15, color=line.get_color())
        efficiency = [p["seconds"]["compute"] / p["seconds"]["step"] for p in mine]
        right.plot(chips, efficiency, color=line.get_color(), label=kind)
        for point, step, share in zip(mine, steps, efficiency, strict=True):
            face = line.get_color() if point["compiled"] else "white"
            for axes, y in ((left, step), (right, share)):
                axes.plot(point["chips"], y, "o", color=line.get_color(), markerfacecolor=face)
    left.set(xscale="log", xlabel="chips (one example each)", ylabel="predicted step, s", ylim=0)
    right.set(xscale="log", xlabel="chips", ylabel="compute share of the step", ylim=(0, 1.02))
    left.set_title("band: all to no communication hidden")
    right.set_title("filled: compiled for it; hollow: carried on")
    ticks = sorted({point["chips"] for point in points})
    for axes in (left, right):
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("config")
    parser.add_argument("--teacher", default="configs/flux_dev.py")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--kinds", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--fsdp", type=int, default=64, help="chips that share one copy")
    parser.add_argument("--compile", type=int, default=4096, help="the most chips to compile for")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    transformer = command_line.load_config(options.teacher)
    teacher = ModelConfig(transformer, PromptsConfig(), AutoencoderConfig(), shift=None)
    config = command_line.load_config(options.config)
    known, points = {}, []
    settings = {k: getattr(options, k) for k in ("config", "teacher", "stage", "fsdp")}
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if before["settings"] == settings:
            known = {p["topology"]: p for p in before["points"] if p["compiled"]}

    def program(mesh: Mesh) -> Lowered:
        stages = {
            n: replace(s, batch_size=mesh.size, optimizer=replace(s.optimizer, accumulate=1))
            for n, s in config.stages.items()
        }
        steps = lower(replace(config, stages=stages), teacher, mesh)
        return next(step for step in steps if step.stage == options.stage)

    print("topology        chips          step, s  compute share     MFU   GiB   comm., s")
    for kind in options.kinds:
        topologies = [hardware.parse(f"{kind}:{shape}") for shape in SHAPES[kind]]
        hardware.prepare(topologies[0])
        for point in curve(topologies, options.fsdp, options.compile, program, known):
            points.append(point)
            s = point["seconds"]
            print(
                f"{point['topology']:14} {point['chips']:6,} {s['step']:9.3f}"
                f" {'compiled' if point['compiled'] else 'carried ':>8}"
                f" {s['compute'] / s['step']:11.1%} {s['model FLOP utilisation']:9.1%}"
                f" {point['needed'] / hardware.GIB:6.1f} {s['communication']:9.3f}",
                flush=True,
            )
            report = measured_on(PACKAGES) | {"settings": settings, "points": points}
            with new_file(options.output) as new:
                new.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
            draw(points, options.output.with_suffix(".png"))
    print(f"assumptions: {Assumptions()}")


if __name__ == "__main__":
    main()
