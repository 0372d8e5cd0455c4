"""What another terminal is told of a run."""

import json
import os
import time
from pathlib import Path

import pytest

from d2m_jax.config import ConfigError, RunConfig, StageConfig, StudentConfig, to_json
from d2m_jax.training import lock, metrics, status


@pytest.fixture(autouse=True)
def alarms_early(monkeypatch):
    monkeypatch.setattr(metrics, "SETTLES", 40)


@pytest.fixture
def directory(tmp_path):
    """A rival that is finished, a first stage at step 40 of 100, a second that waits."""
    config = RunConfig(
        name="mine",
        teacher="teacher",
        stages={"moe": StageConfig(steps=100), "mob": StageConfig(steps=50)},
        rivals={"pruned": StudentConfig(stages={"retrain": StageConfig(steps=10)})},
    )
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    rival = tmp_path / "rivals" / "pruned"
    (rival / "models" / "retrain").mkdir(parents=True)
    write(rival, "retrain", [(0, {"loss": 2.0, "validation": 2.0}), (10, {"loss": 1.0})])
    rows = [(0, {"loss": 3.0, "validation": 3.0}), (20, {"loss": 2.5, "validation": 2.0})]
    rows += [(30, {"loss": 2.2, "validation": 2.1})]
    rates = {"seconds_per_step": 0.5, "examples_per_second": 8.0, "input_wait": 0.015}
    rows += [(40, {"loss": 2.0, **rates, "double.0.img_mlp/entropy": [0.9, 0.1]})]
    write(tmp_path, "moe", rows)
    for step in (20, 40):
        (tmp_path / "checkpoints" / "moe" / str(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "moe" / "damaged_60").mkdir()
    os.utime(tmp_path / "checkpoints" / "moe" / "40", (time.time() - 90,) * 2)
    return tmp_path


def write(place: Path, stage: str, rows: list, end: str = "") -> None:
    lines = [json.dumps({"step": step, "stage": stage} | values) + "\n" for step, values in rows]
    with (place / "metrics.jsonl").open("a") as file:
        file.write("".join(lines) + end)


def test_a_run_amid_its_first_stage(directory):
    write(directory, "moe", [], end='{"step": 41, "stage": "moe", "lo')  # being written
    found = status.status_of(directory)
    assert found.name == "mine" and found.holder is None and not found.report
    rival, moe, mob = found.stages
    assert (rival.model, rival.name, rival.finished, rival.step) == ("pruned", "retrain", True, 10)
    assert (rival.loss, rival.best, rival.seconds_left) == (1.0, 2.0, None)
    assert (moe.step, moe.steps, moe.loss, moe.validation) == (40, 100, 2.0, 2.1)
    assert (moe.best, moe.best_step) == (2.0, 20)
    assert (moe.seconds_left, moe.input_wait) == (30.0, 0.015)
    assert moe.checkpoint == 40 and 85 < moe.checkpoint_age < 120
    assert moe.alarms == (
        "routing of double.0.img_mlp 1 collapses: few get nearly all (entropy 0.10, even is 1)",
    )
    assert (mob.step, mob.finished, mob.loss, mob.checkpoint) == (0, False, None, None)
    assert found.seconds_left == (60 + 50) * 0.5  # what has not begun at the rate before it


def test_who_has_it(directory, monkeypatch):
    with lock.held(directory):
        found = status.status_of(directory)
        assert found.holder is not None and f"process {os.getpid()} on " in found.holder
        assert found.seen is not None and found.seen < 60
    assert status.status_of(directory).holder is None
    with lock.held(directory):  # of a process that has died
        monkeypatch.setattr(lock, "lives", lambda process: False)
        assert status.status_of(directory).holder is None


def test_the_command(directory, capsys):
    status.main([str(directory)])
    said = capsys.readouterr().out
    assert "mine: no process trains it now" in said and "40 of 100" in said and "0:00:30" in said
    assert "about 0:00:55 of training left in all stages" in said
    assert "2 at 20" in said and "1.5%" in said and "routing of double.0.img_mlp 1" in said
    status.main([str(directory), "--json"])
    value = json.loads(capsys.readouterr().out)
    assert value["stages"][1]["seconds_left"] == 30.0 and value["seconds_left"] == 55.0
    with pytest.raises(ConfigError, match="expected that of a run directory"):
        status.main([str(directory / "models")])


def test_it_watches_until_the_run_is_finished(directory, capsys, monkeypatch):
    looks = []

    def finish(seconds):
        looks.append(seconds)
        for stage in ("moe", "mob"):
            (directory / "models" / stage).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(status.time, "sleep", finish)
    status.main([str(directory), "--watch"])
    assert len(looks) == 1 and capsys.readouterr().out.count("trains it now") == 2


def test_a_long_run_is_read_without_parsing_it(directory, monkeypatch):
    values = {"loss": 1.0, "double.0.img_mlp/entropy": [0.9] * 57}
    write(directory, "moe", [(step, values) for step in range(41, 20_041)])
    parsed, loads = [], json.loads
    monkeypatch.setattr(status.json, "loads", lambda text: parsed.append(1) or loads(text))
    assert status.status_of(directory).stages[1].step == 20_040
    assert len(parsed) < 20
