"""What a run tells: metrics.jsonl, TensorBoard, a progress bar, warnings when routing collapses."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from rich.console import Console

from d2m_jax import hosts
from d2m_jax.output import new_file
from d2m_jax.training.event_files import (
    Event,
    EventsWriter,
    SessionLog,
    histogram,
    image,
    scalar,
)

# When to warn, by the last part of a metric's name; `health` of distillation/losses.py says what
# each is.
COLLAPSE = {
    "entropy": (
        lambda value: value < 0.5,
        "few get nearly all (entropy {:.2f}, even is 1)",
    ),
    "largest_load": (
        lambda value: value > 4.0,
        "one gets {:.1f} times its even share",
    ),
    "dead_experts": (
        lambda value: value >= 1,
        "dead experts: {:.0f} (almost no token chooses them)",
    ),
}
COMPILING = "compiling"  # what a bar shows before the first step is done
# Steps of a stage that come first and alarm nobody: a gate that has just been cut is uneven.
SETTLES = 100
LASTS = 3  # logged steps in a row with an alarm, after which it is told


class Window:
    """Sums of the steps since the last logged one; as JSON they survive a resume, to the bit."""

    def __init__(self, saved: dict[str, Any] | None = None):
        saved = saved or {"count": 0, "sums": {}}
        self.count = saved["count"]
        self.sums = {name: np.asarray(value, np.float64) for name, value in saved["sums"].items()}

    def add(self, values: dict[str, Any]) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + np.asarray(value, np.float64)

    def means(self) -> dict[str, Any]:
        """Mean of each metric: a float, or a list for one value per layer."""
        return {name: (value / self.count).tolist() for name, value in self.sums.items()}

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "sums": {n: v.tolist() for n, v in self.sums.items()}}


@runtime_checkable
class Board(Protocol):
    """What draws curves."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...
    def picture(self, step: int, file: Path) -> None: ...


class Metrics:
    """The metrics of one stage, from the step it starts or resumes at; of many processes the first
    writes them. Without a run directory none are kept, but shown, and told to `boards`."""

    def __init__(
        self,
        run_directory: Path | None,
        stage: str,
        steps: int,
        start: int,
        boards: Sequence[Board] = (),
    ):
        self.stage, self.steps = stage, steps
        self._bar, self._writes = None, hosts.first()
        if not self._writes:
            return
        self._own: list[_Lines | _Board] = []
        if run_directory is not None:
            self._own.append(_Lines(run_directory / "metrics.jsonl", stage, start))
            self._own.append(_Board(run_directory / "tensorboard" / stage, start))
        self._boards = (*self._own, *boards)
        self._alarmed: Counter[str] = Counter()  # layers, by logged steps in a row
        self._warned: set[str] = set()
        self._printed = 0.0
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[shown]}"),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(stage, total=steps, completed=start, shown=COMPILING)
            self._bar.start()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._bar:
            (task,) = self._bar.tasks
            shown = "" if task.fields["shown"] == COMPILING else task.fields["shown"]
            self._bar.update(self._task, completed=step, shown=shown)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """The values of a step: floats, or lists of them with one per layer."""
        if not self._writes:
            return
        values = {name: _rounded(value) for name, value in values.items()}
        for board in self._boards:
            board.write(step, values)
        self._warn_of_collapse(step, values)
        self._show(step, values)

    def picture(self, step: int, file: Path | None) -> None:
        """A picture that was drawn at this step, if there is one."""
        if self._writes and file is not None:
            for board in self._boards:
                board.picture(step, file)

    def _show(self, step: int, values: dict[str, Any]) -> None:
        shown = f"loss {values['loss']:.4g}"
        if "validation" in values:
            shown += f", validation {values['validation']:.4g}"
        if "examples_per_second" in values:
            shown += f", {values['examples_per_second']:.4g} examples/s"
        if "model_flop_utilisation" in values:
            shown += f", MFU {values['model_flop_utilisation']:.1%}"
        if self._bar:
            self._bar.update(self._task, shown=shown)
        elif "validation" in values or time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            hosts.say(f"{self.stage} {step}/{self.steps}: {shown}{self._time_left(step, values)}")

    def _time_left(self, step: int, values: dict[str, Any]) -> str:
        if "seconds_per_step" not in values:
            return ""
        seconds = round((self.steps - step) * values["seconds_per_step"])
        return f", {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"

    def _warn_of_collapse(self, step: int, values: dict[str, Any]) -> None:
        """Once per layer, and only of what lasts."""
        found = dict(alarms(step, values))
        for layer in [layer for layer in self._alarmed if layer not in found]:
            del self._alarmed[layer]
        for layer, said in found.items():
            self._alarmed[layer] += 1
            if self._alarmed[layer] >= LASTS and layer not in self._warned:
                self._warned.add(layer)
                hosts.say(f"{self.stage}, step {step}: {said}")

    def close(self) -> None:
        if not self._writes:
            return
        if self._bar:
            self._bar.stop()
        for board in self._own:
            board.close()


