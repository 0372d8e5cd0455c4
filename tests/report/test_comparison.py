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
    results = {teacher: measured(10, 0.0), RIVAL[1]: measured(4, 0.1), RIVAL[2]: measured(8, 0.09)}
    results[mine] = measured(9, 0.081)
    said = verdicts(
        run, mine, results, compare(mine, results, run.rival_of(mine).rows),
        gflops={teacher: 10.0, mine: 6.0}, milliseconds={32: {teacher: 2.0, mine: 1.8}},
    )  # fmt: skip
    assert {name: verdict.met for name, verdict in said.items()} == {
        "error_of_rival": False,  # 0.81, where 0.75 is wanted
        "error_at_equal_time": True,
        "score_over_rival": True,
        "score_of_teacher": True,
        "time_of_teacher": True,
    }
    assert "0.081 is 0.81 × that of pruned, after as many steps" in said["error_of_rival"].text
    assert "0.90 × that of pruned, which had fewer seconds" in said["error_at_equal_time"].text
    assert "+50.0 ± " in said["score_over_rival"].text
    assert "0.90 × the teacher's time for 0.60 × its FLOPs" in said["time_of_teacher"].text


def test_mixtures_of_blocks_meet_a_student_of_fewer_blocks():
    def of(blocks, active=None, groups=1):
        stack = StackConfig(groups, blocks=blocks, active=active or blocks)
        return ModelConfig(FluxConfig(double=(), single=(stack,)))

    def student(name, pruned, *configs):
        rows = tuple(Row(name, f"{i}", c, Path(), 10, 1.0) for i, c in enumerate(configs))
        return Student(name, pruned, rows, ())

    narrow, shallow = student("narrow", True, of(4)), student("shallow", True, of(2))
    main = student("moe", False, of(4), of(4, 2))
    config = RunConfig(name="moe", teacher="t", stages={"0": StageConfig(), "1": StageConfig()})
    teacher = Row("teacher", "", of(4), Path())
    run = Run(config, teacher, (narrow, shallow, main))
    assert [run.rival_of(r) for r in main.rows] == [narrow, shallow]
    without = Run(config, teacher, (narrow, main))
    assert without.rival_of(main.rows[1]) is narrow
    measured_all = {r: measured(5, 0.1) for s in run.students for r in s.rows}
    measured_all |= {main.rows[1]: measured(5, 0.09), teacher: measured(9, 0.0)}
    said = verdicts(
        run, main.rows[1], measured_all, compare(main.rows[1], measured_all, shallow.rows),
        gflops={teacher: 1.0, main.rows[1]: 0.5},
        milliseconds={32: {teacher: 1.0, main.rows[1]: 1.0}},
    )  # fmt: skip
    assert said["error_of_rival"].met and not said["score_over_rival"].met
    assert not said["time_of_teacher"].met
