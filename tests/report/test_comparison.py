"""Which of the rival's rows a row meets, and what is said of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2m_jax.config import FluxConfig, ModelConfig, RunConfig, StackConfig, StageConfig
from d2m_jax.data.icons import Scene
from d2m_jax.evaluate.scores import Score
from d2m_jax.report.comparison import compare, note, rival_at, verdicts
from d2m_jax.report.measure import Measured
from d2m_jax.report.rows import Row, Run, Student

MODEL = ModelConfig(FluxConfig(double=(StackConfig(1, ffn="moe"),)))
SCENES = tuple(Scene("single", f"{i}", ()) for i in range(10))


def row(student, stage, steps=0, seconds=0.0):
    return Row(student, stage, MODEL, Path(), steps, seconds)


def measured(right, error):
    correct = np.arange(10) < right
    score = Score(SCENES, correct, np.zeros(10, bool))
    return Measured({"seen": score}, {"seen": error}, (), np.zeros((1, 2, 2, 3), np.uint8))


RIVAL = [row("pruned", "a", 10, 1.0), row("pruned", "b", 20, 2.0), row("pruned", "c", 30, 3.0)]


@pytest.mark.parametrize(
    "steps, seconds, by, stage, reached",
    [
        (20, 9.0, "steps", "b", True),
        (11, 9.0, "steps", "b", True),
        (31, 9.0, "steps", "c", False),
        (20, 0.5, "seconds", "a", True),
        (20, 2.1, "seconds", "c", True),
        (20, 3.1, "seconds", "c", False),
    ],
)
def test_the_rival_had_at_least_as_much_training(steps, seconds, by, stage, reached):
    other, enough = rival_at(row("moe", "x", steps, seconds), RIVAL, by)
    assert (other.stage, enough) == (stage, reached)


def test_comparison_and_what_is_said_of_it():
    mine = row("moe", "x", 20, 9.0)
    results = {RIVAL[1]: measured(6, 0.10), RIVAL[2]: measured(7, 0.05), mine: measured(9, 0.07)}
    found = compare(mine, results, RIVAL)
    steps, time = found["steps"], found["seconds"]
    assert steps.score.mean == pytest.approx(0.3) and steps.error == pytest.approx(0.7)
    assert time.score.mean == pytest.approx(0.2) and time.error == pytest.approx(1.4)
    assert note(mine, steps) == ""
    assert note(mine, time) == (
        "moe, after x trained 9.0 s, longer than the rival ever did: compared with"
        " pruned, after c, 3.0 s"
    )
    shorter = replace(mine, steps=15)
    assert "15 steps: compared with pruned, after b, 20 steps" in note(
        shorter, compare(shorter, results | {shorter: results[mine]}, RIVAL)["steps"]
    )


def test_verdicts_say_what_was_missed():
    teacher, mine = row("teacher", ""), row("moe", "x", 20, 9.0)
    students = (Student("pruned", True, tuple(RIVAL), ()), Student("moe", False, (mine,), ()))
    config = RunConfig(name="moe", teacher="t", stages={"x": StageConfig()})
    run = Run(config, teacher, students)
    results = {teacher: measured(10, 0.0), RIVAL[1]: measured(8, 0.1), RIVAL[2]: measured(8, 0.1)}
    results[mine] = measured(9, 0.081)
    said = verdicts(
        run, mine, results, compare(mine, results, run.rival.rows),
        gflops={teacher: 10.0, mine: 6.0}, milliseconds={32: {teacher: 2.0, mine: 1.8}},
    )  # fmt: skip
    assert (said["score_of_teacher"].value, said["score_of_teacher"].met) == (0.9, True)
    assert said["error_of_rival"].met is False and "0.81 ×" in said["error_of_rival"].text
    assert "0.60 × the teacher's FLOPs take 0.90 × its time" in said["time_of_teacher"].text
    assert "the other 0.30" in said["time_of_teacher"].text