def alarms(step: int, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every layer whose routing collapses, by the metrics of a step, and what is wrong with it;
    none while the stage settles."""
    if step < SETTLES:
        return
    for name, value in values.items():
        prefix, _, kind = name.rpartition("/")
        if kind not in COLLAPSE or name.startswith("validation"):
            continue
        bad, words = COLLAPSE[kind]
        for i, x in enumerate(np.ravel(value)):
            if bad(x):
                layer = f"{prefix} {i}".strip()
                yield layer, f"routing of {layer} collapses: {words.format(x)}"


def curves(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of each curve: one per value, or per layer."""
    for name, value in values.items():
        for i, x in enumerate(np.ravel(value)):
            yield f"{name}/{i:02d}" if np.ndim(value) else name, float(x)


class _Lines:
    """metrics.jsonl: one object per line."""

    def __init__(self, file: Path, stage: str, start: int):
        _drop_after(file, stage, start)
        self.stage, self._lines = stage, file.open("a")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._lines.write(json.dumps({"step": step, "stage": self.stage} | values) + "\n")
        self._lines.flush()

    def picture(self, step: int, file: Path) -> None:
        """None: samples/ has it."""

    def close(self) -> None:
        self._lines.close()


class _Board:
    """Curves for TensorBoard.

    Written at once, by this thread: SummaryWriter's own would die of a full disk, and a training
    that goes on would wait for it for ever.
    """

    def __init__(self, folder: Path, start: int):
        if start == 0:  # or the curves of an earlier try would be drawn too
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if start:
            again = SessionLog(status=SessionLog.SessionStatus.START)
            self._write(step=start + 1, session_log=again)  # what came after is not drawn

    def write(self, step: int, values: dict[str, Any]) -> None:
        """A curve per value, or per layer and how they are spread over the layers."""
        for name, value in values.items():
            if np.size(value) > 1:
                self._write(
                    step=step, summary=histogram(f"layers/{name}", np.asarray(value), "auto")
                )
        for tag, value in curves(values):
            self._write(step=step, summary=scalar(tag, value))
        self._events.flush()

    def picture(self, step: int, file: Path) -> None:
        """A picture on disk."""
        with Image.open(file) as drawn:
            self._write(step=step, summary=image("samples", np.asarray(drawn), dataformats="HWC"))
        self._events.flush()

    def _write(self, **fields: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), **fields))

    def close(self) -> None:
        self._events.close()


def _rounded(value: Any) -> Any:
    """Seven significant digits, as many as float32 has."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _drop_after(file: Path, stage: str, step: int) -> None:
    """Drop the lines of a stage after a step (at 0 all), to be written anew, and a half line."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if value["stage"] != stage or (step > 0 and value["step"] <= step):
            kept.append(line + "\n")
    with new_file(file) as new:
        new.write_text("".join(kept))


@cache
def matmul_peak(mesh: Mesh, dtype: str = "float32") -> float:
    """FLOP/s of all devices together in large matmuls, best of five; measured once per process."""
    # All at once, for the CPU devices of one process share its cores.
    size = 1024 if jax.default_backend() == "cpu" else 8192
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shapes = ((mesh.size * size, size), rows), ((size, size), NamedSharding(mesh, PartitionSpec()))
    x, w = (jax.jit(partial(jnp.ones, shape, dtype), out_shardings=s)() for shape, s in shapes)
    multiply = jax.jit(jnp.matmul, out_shardings=rows)
    multiply(x, w).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        multiply(x, w).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * mesh.size * size**3 / best
