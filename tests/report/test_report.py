"""The report of a run: its rows, its files, and that a killed one goes on."""

import gc
import json
import re
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from d2m_jax import flow, weights
from d2m_jax.config import MeshConfig
from d2m_jax.data.icons import Icons
from d2m_jax.evaluate import latency
from d2m_jax.models.accounting import account
from d2m_jax.models.flux import model_of
from d2m_jax.report import findings, rows, write
from d2m_jax.report.measure import Bench
from d2m_jax.weights.directory import model_directory

ROWS = [
    "teacher",
    "pruned, after retrain",
    "pruned, after longer",
    "paper, after shared",
    "paper, after moe",
    "fitted, after moe",
    "fitted, after mob",
]

FEW = [name for name in ROWS if not name.startswith("paper")]


class Killed(BaseException):
    """Stands for a signal that no one can catch."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 3)


def scores_of(directory) -> list:
    rows = json.loads((directory / "report.json").read_text())["rows"]
    return [(row["name"], row["scores"], row["error"]) for row in rows]


def test_report_of_a_run(make_run, capsys):
    directory = make_run()
    write.write(directory, "train.py my_config.py")
    said = capsys.readouterr().out
    assert str(directory / "report.html") in said and "fitted, after mob" in said
    assert "trained for 40 steps, too few to be held against any aim" in said

    value = json.loads((directory / "report.json").read_text())
    found = {row["name"]: row for row in value["rows"]}
    assert list(found) == ROWS
    assert value["command"] == "train.py my_config.py" and value["rival"] == "pruned"
    assert {"python", "jax", "flax", "numpy"} <= set(value["versions"])
    assert value["cores"] >= 1

    # costs: as accounting counts them, with the top_k of the stage
    config = weights.load_config(directory / "models" / "mob")
    assert found["fitted, after mob"]["activated"] == account(config).total.activated
    gflops = {name: row["gflops"] for name, row in found.items()}
    assert gflops["paper, after shared"] < gflops["paper, after moe"] < gflops["teacher"]
    for row in found.values():
        assert all(t > 0 for t in row["milliseconds_per_image"].values())

    # training, summed over stages
    trained = {name: (row["steps"], row["seconds"]) for name, row in found.items()}
    assert trained["pruned, after longer"] == (30, pytest.approx(3))
    assert trained["fitted, after mob"] == (40, pytest.approx(20))

    # worth, and against the rival
    assert found["teacher"]["error"] == {"seen": 0, "held_out": 0}
    assert all(row["error"]["seen"] > 0 for row in value["rows"][1:])
    assert found["teacher"]["against_rival"] == found["pruned, after longer"]["against_rival"] == {}
    steps = found["fitted, after moe"]["against_rival"]["at_equal_steps"]
    time = found["fitted, after moe"]["against_rival"]["at_equal_seconds"]
    assert (steps["row"], steps["reached"]) == ("pruned, after retrain", True)
    assert (time["row"], time["reached"]) == ("pruned, after longer", False)
    error = found["fitted, after moe"]["error"]["seen"]
    assert steps["error_ratio"] == pytest.approx(
        error / found["pruned, after retrain"]["error"]["seen"]
    )
    assert set(found["fitted, after mob"]["verdicts"]) == {
        "error_of_rival",
        "error_at_equal_time",
        "score_over_rival",
        "score_of_teacher",
        "time_of_teacher",
    }
    assert [v["top_k"] for v in value["top_k"]["values"]] == [0, 2, 4]
    trained_k = next(v for v in value["top_k"]["values"] if v["top_k"] == 2)
    assert trained_k["error"]["seen"] == error

    html = (directory / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link", html)
    assert html.count("data:image/png;base64,") == 5
    assert "longer than the rival ever did" in html and "<li class=" not in html
    grid, curves, table = (html.index(s) for s in ("side by side", "while training", "<table>"))
    assert grid < curves < table  # what says most comes first
    for name in ("samples", "curves", "costs", "routing", "routing_blocks"):
        with Image.open(directory / "report" / f"{name}.png") as picture:
            assert min(picture.size) > 300


def test_a_killed_report_goes_on_and_ends_with_the_same(make_run, monkeypatch, capsys):
    directory, measured = make_run("pruned"), []
    measure = Bench._measure

    def dies(self, row, config, prompts):
        if len(measured) == 2:
            raise Killed
        measured.append(config)
        return measure(self, row, config, prompts)

    monkeypatch.setattr(Bench, "_measure", dies)
    with pytest.raises(Killed):
        write.write(directory)
    assert not (directory / "report.json").exists()

    def counts(self, row, config, prompts):
        measured.append(config)
        return measure(self, row, config, prompts)

    monkeypatch.setattr(Bench, "_measure", counts)
    write.write(directory)
    assert len(measured) == len(FEW) + 3  # and the top-k sweep's
    uninterrupted, report = scores_of(directory), (directory / "report.json").read_text()

    # where all is on disk nothing is measured, times neither
    measured.clear()
    monkeypatch.setattr(write, "FEWEST_STEPS", 40)  # of which the last row has as many
    capsys.readouterr()
    write.write(directory)
    judged = len(json.loads(report)["rows"][-1]["verdicts"])
    told = re.findall(r"^[✓✗] ", capsys.readouterr().out, re.MULTILINE)
    assert len(told) == judged == (directory / "report.html").read_text().count("<li class=") > 0
    again = json.loads((directory / "report.json").read_text())
    assert measured == [] and again["rows"] == json.loads(report)["rows"]

    # what is on disk is not measured again, but for a damaged file and another model
    (directory / "evaluation" / "teacher.json").write_text('{"key": ')
    config, params = weights.load(directory / "models" / "mob")
    params["img_in"]["bias"] += jnp.float32(0.5)
    weights.save(directory / "models" / "mob", config, params, overwrite=True)
    measured.clear()
    write.write(directory)
    assert len(measured) == 2
    assert scores_of(directory)[:-1] == uninterrupted[:-1]
    assert scores_of(directory)[-1] != uninterrupted[-1]

    # other data behind the same config are measured again
    def refuses(self, row, config, prompts):
        raise Killed

    monkeypatch.setattr(Bench, "_measure", refuses)
    write.write(directory)
    monkeypatch.setattr(Icons, "fingerprint", lambda self: "others")
    with pytest.raises(Killed):
        write.write(directory)


def test_a_run_that_tries_no_other_numbers_of_experts_has_no_sweep(make_run, tmp_path):
    run = rows.read(make_run())
    assert [row.label for row in run.routed] == ["fitted, after moe", "fitted, after mob"]
    run = replace(run, config=replace(run.config, sweep_top_k=()))
    assert findings._sweep(run, Bench(run, tmp_path, {}), 12) is None
    assert not list(tmp_path.glob("*.json"))


def test_the_error_is_the_mean_squared_difference_of_velocities(make_run, tmp_path):
    run = rows.read(make_run())
    bench, row = Bench(run, tmp_path, {}), run.students[0].rows[0]
    (inputs,) = bench.inputs["seen"]
    answers = [
        model_of(model.config.transformer, weights.load(model.path)[1])(
            inputs["img"].reshape(len(inputs["img"]), 4, -1),
            flow.image_ids(2, 2),
            inputs["txt"],
            flow.text_ids(6),
            inputs["timesteps"],
            inputs["y"],
        )
        for model in (run.teacher, row)
    ]
    expected = float(jnp.square(answers[0] - answers[1]).mean())
    found = bench.measure("pruned", row, {"seen": 12})
    assert found.errors["seen"] == pytest.approx(expected, rel=1e-4)


def test_one_model_at_a_time_is_held(make_run, tmp_path, monkeypatch):
    """Cut over the run's mesh, as it is stored; beside the teacher where the two take turns."""
    directory = make_run("pruned")
    run = rows.read(directory)
    alive, most, load = [], [], model_directory.load

    def counts(path, dtype, sharding):
        config, params = load(path, dtype, sharding)
        alive.append(weakref.ref(params["img_in"]["kernel"]))
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        return config, params

    monkeypatch.setattr(model_directory, "load", counts)
    config, params = load(run.teacher.path, None)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    del params
    weights.save(run.teacher.path, config, half, overwrite=True)
    bench = Bench(run, tmp_path / "evaluation", {})
    findings.gather(run, bench)
    assert max(most) == 2 and len(most) > len(FEW)
    kernel = bench.params(run.teacher)["img_in"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and kernel.sharding.mesh == bench.mesh
    fsdp = replace(run.config, mesh=MeshConfig(data=1, fsdp=-1))
    assert Bench(replace(run, config=fsdp), tmp_path, {}).mesh.shape["fsdp"] == bench.mesh.size
    # of many hosts' mesh: over what this one has
    many = replace(run.config, mesh=MeshConfig(data=64, fsdp=8))
    assert Bench(replace(run, config=many), tmp_path, {}).mesh.shape["fsdp"] == bench.mesh.size
