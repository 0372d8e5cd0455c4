"""metrics.jsonl over a resume, windows, warnings of collapse."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from d2m_jax.config import MeshConfig
from d2m_jax.sharding import make_mesh
from d2m_jax.training import metrics as metrics_of
from d2m_jax.training.metrics import Metrics, Window, _Board, matmul_peak


def write(directory, stage, steps, start=0):
    metrics = Metrics(directory, stage, 100, start)
    for step in steps:
        metrics.write(step, {"loss": 1.0 / (step + 1)})
    metrics.close()


def steps(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(line["stage"], line["step"]) for line in map(json.loads, lines)]


def test_resume_drops_later_lines_of_the_stage(tmp_path):
    write(tmp_path, "first", [0, 10, 20])
    write(tmp_path, "second", [0, 10, 20, 30])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "stage": "sec')  # killed while writing
    write(tmp_path, "second", [30, 40], start=20)
    first = [("first", 0), ("first", 10), ("first", 20)]
    assert steps(tmp_path) == first + [("second", step) for step in (0, 10, 20, 30, 40)]
    write(tmp_path, "second", [0])
    assert steps(tmp_path) == [*first, ("second", 0)]


def events(directory):
    """What TensorBoard is given of the stage `first`, in the order of the files."""
    found = []
    for file in sorted((directory / "tensorboard" / "first").iterdir()):
        rest = file.read_bytes()
        while rest:  # TensorFlow's records: length, its checksum, the event, its checksum
            size = int.from_bytes(rest[:8], "little")
            found.append(Event.FromString(rest[12 : 12 + size]))
            rest = rest[16 + size :]
    return [event for event in found if not event.file_version]


def test_curves_for_tensorboard(tmp_path):
    metrics = Metrics(tmp_path, "first", 100, 0)
    metrics.write(5, {"loss": 0.25, "mlp/entropy": [0.5, 0.75]})
    told = {e.summary.value[0].tag: (e.step, e.summary.value[0]) for e in events(tmp_path)}
    step, spread = told.pop("layers/mlp/entropy")
    assert step == 5 and spread.histo.num == 2 and spread.histo.sum == 1.25
    assert {tag: (step, value.simple_value) for tag, (step, value) in told.items()} == {
        "loss": (5, 0.25),
        "mlp/entropy/00": (5, 0.5),
        "mlp/entropy/01": (5, 0.75),
    }
    metrics.close()
    write(tmp_path, "first", [5], start=4)  # resumed: what came after step 4 is written anew
    assert [(e.step, e.session_log.status) for e in events(tmp_path)][4:] == [(5, 1), (5, 0)]
    write(tmp_path, "first", [0, 10])  # from the start: what was before would be a second curve
    assert [event.step for event in events(tmp_path)] == [0, 10]


def test_a_full_disk_is_told_by_the_write_itself(tmp_path):
    """No thread dies of it in silence."""
    board = _Board(tmp_path / "first", 0)
    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as full:
        board._events._py_recordio_writer._writer.close()
        board._events._py_recordio_writer._writer = full
        board.write(5, {"loss": 0.25})


def test_window_means_survive_json():
    values = [{"loss": np.float32(x), "load": np.float32([x, 2 * x])} for x in (0.1, 0.7, 0.3)]
    whole, part = Window(), Window()
    for value in values:
        whole.add(value)
    part.add(values[0])
    part = Window(json.loads(json.dumps(part.to_json())))
    for value in values[1:]:
        part.add(value)
    assert part.means() == whole.means()
    assert whole.means()["loss"] == pytest.approx(1.1 / 3)
    assert whole.means()["load"] == pytest.approx([1.1 / 3, 2.2 / 3])


def test_collapse_that_lasts_is_told_once_per_layer(tmp_path, capfd):
    metrics = Metrics(tmp_path, "moe", 400, 0)
    healthy = {"loss": 1.0, "mlp/entropy": [0.9, 0.8], "mlp/largest_load": [1.5, 2.0]}
    healthy["mlp/dead_experts"] = [0.0, 0.0]
    for step in (10, 20, 30, 40):
        metrics.write(step, healthy | {"mlp/entropy": [0.1, 0.1]})  # it settles
    few, dead = {"mlp/entropy": [0.9, 0.1]}, {"mlp/dead_experts": [1.0, 0.0]}
    for step, found in ((120, few), (130, few | dead), (140, dead), (150, few), (160, few)):
        metrics.write(step, healthy | found)  # never three times in a row
    assert "collapses" not in capfd.readouterr().err
    metrics.write(170, healthy | few | dead)
    metrics.write(180, healthy | few | dead | {"mlp/largest_load": [1.5, 6.0]})
    metrics.write(190, healthy | dead)
    metrics.close()
    told = [line for line in capfd.readouterr().err.splitlines() if "collapses" in line]
    assert told == [
        "moe, step 170: routing of mlp 1 collapses: few get nearly all (entropy 0.10, even is 1)",
        "moe, step 190: routing of mlp 0 collapses: dead experts: 1 (almost no token chooses them)",
    ]


def test_a_bar_says_that_it_compiles_until_a_step_is_done(tmp_path, monkeypatch):
    terminal = Console(force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(metrics_of, "Console", lambda stderr: terminal)
    metrics = Metrics(tmp_path, "moe", 100, 0)
    assert metrics._bar is not None
    (task,) = metrics._bar.tasks
    shown = [task.fields["shown"]]
    metrics.advance(1)
    shown.append(task.fields["shown"])
    metrics.write(1, {"loss": 0.5})
    metrics.advance(2)
    assert [*shown, task.fields["shown"]] == ["compiling", "", "loss 0.5"]
    metrics.close()


def test_matmul_peak_is_plausible():
    mesh = make_mesh(MeshConfig())
    assert 1e8 < matmul_peak(mesh) < 1e18 and matmul_peak(mesh) is matmul_peak(mesh)
