"""The report of a run on data that nobody judges: a teacher's own, in two sizes, encoded."""

import json
from dataclasses import replace

import numpy as np

from d2m_jax.config import CacheConfig, ModelConfig, PromptsConfig, RunConfig, from_json, to_json
from d2m_jax.data import generate
from d2m_jax.evaluate import latency
from d2m_jax.evaluate.noisy import examples
from d2m_jax.report import rows, write
from d2m_jax.report.measure import SAMPLES, Bench
from d2m_jax.sampling.pipeline import load_pipeline
from tests.models import toy

PROMPTS = ["red anchor", "blue earth", "green anchor and red earth", "two blue anchor"]


def with_cache(directory):
    """The run's data are what its teacher made."""
    file = directory / "config.json"
    config = from_json(RunConfig, json.loads(file.read_text()))
    pipe = load_pipeline(config.teacher)
    folder = directory.parent / "cache"
    generate.generate(pipe, PROMPTS, folder, images_per_prompt=10, sizes=[(24, 24), (24, 36)])
    data = CacheConfig(path=str(folder), validation=20)
    file.write_text(json.dumps(to_json(replace(config, data=data))))


def test_report_without_a_judge(make_run, monkeypatch, capsys):
    directory = make_run()
    with_cache(directory)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    write.write(directory)
    told = capsys.readouterr().out
    report = json.loads((directory / "report.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names[0] == "teacher" and "fitted, after mob" in names
    for row in report["rows"]:
        assert set(row["error"]) == {"seen"} and row["scores"] == {}
        assert (row["error"]["seen"] == 0) == (row["name"] == "teacher")
        for compared in row["against_rival"].values():
            assert compared["error_ratio"] > 0 and "score_difference" not in compared
        assert "score_of_teacher" not in row["verdicts"]
    assert "What it is worth" in told and "score" not in told
    html = (directory / "report.html").read_text()
    assert "Samples, side by side" in html and "Scores by category" not in html
    for name in ("samples", "costs", "curves", "routing"):
        assert (directory / "report" / f"{name}.png").stat().st_size > 10_000
    assert report["top_k"]["values"][0]["error"]["seen"] > 0


def test_the_samples_are_of_captions_that_never_trained(make_run, tmp_path):
    directory = make_run()
    with_cache(directory)
    run = rows.read(directory)
    bench = Bench(run, tmp_path / "evaluation", {})
    assert {inputs["img"].shape[1:3] for inputs in bench.inputs["seen"]} <= {(2, 2), (2, 3)}
    measured = bench.measure("teacher", run.teacher, {"seen": SAMPLES})
    assert len(measured.prompts) == len(measured.samples) == SAMPLES
    pipe = load_pipeline(run.teacher.path)
    expected = pipe([prompt.caption for prompt in measured.prompts], seed=run.config.seed)
    np.testing.assert_allclose(measured.samples, np.asarray(expected) * 255, atol=1.01)
    assert measured.scores == {} and measured.errors == {"seen": 0.0}


def test_as_many_examples_as_a_forward_holds():
    small = ModelConfig(transformer=toy.DENSE)
    flux = ModelConfig(text=PromptsConfig(), image=small.image)
    assert examples(small, 1) == 32
    assert examples(replace(flux, text=replace(flux.text, length=4600)), 1) == 2
    assert examples(replace(flux, text=replace(flux.text, length=4600)), 8) == 8
