"""The plans of full FLUX.1 [dev], stage by stage, on accelerators that need not be there.

    python benchmarks/plans.py --output docs/plans

Runs `train.py configs/flux_distill.py --plan` (or another of FLUX.1's configs) for every target,
each in a process of its own, and writes what it prints to TARGET.txt, its JSON beside it, and a
table of all to plans.md. Needs the extras `tpu` (libtpu) and `gpu` (XLA's compiler for CUDA, which
needs no GPU). An hour or more on two cores.
"""

import json
import subprocess
import sys
from pathlib import Path

from timing import described

from d2m_jax import command_line

ROOT = Path(__file__).parent.parent
CONFIG = "flux_distill"
# Topology → (mesh, parts of the batch of 64 that are computed one after the other).
TARGETS = {
    "v5p:4x4x4": ({"data": 4, "fsdp": 16}, 1),
    "v6e:8x8": ({"data": 4, "fsdp": 16}, 1),
    "h100:8": ({"data": 1, "fsdp": 8}, 8),
    "h200:1": ({"data": 1, "fsdp": 1}, 64),
}
GIB = 2**30


def file_of(config: str, topology: str, folder: Path) -> Path:
    """Where a plan is, as JSON."""
    name = topology.replace(":", "_")
    return folder / f"{name if config == CONFIG else f'{config}_{name}'}.json"


def run(config: str, topology: str, folder: Path) -> None:
    """Make the plans of a topology, stage by stage."""
    mesh, parts = TARGETS[topology]
    file, stages = file_of(config, topology, folder), command_line.load_run(config).stages
    command = [sys.executable, "train.py", f"configs/{config}.py", "--plan"]
    command += ["--topology", topology, "--output", str(file)]
    command += [word for axis, n in mesh.items() for word in (f"--mesh.{axis}", str(n))]
    command += [w for s in stages for w in (f"--stages.{s}.optimizer.accumulate", str(parts))]
    print(" ".join(["python", *command[1:]]), flush=True)
    with file.with_suffix(".txt").open("w") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out)
    if done.returncode:
        print(f"{topology}: exit code {done.returncode}")


def line(topology: str, stage: str, plan: dict) -> str:
    """A row of the table."""
    mesh, parts = TARGETS[topology]
    axes = " × ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"
    held, seconds = plan["parts"], plan["seconds"]
    needed = "?" if plan["needed"] is None else f"{plan['needed'] / GIB:.1f}"
    phase = max(plan["phases"], key=plan["phases"].get)
    cells = [
        topology,
        "calibration" if stage == "start" else stage,
        f"{axes}; {parts} part{'s' if parts > 1 else ''}",
        "yes" if plan["fits"] else "**no**",
        f"{needed} of {plan['memory'] / GIB:.1f}, {phase}",
        *(f"{held.get(name, 0) / GIB:.1f}" for name in ("teacher", "student, frozen")),
        *(f"{held.get(name, 0) / GIB:.1f}" for name in ("student, trains", "optimizer")),
        f"{held.get('temporaries', 0) / GIB:.1f}",
        f"{sum(row['moved'] for row in plan['traffic']) / 1e9:.1f}",
        f"{seconds['step']:.2f}" if seconds else "",
        f"{100 * seconds['model FLOP utilisation']:.0f} %" if seconds else "",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| topology | stage | mesh; batch of 64 in | fits | GiB per device, phase | teacher | frozen |"
    " trains | optimizer | temporaries | GB sent per device and step | predicted s per step | MFU |"
)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "plans")
    parser.add_argument("--config", default=CONFIG, help="a name in configs/ of one student")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output.resolve()
    for topology in options.only:
        run(options.config, topology, folder)
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for topology in TARGETS:
        file = file_of(options.config, topology, folder)
        if file.exists():
            plans = json.loads(file.read_text())
            lines += [line(topology, stage, plan) for stage, plan in plans.items()]
    text = "\n".join(lines) + "\n"
    (folder / "plans.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
