"""Show how far a run is, from another terminal.

    python -m d2m_jax.training.status RUN [--watch] [--json]

RUN is a run directory, on this machine or on a file system that it shares. Nothing is written, and
the run does not notice.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import rich.box
import tyro
from rich.console import Console
from rich.table import Table

from d2m_jax.config import ConfigError, RunConfig, StageConfig, check, from_json
from d2m_jax.training import lock
from d2m_jax.training.metrics import alarms

ALARMS = 5  # of a stage that are told
EVERY = 5.0  # seconds between two looks of --watch
HEAD = re.compile(rb'\{"step": (\d+), "stage": "([^"]+)"')  # of a line of metrics.jsonl


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    watch: bool = False  # look again every five seconds, until the run is finished
    json: bool = False  # print JSON instead of a table


@dataclass(frozen=True)
class Stage:
    """A stage of one of a run's models; what is not known yet is None."""

    model: str  # the run's name, or a rival's
    name: str
    steps: int
    step: int = 0
    finished: bool = False
    loss: float | None = None  # the last that was logged
    validation: float | None = None  # the last
    best: float | None = None  # validation
    best_step: int | None = None
    seconds_per_step: float | None = None
    examples_per_second: float | None = None
    input_wait: float | None = None  # share of the time
    checkpoint: int | None = None  # step of the newest
    checkpoint_age: float | None = None  # seconds
    alarms: tuple[str, ...] = ()  # routing that collapses, of the last logged step

    @property
    def seconds_left(self) -> float | None:
        """Of training steps alone, at the last rate."""
        if self.finished or self.seconds_per_step is None:
            return None
        return (self.steps - self.step) * self.seconds_per_step


@dataclass(frozen=True)
class Status:
    """A run: its stages in the order in which they train, and who has its directory."""

    name: str
    holder: str | None  # process and host
    seen: float | None  # seconds since the holder's last heartbeat
    stages: tuple[Stage, ...]
    report: bool  # whether its report is written

    @property
    def seconds_left(self) -> float | None:
        """Of training steps in all stages; one that has not begun goes at the rate of the one
        before it. None before the first rate is known."""
        rate, left = None, 0.0
        for stage in self.stages:
            rate = stage.seconds_per_step or rate
            if stage.finished:
                continue
            if rate is None:
                return None
            left += (stage.steps - stage.step) * rate
        return left


def status_of(directory: Path) -> Status:
    """What a run directory tells. ConfigError where it is none."""
    file = directory / "config.json"
    check(file.is_file(), f"{file}: no such file, expected that of a run directory")
    try:
        config = from_json(RunConfig, json.loads(file.read_text()), str(file))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: damaged, expected JSON ({error})") from None
    models: dict[str, tuple[Path, Mapping[str, StageConfig]]] = {
        name: (directory / "rivals" / name, rival.stages) for name, rival in config.rivals.items()
    }
    models[config.name] = directory, config.stages
    stages = [
        stage for name, (place, mine) in models.items() for stage in _stages(name, place, mine)
    ]
    holder, seen = lock.holder(directory)
    return Status(config.name, holder, seen, tuple(stages), (directory / "report.json").is_file())


def _stages(model: str, place: Path, stages: Mapping[str, StageConfig]) -> Iterator[Stage]:
    last, best = _read(place / "metrics.jsonl")
    for name, stage in stages.items():
        line, (least, at) = last.get(name, {}), best.get(name, (None, None))
        step, age = _checkpoint(place / "checkpoints" / name)
        yield Stage(
            model=model,
            name=name,
            steps=stage.steps,
            step=line.get("step", 0),
            finished=(place / "models" / name).is_dir(),
            loss=line.get("loss"),
            validation=line.get("last_validation"),
            best=least,
            best_step=at,
            seconds_per_step=line.get("seconds_per_step"),
            examples_per_second=line.get("examples_per_second"),
            input_wait=line.get("input_wait"),
            checkpoint=step,
            checkpoint_age=age,
            alarms=tuple(said for _, said in alarms(line.get("step", 0), line)),
        )


