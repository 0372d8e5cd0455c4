"""Weights & Biases, where a run's config asks for it: what metrics.jsonl and samples/ have.

A training goes on whatever becomes of it: offline where it cannot be reached, without it where it
fails.
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2m_jax import hosts
from d2m_jax.config import ConfigError, RunConfig, check, first_line, to_json
from d2m_jax.output import new_file
from d2m_jax.training.metrics import curves

FILE = "wandb.json"  # of a run directory: project and id of the run there
REACH = 30.0  # seconds after which W&B counts as out of reach
PATIENCE = 60.0  # seconds for which the end of a run waits until all is sent


@contextmanager
def tracked(config: RunConfig, run_directory: Path) -> Iterator["Tracker | None"]:
    """W&B's run for the time of the block; None where the config asks for none, and in all
    processes but the first. ConfigError where the package is missing."""
    mine = hosts.by_first(lambda: _id(config, run_directory))
    if mine is None or not hosts.first():
        yield None
        return
    tracker = Tracker(config, run_directory, mine)
    code = 1
    try:
        yield tracker
        code = 0
    finally:
        tracker.close(code)


class Tracker:
    """A run of W&B, which the next start of the same run directory goes on with."""

    def __init__(self, config: RunConfig, run_directory: Path, mine: str):
        self.config, self.folder, self.id = config, run_directory, mine
        students = {f"rivals/{name}/": rival.stages for name, rival in config.rivals.items()}
        students[""] = config.stages  # the last to be trained
        # Steps of the run before each stage: what a resumed run logs again, W&B leaves out.
        self._before, done = {}, 0
        for model, stages in students.items():
            for name, stage in stages.items():
                self._before[model + name] = done
                done += stage.steps + 1
        self._run: Any = None  # from the first stage on
        self._failed = False

    def stage(self, directory: Path, name: str) -> "Stage":
        """What is told of a stage; `directory` is the run's, or its rival's."""
        if self._run is None and not self._failed:
            self._tell(self._begin)
        model = directory.relative_to(self.folder).as_posix()
        stage = name if model == "." else f"{model}/{name}"
        return Stage(self, stage, self._before[stage])

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Values of a step of the run; of a Path, the picture there."""

        def log() -> None:
            import wandb

            told = {n: wandb.Image(v) if isinstance(v, Path) else v for n, v in values.items()}
            self._run.log(told, step=step)

        if not self._failed:
            self._tell(log)

    def close(self, code: int) -> None:
        """The end of the run, once all is sent or PATIENCE is over."""
        if self._run is not None:
            self._tell(lambda: self._run.finish(exit_code=code))

    def _begin(self) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, init_timeout=REACH, finish_timeout=PATIENCE
        )
        start = {
            "project": self.config.wandb,
            "name": self.config.name,
            "id": self.id,
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR", str(self.folder)),
            "config": to_json(self.config),
            "settings": settings,
        }
        try:
            self._run = wandb.init(**start)
        except Exception as error:  # of its network or its accounts
            self._run = wandb.init(**start, mode="offline")
            where = self._run.settings.sync_dir
            hosts.say(
                f"Weights & Biases: {first_line(error)}; this run is kept in {where}, wandb sync"
                " sends it later"
            )
        for stage in self._before:
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def _tell(self, action: Callable[[], object]) -> None:
        """No failure of W&B ends a training: it is told once, and nothing more is sent."""
        try:
            action()
        except Exception as error:
            self._failed = True
            hosts.say(
                f"Weights & Biases: {first_line(error)}; nothing more is sent to it, the training"
                " goes on"
            )


class Stage:
    """What Metrics tells of a stage (metrics.Board)."""

    def __init__(self, tracker: Tracker, name: str, before: int):
        self.tracker, self.name, self.before = tracker, name, before

    def write(self, step: int, values: dict[str, Any]) -> None:
        """The same curves as in TensorBoard."""
        found: dict[str, Any] = {f"{self.name}/{tag}": value for tag, value in curves(values)}
        self.tracker.row(self.before + step, found | {f"{self.name}/step": step})

    def picture(self, step: int, file: Path) -> None:
        """A picture on disk."""
        self.tracker.row(
            self.before + step, {f"{self.name}/samples": file, f"{self.name}/step": step}
        )


def _id(config: RunConfig, run_directory: Path) -> str | None:
    """Of the run that the directory has in the config's project; a new one where it has none. None
    where the config asks for nothing."""
    project, file = config.wandb, run_directory / FILE
    if project is None:
        return None
    found = importlib.util.find_spec("wandb")
    check(
        found is not None and found.origin is not None,  # without: a folder of runs of that name
        f"RunConfig.wandb = {project!r}: the package wandb is not installed, expected pip install"
        ' "d2m_jax[wandb]"',
    )
    if file.exists():
        try:
            saved = json.loads(file.read_text())
            if saved["project"] == project:
                return str(saved["id"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{file}: damaged, expected project and id of a run of W&B; without the file a new"
                " run begins there"
            ) from None
    new = secrets.token_hex(8)
    with new_file(file) as writing:
        writing.write_text(json.dumps({"project": project, "id": new}) + "\n")
    return new
