"""The rows of a report: what a run directory holds of teacher, students and their stages."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from d2m_jax.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    StageConfig,
    check,
    from_json,
    teacher_path,
)
from d2m_jax.weights.directory import model_directory

TEACHER = "teacher"


@dataclass(frozen=True, eq=False)
class Row:
    """A model of the report: the teacher, or a student after one of its stages."""

    student: str
    stage: str  # empty for the teacher
    config: ModelConfig  # with the top_k of the stage
    path: Path  # its model directory
    steps: int = 0  # of training since the student was cut, over all its stages
    seconds: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.student}, after {self.stage}" if self.stage else self.student

    @property
    def file_name(self) -> str:
        """Free of what a file system minds, for results that belong to this row."""
        return f"{self.student}.{self.stage}" if self.stage else self.student

    @property
    def sparse(self) -> bool:
        """Whether it has MoE layers or mixes blocks."""
        return self.routes or self.mixes

    @property
    def routes(self) -> bool:
        """Whether it has MoE layers."""
        return any(stack.ffn == "moe" for stack in self.config.transformer.stacks)

    @property
    def mixes(self) -> bool:
        """Whether it has Mixtures of Blocks."""
        return any(stack.mixes for stack in self.config.transformer.stacks)


@dataclass(frozen=True, eq=False)
class Student:
    """A student of a run: one row per finished stage, and the metrics of its training."""

    name: str
    pruned: bool  # in width or in depth
    rows: tuple[Row, ...]
    history: tuple[dict[str, Any], ...]  # of metrics.jsonl, counted from the first stage's start

    @property
    def finals(self) -> list[Row]:
        """Its last row, and before it the last one without Mixtures of Blocks if there is one."""
        plain = [row for row in self.rows if not row.mixes]
        return [*plain[-1:], *[row for row in self.rows if row.mixes][-1:]]


@dataclass(frozen=True, eq=False)
class Run:
    """What a report is about."""

    config: RunConfig
    teacher: Row
    students: tuple[Student, ...]  # the rivals, and the main one last

    @property
    def rows(self) -> list[Row]:
        return [self.teacher, *(row for student in self.students for row in student.rows)]

    @property
    def main(self) -> Student:
        return self.students[-1]

    @cached_property
    def rival(self) -> Student | None:
        """The first pruned student, which the others meet."""
        return next((s for s in self.students if s.pruned and s.rows), None)

    @cached_property
    def shallow_rival(self) -> Student | None:
        """The first of fewer blocks than the teacher's, which Mixtures of Blocks meet; where none
        is, the rival of all."""
        blocks = _blocks(self.teacher)
        fewer = (s for s in self.students if s.pruned and s.rows and _blocks(s.rows[0]) < blocks)
        return next(fewer, self.rival)

    def rival_of(self, row: Row) -> Student | None:
        """The pruned student that a row meets."""
        return self.shallow_rival if row.mixes else self.rival

    @property
    def routed(self) -> list[Row]:
        """The rows whose routing is shown."""
        return [row for row in self.main.finals if row.sparse]

    @property
    def swept(self) -> Row | None:
        """The first of these with experts, which other numbers of them are tried on."""
        return next((row for row in self.routed if row.routes), None)

    @property
    def finals(self) -> list[Row]:
        """The rows that stand for the students in pictures, the teacher first."""
        return [self.teacher, *(row for student in self.students for row in student.finals)]


def _blocks(row: Row) -> int:
    return sum(stack.groups * stack.blocks for stack in row.config.transformer.stacks)


def read(run_directory: Path | str) -> Run:
    """The models of a run. ConfigError where there is no teacher, no student or no metrics."""
    directory = Path(run_directory)
    file = directory / "config.json"
    check(file.is_file(), f"{file}: no such file, expected the config of a run")
    try:
        config = from_json(RunConfig, json.loads(file.read_text()), str(file))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: damaged, expected JSON ({error})") from None
    check(config.teacher is not None, f"{file}: teacher = None: a report compares with a teacher")
    path = teacher_path(config.teacher)
    teacher = Row(TEACHER, "", model_directory.load_config(path), path)
    students = [
        _student(name, rival.sparsify.prunes, directory / "rivals" / name, rival.stages)
        for name, rival in config.rivals.items()
    ]
    students.append(_student(config.name, config.sparsify.prunes, directory, config.stages))
    check(
        any(student.rows for student in students),
        f"{directory / 'models'}: expected the model of a finished stage, such as"
        f" {next(iter(config.stages))}, found none",
    )
    return Run(config, teacher, tuple(students))


def _student(
    name: str, pruned: bool, directory: Path, stages: Mapping[str, StageConfig]
) -> Student:
    done = [stage for stage in stages if (directory / "models" / stage).is_dir()]
    rows = []
    for stage in done:
        path = directory / "models" / stage
        model = model_directory.load_config(path).running(stages[stage].top_k)
        last = history(directory, done[: done.index(stage) + 1])[-1]
        rows.append(Row(name, stage, model, path, last["step"], last["seconds"]))
    lines = history(directory, done) if done else []
    return Student(name, pruned, tuple(rows), tuple(lines))


def history(directory: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, stage after stage; `step` and `seconds` go on through them.

    Raises ConfigError where a stage has none.
    """
    file = directory / "metrics.jsonl"
    check(file.is_file(), f"{file}: no such file, expected the metrics of the training")
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            # As earlier versions named what they found on the validation batches.
            lines.append({re.sub("^held_out", "validation", k): v for k, v in line.items()})
        except ValueError:
            raise ConfigError(f"{file}, line {number}: damaged, expected JSON") from None
    result, step, seconds = [], 0, 0.0
    for stage in stages:
        mine = [line for line in lines if line["stage"] == stage]
        check(len(mine) > 0, f"{file}: expected lines of stage {stage}, found none")
        for line in mine:
            line["step"] += step
            line["seconds"] = seconds + line.get("seconds", 0.0)  # there is none at step 0
        result += mine
        step, seconds = mine[-1]["step"], mine[-1]["seconds"]
    return result