def _read(file: Path) -> tuple[dict[str, dict], dict[str, tuple[float, int]]]:
    """The last line of each stage, and its best validation with the step. Of a long run few lines
    are parsed."""
    last: dict[str, bytes] = {}
    validated: dict[str, list[bytes]] = {}
    if file.is_file():
        with file.open("rb") as lines:
            for line in lines:
                found = HEAD.match(line)
                if found is None or not line.endswith(b"}\n"):  # half-written
                    continue
                stage = found[2].decode()
                last[stage] = line
                if b'"validation": ' in line:
                    validated.setdefault(stage, []).append(line)
    best, parsed = {}, {stage: json.loads(line) for stage, line in last.items()}
    for stage, lines in validated.items():
        values = [json.loads(line) for line in lines]
        parsed[stage]["last_validation"] = values[-1]["validation"]
        least = min(values, key=lambda value: value["validation"])
        best[stage] = least["validation"], least["step"]
    return parsed, best


def _checkpoint(folder: Path) -> tuple[int | None, float | None]:
    """Step and age in seconds of the newest checkpoint."""
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir()]
    if not steps:
        return None, None
    newest = folder / str(max(steps))
    return max(steps), max(0.0, time.time() - newest.stat().st_mtime)


def table(status: Status) -> Table:
    """The stages, for people."""
    held = "no process trains it now"
    if status.holder:
        held = f"in use by {status.holder}, last seen {status.seen:.0f} s ago"
    result = Table(box=rich.box.SIMPLE, title=f"{status.name}: {held}", title_justify="left")
    head = ["", "step", "loss", "validation", "best", "s/step", "input", "left", "checkpoint"]
    for i, name in enumerate(head):
        result.add_column(name, justify="right" if i else "left", no_wrap=True)
    for stage in status.stages:
        done = "finished" if stage.finished else f"{stage.step:,} of {stage.steps:,}"
        best = "" if stage.best is None else f"{stage.best:.4g} at {stage.best_step:,}"
        age = stage.checkpoint_age
        saved = "" if age is None else f"{stage.checkpoint:,}, {_time(age)} ago"
        wait = "" if stage.input_wait is None else f"{stage.input_wait:.1%}"
        numbers = (stage.loss, stage.validation)
        cells = ["" if number is None else f"{number:.4g}" for number in numbers]
        rate = "" if stage.seconds_per_step is None else f"{stage.seconds_per_step:.3g}"
        left = "" if stage.seconds_left is None else _time(stage.seconds_left)
        name = f"{stage.model}, {stage.name}"
        result.add_row(name, done, *cells, best, rate, wait, left, saved)
    return result


def _time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def show(status: Status, console: Console) -> None:
    """The table, and what one should look at."""
    console.print(table(status))
    for stage in status.stages:
        if stage.finished:
            continue
        for said in stage.alarms[:ALARMS]:
            console.print(f"{stage.model}, {stage.name}: {said}", highlight=False)
        if (more := len(stage.alarms) - ALARMS) > 0:
            console.print(f"{stage.model}, {stage.name}: and {more} more", highlight=False)
    if status.report:
        console.print("the report is written: report.html")
    elif status.seconds_left:
        told = f"about {_time(status.seconds_left)} of training left in all stages"
        console.print(f"{told}; what is between them, and the report, take more", highlight=False)


def to_json(status: Status) -> dict[str, Any]:
    """For programs."""
    value = asdict(status)
    value["seconds_left"] = status.seconds_left
    for stage, mine in zip(value["stages"], status.stages, strict=True):
        stage["seconds_left"] = mine.seconds_left
    return value


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parsed = command_line.parse(
        Arguments,
        arguments,
        usage="python -m d2m_jax.training.status",
        description=__doc__ or "",
        example="runs/demo --watch",
    )
    console = Console()
    console = Console(width=max(console.width, 124))  # less would cut the table
    while True:
        status = status_of(parsed.run)
        if parsed.json:
            print(json.dumps(to_json(status)), flush=True)
        else:
            show(status, console)
        if not parsed.watch or all(stage.finished for stage in status.stages):
            return
        time.sleep(EVERY)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
