"""From a torch FluxPipeline to ours, through all stages of distillation, and back to torch."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from d2m_jax import encoders
from d2m_jax.config import (
    CacheConfig,
    ConfigError,
    GroupsConfig,
    IconsConfig,
    LossConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
)
from d2m_jax.data import generate
from d2m_jax.encoders import Encoders
from d2m_jax.evaluate import latency
from d2m_jax.models import experts
from d2m_jax.report import write
from d2m_jax.sampling.noise import noise
from d2m_jax.sampling.pipeline import load_pipeline
from d2m_jax.training import run
from d2m_jax.weights import convert, load_config
from tests.sampling.flux_oracle import tiny_pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPTS = ["red anchor left of blue earth", "blue earth"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A FluxPipeline as diffusers saves it."""
    path = tmp_path_factory.mktemp("torch") / "flux"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """Ours, which reads prompts of 16 tokens: [dev]'s 512 would only take time."""
    path = tmp_path_factory.mktemp("ours") / "flux"
    convert.convert(folder, path)
    config = json.loads((path / "config.json").read_text())
    config["text"]["length"] = 16
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def images(model):
    return sample(model)


def sample(path):
    return load_pipeline(path)(PROMPTS, steps=2, seed=1, max_sequence_length=12)


def test_a_model_directory_gives_the_same_images(folder, model, images):
    np.testing.assert_array_equal(sample(folder), images)


def test_a_model_directory_can_move(model, images, tmp_path):
    model.rename(tmp_path / "moved")
    try:
        assert load_config(tmp_path / "moved").encoders == str(tmp_path / "moved" / "encoders")
        np.testing.assert_array_equal(sample(tmp_path / "moved"), images)
    finally:
        (tmp_path / "moved").rename(model)


def test_encoders_are_checked_without_being_loaded(model, tmp_path):
    config = load_config(model)
    folder = tmp_path / "encoders"
    shutil.copytree(str(config.encoders), folder)
    checked = Encoders(replace(config, encoders=str(folder)), load=False)
    checked.check(PROMPTS)
    assert checked.size == 0
    deeper = replace(config.image, layers_per_block=3)
    with pytest.raises(ConfigError, match=r"encoders/vae: .* missing: decoder\.up_blocks"):
        Encoders(replace(config, image=deeper), load=False).check(PROMPTS)
    for part in ("vae", "text_encoder_2"):
        shutil.move(folder / part, tmp_path / part)
        with pytest.raises(ConfigError, match=f"encoders/{part}"):
            checked.check(PROMPTS)
        shutil.move(tmp_path / part, folder / part)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ConfigError, match=r"tokenizer: expected a tokenizer"):
        Encoders(checked.config, load=False).check(PROMPTS)


def test_export_is_a_pipeline_of_diffusers(model, images, tmp_path):
    convert.convert(model, tmp_path / "back", export="diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "back")
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        PROMPTS,
        height=16,
        width=16,
        num_inference_steps=2,
        latents=torch.from_numpy(np.array(noise(1, 2, 16, 64))),
        max_sequence_length=12,
        guidance_scale=3.5,
        output_type="np",
    ).images
    np.testing.assert_allclose(found, images, atol=1e-4)  # float32 rounding


def stage(**fields) -> StageConfig:
    return StageConfig(steps=2, batch_size=4, log_every=1, evaluate_every=2, **fields)


def distillation(model, **stages) -> RunConfig:
    return RunConfig(
        name="flux",
        teacher=str(model),
        data=IconsConfig(task="single", pictograms=40),
        sparsify=SparsifyConfig(batches=2, batch_size=4, tokens=64, routed_scale=0.0),
        stages=stages,
        held_out_batches=1,
        evaluate_prompts=12,
        sweep_top_k=(),
    )


def test_all_stages_with_its_own_encoders_in_the_loop(model, images, tmp_path):
    groups = GroupsConfig(keep_double=2, single_blocks=2, single_active=1)
    config = distillation(
        model,
        shared=stage(train=("*.shared.*",), top_k=0),
        moe=stage(train=("*.experts.*", "*.gate.*", "*mlp.scale"), sample_every=2),
        mob=stage(groups=groups, loss=LossConfig(feature=0.0)),
    )
    run.run(config, tmp_path / "run")
    student = load_config(tmp_path / "run" / "model")
    assert student.encoders == str(model / "encoders")
    assert student.transformer.single[0].mixes and student.transformer.double[0].ffn == "moe"
    assert (tmp_path / "run" / "samples" / "moe_000002.png").is_file()
    found = sample(tmp_path / "run" / "model")
    assert found.shape == images.shape and np.isfinite(found).all()
    assert np.abs(found - images).max() > 1e-3  # another model, else nothing was cut
    everything = load_pipeline(model)
    assert replace(student, transformer=everything.config.transformer) == everything.config


def test_from_prompts_alone(model, tmp_path, monkeypatch):
    """The teacher makes the data, in two sizes; neither T5 nor the autoencoder is loaded to cut the
    student and to train it. The stages and the kernels are those of the test above."""
    monkeypatch.setattr(experts, "asked", lambda: "reference")
    (tmp_path / "prompts.txt").write_text("red anchor\nblue earth\nred earth\nblue anchor\n")
    monkeypatch.setattr(generate, "use_cores", lambda: None)
    cache = str(tmp_path / "cache")
    command = f"{model} --prompts {tmp_path / 'prompts.txt'} --output {cache} --images_per_prompt 6"
    command += " --sizes 16x16 16x24 --steps 2 --guidance 2 5"
    generate.main(command.split())
    config = replace(
        distillation(model, moe=stage(loss=LossConfig(feature=0.0))),
        data=CacheConfig(path=cache, validation=4),
        fixed_times=True,
        held_out_batches=2,
    )

    def no_encoder(*arguments):
        raise AssertionError("an encoder was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(encoders, "load_encoder", no_encoder)
        run.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    validated = [line for line in map(json.loads, lines) if "validation" in line]
    assert len(validated) == 2 and all(np.isfinite(line["validation"]) for line in validated)
    for kind in ("flow", "distillation"):
        by_time = validated[-1][f"validation_{kind}_at_half_eighths"]
        assert len(by_time) == 8 and np.mean(by_time) == pytest.approx(
            validated[-1][f"validation_{kind}_half_eighths"], rel=1e-5
        )
    found = sample(tmp_path / "run" / "model")
    assert found.shape[0] == 2 and np.isfinite(found).all()


@pytest.mark.slow
def test_the_report_with_its_own_encoders(model, tmp_path, monkeypatch):
    """Whose batches are cut over all devices, as the models that meet them must be."""
    run.run(distillation(model, moe=stage()), tmp_path / "run")
    monkeypatch.setattr(latency, "ROUNDS", 1)
    write.write(tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == [None, "moe"]
    assert rows[1]["error"]["seen"] > 0
