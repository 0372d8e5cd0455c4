"""metrics.jsonl over a resume, windows, warnings of collapse."""

import json

import numpy as np
import pytest

from d2m_jax.config import MeshConfig
from d2m_jax.sharding import make_mesh
from d2m_jax.training.metrics import Metrics, Window, matmul_peak


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


def test_tensorboard_events(tmp_path):
    write(tmp_path, "first", [0, 10])
    assert list((tmp_path / "tensorboard" / "first").glob("events.*"))


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


def test_collapse_is_told_once_per_layer(tmp_path, capfd):
    metrics = Metrics(tmp_path, "moe", 100, 0)
    healthy = {"loss": 1.0, "mlp/entropy": [0.9, 0.8], "mlp/largest_load": [1.5, 2.0]}
    healthy["mlp/dead_experts"] = [0.0, 0.0]
    metrics.write(10, healthy)
    assert "collapses" not in capfd.readouterr().err
    metrics.write(20, healthy | {"mlp/entropy": [0.9, 0.1]})
    metrics.write(30, healthy | {"mlp/entropy": [0.9, 0.1], "mlp/largest_load": [1.5, 6.0]})
    metrics.write(40, healthy | {"mlp/dead_experts": [1.0, 0.0]})
    metrics.close()
    told = [line for line in capfd.readouterr().err.splitlines() if "collapses" in line]
    assert told == [
        "moe, step 20: routing of mlp 1 collapses: entropy 0.10 of 1",
        "moe, step 40: routing of mlp 0 collapses: 1 dead experts",
    ]


def test_matmul_peak_is_plausible():
    mesh = make_mesh(MeshConfig())
    assert 1e8 < matmul_peak(mesh) < 1e18 and matmul_peak(mesh) is matmul_peak(mesh)
