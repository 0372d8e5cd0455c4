"""Weights & Biases: what it is given, read back from what it wrote; no training needs it."""

import json
import os
import time
from pathlib import Path

import pytest
import wandb
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from d2m_jax.config import ConfigError, ModelConfig, RunConfig, StageConfig, StudentConfig
from d2m_jax.training.checkpoint import open_run
from d2m_jax.training.metrics import Metrics
from d2m_jax.training.tracking import tracked

CONFIG = RunConfig(
    name="mine",
    model=ModelConfig(),
    stages={"first": StageConfig(steps=20), "second": StageConfig(steps=30)},
    rivals={"pruned": StudentConfig(stages={"first": StageConfig(steps=10)})},
    wandb="a-project",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()  # so that the next test's environment is read


def records(folder: Path) -> list:
    """What W&B has of the runs of a run directory. Its files are LevelDB's logs behind a header of
    seven bytes: blocks of 32 KiB with parts of records, each after checksum, length and kind."""
    wandb.teardown()  # as at the end of a process: all is written
    found = []
    for file in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        data, place, whole = file.read_bytes(), 7, b""
        while place < len(data):
            left = 2**15 - place % 2**15
            if left < 7:  # the rest of a block
                place += left
                continue
            size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            whole += data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # a whole record, or its last part
                found.append(Record.FromString(whole))
                whole = b""
    return found


def rows(folder: Path) -> list[dict]:
    """By name the values of each logged row; `_step` is W&B's own."""
    logged = [r.history for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for row in logged
    ]


def test_metrics_and_pictures_reach_the_same_run_after_a_resume(tmp_path):
    file = tmp_path / "drawn.png"
    Image.new("RGB", (6, 4), "red").save(file)
    with tracked(CONFIG, tmp_path) as tracker:
        rival = tmp_path / "rivals" / "pruned"
        rival.mkdir(parents=True)
        board = tracker.stage(rival, "first")
        metrics = Metrics(rival, "first", 10, 0, [board])
        metrics.write(10, {"loss": 0.5})
        metrics.close()
    time.sleep(1.1)  # folders of offline runs are named by id and second
    with tracked(CONFIG, tmp_path) as tracker:
        metrics = Metrics(tmp_path, "second", 30, 5, [tracker.stage(tmp_path, "second")])
        metrics.write(6, {"loss": 0.25, "mlp/entropy": [0.5, 0.75]})
        metrics.picture(6, file)
        metrics.close()
    one, two = rows(tmp_path)
    assert one["rivals/pruned/first/loss"] == 0.5 and one["rivals/pruned/first/step"] == 10
    assert two["second/loss"] == 0.25 and two["second/step"] == 6
    assert two["second/mlp/entropy/00"] == 0.5 and two["second/mlp/entropy/01"] == 0.75
    # Each stage has its steps, and those from before its first one: 11 of the rival, 21 of `first`.
    assert (one["_step"], two["_step"]) == (10, 11 + 21 + 6)
    assert (two["second/samples.width"], two["second/samples.height"]) == (6, 4)
    (kept,) = tmp_path.glob(f"wandb/offline-run-*/files/{two['second/samples.path']}")
    assert kept.read_bytes() == file.read_bytes()
    runs = [r.run for r in records(tmp_path) if r.WhichOneof("record_type") == "run"]
    assert len(runs) >= 2 and len({run.run_id for run in runs}) == 1
    assert (runs[0].project, runs[0].display_name) == ("a-project", "mine")
    told = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert told["stages"]["second"]["steps"] == 30
    axes = {r.metric.glob_name: r.metric.step_metric for r in records(tmp_path)}
    assert axes["second/*"] == "second/step"
    ends = [r.exit.exit_code for r in records(tmp_path) if r.WhichOneof("record_type") == "exit"]
    assert ends == [0, 0]


def test_a_training_that_fails_is_a_run_that_failed(tmp_path):
    with pytest.raises(KeyError), tracked(CONFIG, tmp_path) as tracker:
        tracker.stage(tmp_path, "first").write(1, {"loss": 1.0})
        raise KeyError
    (end,) = (r.exit.exit_code for r in records(tmp_path) if r.WhichOneof("record_type") == "exit")
    assert end == 1 and rows(tmp_path)[0]["first/loss"] == 1.0


def test_who_has_no_account_keeps_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    with tracked(CONFIG, tmp_path) as tracker:
        tracker.stage(tmp_path, "first").write(1, {"loss": 1.0})
    told = capfd.readouterr().err
    assert "No API key configured" in told
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert f"this run is kept in {folder}, wandb sync sends it later" in told
    assert rows(tmp_path)[0]["first/loss"] == 1.0


def test_a_training_goes_on_when_it_fails(tmp_path, capfd, monkeypatch):
    with tracked(CONFIG, tmp_path) as tracker:
        board = tracker.stage(tmp_path, "first")
        board.write(1, {"loss": 1.0})
        board.picture(2, tmp_path / "none.png")
        board.write(3, {"loss": 1.0})
    told = capfd.readouterr().err
    assert told.count("nothing more is sent to it, the training goes on") == 1
    assert "none.png" in told and len(rows(tmp_path)) == 1


def test_nothing_starts_where_nothing_trains(tmp_path):
    with tracked(CONFIG, tmp_path) as tracker:
        assert tracker is not None
    assert not (tmp_path / "wandb").exists()


def test_what_cannot_go_well_is_told_before(tmp_path, monkeypatch):
    with tracked(CONFIG, tmp_path):
        mine = json.loads((tmp_path / "wandb.json").read_text())
    with tracked(RunConfig(**vars(CONFIG) | {"wandb": "another"}), tmp_path) as tracker:
        other = json.loads((tmp_path / "wandb.json").read_text())
    assert tracker is not None and mine["project"] == "a-project" and mine["id"] != other["id"]
    (tmp_path / "wandb.json").write_text('{"project": ')
    with pytest.raises(ConfigError, match=r"wandb\.json: damaged"), tracked(CONFIG, tmp_path):
        pass
    # A folder of W&B's own, where Python is started, is not the package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"wandb is not installed"), tracked(CONFIG, tmp_path):
        pass


def test_a_run_may_change_its_mind(tmp_path):
    open_run(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").touch()
    open_run(tmp_path, RunConfig(**vars(CONFIG) | {"wandb": None}))
