"""What a report will need is asked before anything trains."""

from dataclasses import dataclass, replace
from functools import partial

import pytest

import train
from d2m_jax.config import (
    AutoencoderConfig,
    CLIPConfig,
    ConfigError,
    IconsConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    StageConfig,
    T5Config,
)
from d2m_jax.data.protocol import Asked
from d2m_jax.data.source import open_data
from d2m_jax.encoders import Encoders
from d2m_jax.report.check import check_report
from d2m_jax.training import run, stage
from tests.models import toy
from tests.report import conftest

CONFIG = RunConfig(name="a", teacher="b", stages={"moe": StageConfig()})


@dataclass
class Pictures:
    """Data of this one prompt."""

    caption: str
    encoded: bool = True
    tells_padding: bool = True
    sizes: tuple[tuple[int, int], ...] = ((48, 48), (48, 96))

    def fingerprint(self):
        return self.caption

    def vocabulary(self):
        return ()

    def batches(self, *arguments):
        return iter(())

    def prompts(self, count, held_out=False):
        return [Asked(self.caption)] if self.caption else []


def checked(model: ModelConfig, caption="red balloon"):
    data = Pictures(caption)
    check_report(CONFIG, model, data, data, Encoders(model, load=False))


@pytest.mark.parametrize(
    "task, message",
    [
        (IconsConfig(pictograms=48, train_size=20), "train_size = 20: expected at least"),
        (IconsConfig(pictograms=3), "too few to combine held-out pairs"),
    ],
)  # fmt: skip
def test_what_the_report_draws_of_the_task(task, message):
    model = conftest.model()
    data = open_data(task, model)
    with pytest.raises(ConfigError, match=message):
        check_report(CONFIG, model, data, data, Encoders(model))


def test_prompts_that_the_model_cannot_read():
    checked(conftest.model())
    checked(conftest.model(), "")  # no prompts, no samples
    with pytest.raises(ConfigError, match="unknown word 'baloon', did you mean balloon"):
        checked(conftest.model(), "red baloon")


def test_encoders_are_asked_for_before_they_draw(tmp_path, capsys):
    model = ModelConfig(
        toy.DENSE,
        PromptsConfig(T5Config(), CLIPConfig()),
        AutoencoderConfig(),
        str(tmp_path / "encoders"),
    )
    checked(model)
    assert f"will have no samples: {model.encoders} not found" in capsys.readouterr().err
    (tmp_path / "encoders").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer: expected a tokenizer .*, found none"):
        checked(model)
    with pytest.raises(ConfigError, match="image size 1000 × 1024: expected multiples of 16"):
        checked(replace(model, image=AutoencoderConfig(height=1000)))


def test_before_anything_trains(make_run, monkeypatch):
    """By train.py too: a run that will fail in its report says so at once. Pairs that never train
    are what it alone draws."""
    directory = make_run()
    teacher = directory.parent / "teacher"
    config = replace(
        CONFIG, teacher=str(teacher), data=IconsConfig(pictograms=3),
        stages={"moe": StageConfig(batch_size=8)},
    )  # fmt: skip

    def begins(*arguments):
        raise AssertionError("a student was cut")

    monkeypatch.setattr(stage, "make_student", begins)
    monkeypatch.setattr("d2m_jax.cores.use_cores", lambda quick: None)
    monkeypatch.setattr("d2m_jax.command_line.load_config", lambda file: config)
    with pytest.raises(ConfigError, match="held-out pairs"):
        train.main(["config.py", "--run-dir", str(directory.parent / "new")])
    with pytest.raises(ConfigError, match="held-out pairs"):
        run.run(config, directory.parent / "another", partial(check_report, config))


@pytest.mark.parametrize(
    "caption, message", [("red baloon", "unknown word 'baloon'"), ("", "the data have no prompts")]
)
def test_so_is_what_sample_grids_draw(make_run, monkeypatch, caption, message):
    directory = make_run().parent
    stages = {"moe": StageConfig(batch_size=8, sample_every=1)}
    config = replace(CONFIG, teacher=str(directory / "teacher"), stages=stages)
    monkeypatch.setattr(run, "open_data", lambda *arguments: Pictures(caption))
    with pytest.raises(ConfigError, match=message):
        run.run(config, directory / "new")
