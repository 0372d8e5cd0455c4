"""A cell: a run of its own, in a folder that its settings name, and what was measured of it."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from d2m_jax import hosts
from d2m_jax.config import (
    ConfigError,
    FluxConfig,
    ModelConfig,
    RunConfig,
    StudentConfig,
    teacher_path,
    to_json,
)
from d2m_jax.evaluate import latency
from d2m_jax.measured_on import measured_on
from d2m_jax.models.accounting import account
from d2m_jax.output import full_disk
from d2m_jax.report.check import check_report
from d2m_jax.report.measure import Bench, Measured, cached, prompt_counts
from d2m_jax.report.rows import TEACHER, Row, Run, read
from d2m_jax.reproduce.paper_tables import Cell
from d2m_jax.reproduce.recipe import Recipe, total_steps
from d2m_jax.sparsification.groups import grouped
from d2m_jax.sparsification.student import student_config
from d2m_jax.training import lock, run
from d2m_jax.weights.directory import model_directory

PROBE_STEPS = 4


@dataclass(frozen=True)
class Result:
    """What a cell gave with one seed."""

    steps: int
    examples: int  # that it trained on
    seconds: float  # of training steps
    parameters: int
    activated: int
    gflops: float  # of one example's forward
    # Per image of one forward in the largest batch that was timed: the teacher's, and its own in
    # turns with it.
    milliseconds: list[float]
    errors: dict[str, float]  # by kinds of pairs (report.measure.splits)
    scores: dict[str, list[float]]  # mean and standard error over prompts; {}: not judged
    device: str
    commit: str | None


@dataclass(frozen=True)
class Costs:
    """How long cells take: what one costs beside its steps, and the work of steps in a second."""

    overhead: float  # seconds: compiling, cutting, measuring
    flops: float  # of training, per second


class Cells:
    """The cells below a folder, made or to be made."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        self.teacher = teacher_path(str(recipe.base.teacher))
        self.model = model_directory.load_config(self.teacher)
        self.about = measured_on(("jax", "flax", "numpy"))

    def config(self, cell: Cell, seed: int) -> RunConfig:
        """The run of a cell; of the teacher's the base's own, of which nothing is trained."""
        student = cell.student or StudentConfig(self.recipe.base.sparsify, self.recipe.base.stages)
        return replace(
            self.recipe.base,
            name="student",
            seed=seed,
            sparsify=student.sparsify,
            stages=student.stages,
            rivals={},
            sweep_top_k=(),
            keep_checkpoints=1,
            wandb=None,
        )

    def place(self, cell: Cell, seed: int) -> Path:
        """The folder of a cell, which cells of equal settings share."""
        config = self.config(cell, seed)
        settings = json.dumps([to_json(config), cell.student is None], sort_keys=True)
        found = hashlib.sha256(settings.encode()).hexdigest()[:12]
        kind = TEACHER if cell.student is None else config.sparsify.method
        return self.folder / "cells" / f"{kind}-seed{seed}-{found}"

    def _file(self, cell: Cell, seed: int) -> Path:
        suffix = "" if cell.top_k is None else f".top_{cell.top_k}"
        return self.place(cell, seed) / f"result{suffix}.json"

    def result(self, cell: Cell, seed: int) -> Result | None:
        """What was measured, if it was."""
        file = self._file(cell, seed)
        if not file.is_file():
            return None
        value = json.loads(file.read_text())["value"]
        return Result(**{name: value[name] for name in Result.__dataclass_fields__})

    def make(self, cell: Cell, seed: int) -> Result:
        """Train and measure it, going on where an earlier start stopped."""
        directory, config = self.place(cell, seed), self.config(cell, seed)
        begun, new = time.perf_counter(), not directory.exists()
        if cell.student is not None and not (directory / "trained").exists():
            with lock.held(directory), full_disk(directory, run.KEPT):
                run.run(config, directory, partial(check_report, config))
                (directory / "trained").touch()
            for part in ("checkpoints", "model", "models/start"):  # hundreds of cells fill a disk
                shutil.rmtree(directory / part, ignore_errors=True)
        found = cached(self._file(cell, seed), None, partial(self._measure, cell, seed))
        if new:
            took = time.perf_counter() - begun
            spent = {"elapsed": took, "seconds": found["seconds"], "work": self.work(cell)}
            (directory / "spent.json").write_text(json.dumps(spent) + "\n")
        jax.clear_caches()  # of hundreds of programs; those on disk are found again
        result = self.result(cell, seed)
        assert result is not None  # it was written
        return result

    def look(self, cell: Cell, seed: int) -> tuple[Run, Row, Measured]:
        """A finished cell with its samples."""
        run, row, bench, config = self._open(cell, seed)
        return run, row, self._worth(cell, run, row, bench, config)

    def _open(self, cell: Cell, seed: int) -> tuple[Run, Row, Bench, ModelConfig]:
        directory = self.place(cell, seed)
        if cell.student is None:
            row = Row(TEACHER, "", self.model, self.teacher)
            run = Run(self.config(cell, seed), row, ())
        else:
            run = read(directory)
            row = run.main.rows[-1]
        config = row.config.running(cell.top_k)
        return run, row, Bench(run, directory / "evaluation", self.about["versions"]), config

    def _worth(self, cell: Cell, run: Run, row: Row, bench: Bench, config: ModelConfig) -> Measured:
        suffix = "" if cell.top_k is None else f".top_{cell.top_k}"
        prompts = prompt_counts(run.config, bench.judge is not None)
        return bench.measure(f"{row.file_name}{suffix}", row, prompts, config)

    def _measure(self, cell: Cell, seed: int) -> dict[str, Any]:
        run, row, bench, config = self._open(cell, seed)
        measured = self._worth(cell, run, row, bench, config)
        programs = [bench.program(run.teacher), bench.program(row, config)]
        params = [bench.params(run.teacher), bench.params(row)]
        models, batch = list(zip(programs, params, strict=True)), max(bench.timed)
        times = latency.milliseconds(models, bench.inputs["seen"][0], batch)
        cost = account(config, math.prod(config.grid(*bench.size))).total
        estimates = {pairs: score.overall for pairs, score in measured.scores.items()}
        result = Result(
            steps=row.steps,
            examples=sum(s.steps * s.batch_size for s in run.config.stages.values())
            if row.stage
            else 0,
            seconds=row.seconds,
            parameters=cost.parameters,
            activated=cost.activated,
            gflops=cost.flops / 1e9,
            milliseconds=[times[0], times[-1]],
            errors=measured.errors,
            scores={pairs: [e.mean, e.standard_error] for pairs, e in estimates.items()},
            device=self.about["device"],
            commit=self.about["commit"],
        )
        return asdict(result)

    # What it costs --------------------------------------------------------------------------

    def work(self, cell: Cell) -> float:
        """FLOPs of a cell's training: of the student's forward and its gradient, and the
        teacher's forward. ConfigError for a student that cannot be."""
        if cell.student is None:
            return 0.0
        teacher = account(self.model).total.flops
        try:
            config, total = student_config(self.model.transformer, cell.student.sparsify), 0.0
            for stage in cell.student.stages.values():
                config = config if stage.groups is None else grouped(config, stage.groups)
                drawn = stage.random_top_k or (stage.top_k,)
                forwards = [self._flops(config, k) for k in drawn]
                of_one = 3 * sum(forwards) / len(forwards) + teacher
                total += stage.steps * stage.batch_size * of_one
        except ConfigError as error:
            raise ConfigError(f"{cell.name}: {error}") from None
        return total

    def _flops(self, config: FluxConfig, top_k: int | None) -> int:
        return account(replace(self.model, transformer=config.running(top_k))).total.flops

    def spent(self) -> list[dict[str, float]]:
        """What the cells that were made at once took."""
        files = sorted(self.folder.glob("cells/*/spent.json"))
        return [json.loads(file.read_text()) for file in files]

    def costs(self) -> Costs:
        """From earlier cells, or where there is none from a student of PROBE_STEPS steps."""
        trained = [one for one in self.spent() if one["work"] > 0 and one["seconds"] > 0]
        if not trained:
            hosts.say(f"a student of {PROBE_STEPS} steps, to know what the others will cost")
            probe = replace(self.recipe, steps=PROBE_STEPS)
            self.make(Cell("probe", "probe", probe.sparse()), 0)
            trained = [one for one in self.spent() if one["work"] > 0]
        overheads = [one["elapsed"] - one["seconds"] for one in trained]
        rates = [one["work"] / max(one["seconds"], 1e-9) for one in trained]
        return Costs(float(np.median(overheads)), float(np.median(rates)))

    def estimates(self, asked: Sequence[tuple[Cell, int]], costs: Costs) -> list[float]:
        """Seconds that each of these will take after those before it, 0 for what is there."""
        result, trained = [], set()
        for cell, seed in asked:
            place = self.place(cell, seed)
            if self._file(cell, seed).is_file():
                result.append(0.0)
            elif place in trained or (place / "trained").exists():
                result.append(costs.overhead / 2)  # to be measured alone
            else:
                result.append(costs.overhead + self.work(cell) / costs.flops)
            trained.add(place)
        return result

    def steps(self, cell: Cell) -> int:
        """How many steps its student trains."""
        return 0 if cell.student is None else total_steps(cell.student.stages)


def unique(cells: Sequence[tuple[Cell, int]], places: Cells) -> list[tuple[Cell, int]]:
    """Without those that are another's: of equal settings, measured in the same way."""
    found = {(places.place(cell, seed), cell.top_k): (cell, seed) for cell, seed in cells[::-1]}
    return list(found.values())[::-1]
