"""The report of a run on data that nobody judges: a teacher's own, in two sizes, encoded."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2m_jax.config import (
    AutoencoderConfig,
    CacheConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    from_json,
    to_json,
)
from d2m_jax.data import generate
from d2m_jax.data.protocol import Asked
from d2m_jax.evaluate import latency, noisy
from d2m_jax.evaluate.noisy import examples
from d2m_jax.models.accounting import account
from d2m_jax.report import measure, pictures, rows, write
from d2m_jax.report.measure import SAMPLES, Bench, Measured
from d2m_jax.sampling.pipeline import load_pipeline
from tests.models import toy

PROMPTS = ["red penguin", "blue pump", "green penguin and red pump", "two blue penguin"]


def with_cache(directory):
    """The run's data are what its teacher made."""
    file = directory / "config.json"
    config = from_json(RunConfig, json.loads(file.read_text()))
    pipe = load_pipeline(config.teacher)
    folder = directory.parent / "cache"
    generate.generate(pipe, PROMPTS, folder, images_per_prompt=10, sizes=[(32, 32), (32, 48)])
    data = CacheConfig(path=str(folder), validation=20)
    file.write_text(json.dumps(to_json(replace(config, data=data))))


def test_report_without_a_judge(make_run, monkeypatch, capsys):
    directory = make_run("pruned")
    with_cache(directory)
    teacher = rows.read(directory).teacher.config
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
    sizes = [f"32 × {width} pixels" in html for width in (32, 48)]
    assert sum(sizes) == 1 and html.count("pixels") == 3  # costs, and routing of two rows
    tokens = 4 if sizes[0] else 6
    assert report["rows"][0]["gflops"] == account(teacher, tokens).total.flops / 1e9
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


class Sizes:
    """Data of images of these sizes."""

    encoded = tells_padding = True

    def __init__(self, *sizes):
        self.sizes = sizes

    def fingerprint(self):
        return ""

    def vocabulary(self):
        return ()

    def batches(self, *arguments):
        """None is drawn."""

    def prompts(self, count, held_out=False):
        return []


def test_as_many_examples_as_a_forward_holds():
    small = ModelConfig(transformer=toy.DENSE)
    assert examples(small, Sizes((24, 24)), 1) == 32
    flux = ModelConfig(text=PromptsConfig(), image=AutoencoderConfig())
    assert examples(flux, Sizes((1024, 1024)), 1) == 2
    assert examples(flux, Sizes((1024, 1024)), 8) == 8
    assert examples(flux, Sizes((256, 256), (2048, 2048)), 1) == 1  # the largest must fit


def test_at_full_size_examples_are_bounded(make_run, tmp_path, monkeypatch):
    run = rows.read(make_run())
    assert len(Bench(run, tmp_path, {}).inputs["seen"]) == 1
    config = replace(run.config, held_out_batches=4)
    more = Bench(replace(run, config=config), tmp_path, {})
    assert len(more.inputs["seen"]) == 4
    monkeypatch.setattr(noisy, "ALL_TOKENS", 64 * (4 + 6))  # 64 examples of this model
    bounded = Bench(replace(run, config=config), tmp_path, {})
    assert len(bounded.inputs["seen"]) == 2


def test_single_images_are_timed_where_two_models_fit_a_device(make_run, tmp_path, monkeypatch):
    run = rows.read(make_run())
    assert Bench(run, tmp_path, {}).timed == (1, 32)
    monkeypatch.setattr(measure, "fit_alone", lambda mesh, needed: needed < 10)
    assert Bench(run, tmp_path, {}).timed == (32,)


def test_times_are_taken_for_so_long_and_no_longer(make_run, tmp_path, monkeypatch):
    run = rows.read(make_run())
    bench = Bench(run, tmp_path, {})
    called = []

    class Counts(noisy.Program):
        def __call__(self, params, inputs):
            called.append(1)
            return super().__call__(params, inputs)

    program = Counts(run.teacher.config)
    models, inputs = [(program, bench.params(run.teacher))], bench.inputs["seen"][0]
    for seconds, rounds in ((100, latency.ROUNDS), (0, latency.FEWEST)):
        called.clear()
        monkeypatch.setattr(latency, "SECONDS", seconds)
        latency.milliseconds(models, inputs, 32)
        assert len(called) == 1 + rounds  # the first compiles


def test_captions_of_any_kind_are_drawn():
    """Long ones by their beginning, and dollars as such; images keep their shape."""
    captions = ["a $5 bill beside a \\frac$ sign", "word " * 200, "x" * 300]
    images = np.zeros((3, 160, 240, 3), np.uint8)
    teacher = rows.Row("teacher", "", ModelConfig(), Path())
    found = Measured({}, {"seen": 0.0}, tuple(map(Asked, captions)), images)
    figure = pictures.samples([teacher], {teacher: found})
    figure.savefig(io.BytesIO(), format="png")
    assert figure.dpi == 220
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "\\frac$" in texts[1] and max(text.count("\n") for text in texts) == 3
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(1.5)
