"""From prompts to images: independence of the batch, given noise, errors in one line."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import progress
from d2m_jax.config import ConfigError, ModelConfig, PixelsConfig, StackConfig, WordsConfig
from d2m_jax.models.parameters import is_unstacked
from d2m_jax.sampling import pace
from d2m_jax.sampling.noise import noise
from d2m_jax.sampling.pipeline import Pipeline, load_pipeline
from d2m_jax.sharding import local_mesh, put_parameters
from d2m_jax.weights.directory import model_directory
from tests.models import toy

CONFIG = ModelConfig(
    transformer=replace(toy.SPARSE, in_channels=12, context_in_dim=16, vec_in_dim=16),
    text=WordsConfig(dim=16, length=3, vocabulary=("red", "blue", "anchor", "earth")),
    image=PixelsConfig(height=6, width=8, patch=2),
    sample_steps=2,
)
PROMPTS = ["red anchor", "blue earth", "earth", "red earth", "blue anchor"]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: 0.5 * a, toy.params(CONFIG.transformer))


@pytest.fixture(scope="module")
def pipe(params):
    return Pipeline(CONFIG, params)


@pytest.fixture(scope="module")
def images(pipe):
    return pipe(PROMPTS, seed=3)


def test_images(images):
    assert images.shape == (5, 6, 8, 3) and images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    assert len({image.tobytes() for image in images}) == 5


def test_an_image_does_not_depend_on_its_batch(pipe, images):
    """Up to float rounding: a batch of another size is another program."""
    np.testing.assert_allclose(pipe(PROMPTS, seed=3, batch_size=2), images, atol=1e-5)
    others = [PROMPTS[0], "blue", "red", "anchor", PROMPTS[4]]
    again = pipe(others, seed=3)
    np.testing.assert_array_equal(again[[0, 4]], images[[0, 4]])
    assert np.abs(again[1] - images[1]).max() > 0.01


@pytest.mark.parametrize("reuse", [1, 2])
def test_progress_is_told_and_changes_no_bit(pipe, monkeypatch, capsys, reuse):
    monkeypatch.setattr(pace, "LARGE", 0)
    monkeypatch.setattr(pace, "SECONDS", 0)  # one turn at a time
    monkeypatch.setattr(progress, "PATIENCE", -1)
    options = {"seed": 3, "steps": 5, "batch_size": 2, "reuse": reuse}
    expected = pipe(PROMPTS, **options)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(pipe(PROMPTS, progress=True, **options), expected)
    lines = capsys.readouterr().err.splitlines()  # from the second part on there is a rate
    parts = [0, 2, 4, 5] if reuse == 2 else range(6)
    done = [5 * batch + steps for batch in range(3) for steps in parts[1:]]
    assert [line.split(" steps")[0] for line in lines] == [f"sampling: {n} of 15" for n in done[1:]]


def test_a_caption_that_is_none_of_the_task_s_is_answered_with_one(pipe):
    for prompt in ("a cat", "red anchor earth blue"):
        with pytest.raises(ConfigError, match="caption.*; a whole caption is 'red anchor'$"):
            pipe(prompt)


def test_seed_and_given_noise(pipe, images):
    channels = CONFIG.transformer.in_channels
    given = noise(3, 5, 12, channels)
    np.testing.assert_array_equal(pipe(PROMPTS, latents=given, seed=9), images)
    assert np.abs(pipe(PROMPTS, seed=4) - images).max() > 0.05
    # 32 bits of seed are 32 bits of noise
    large = [noise(seed, 1, 12, channels) for seed in (0, 2**31 - 1, 2**31, 2**32 - 1)]
    assert len({np.asarray(a).tobytes() for a in large}) == 4
    # noise of prompt i does not depend on how many there are
    np.testing.assert_array_equal(noise(3, 2, 12, channels), given[:2])
    assert np.std(given) == pytest.approx(1, abs=0.1)


def test_options_reach_the_model(pipe, images):
    assert np.abs(pipe(PROMPTS, seed=3, guidance=1.0) - images).max() > 1e-3
    assert np.abs(pipe(PROMPTS, seed=3, steps=3) - images).max() > 1e-3
    assert np.abs(pipe(PROMPTS, seed=3, top_k=0) - images).max() > 1e-3
    assert np.abs(pipe(PROMPTS, seed=3, reuse=2) - images).max() > 1e-4
    assert pipe(PROMPTS[:1], height=4, width=10).shape == (1, 4, 10, 3)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["red ancor"], {}, "'ancor', did you mean anchor?"),
        (["red red red red"], {}, "4 words, expected at most 3"),
        ([], {}, "prompts: found none"),
        (["red"], {"height": 7}, "image size 7 × 8: expected multiples of 2"),
        (["red"], {"width": -2}, "width = -2: expected a whole number from 1 to"),
        (["red"], {"steps": 0}, "steps = 0: expected a whole number from 1 to 1000"),
        (["red"], {"top_k": 7}, "top_k = 7: expected 0 to 6"),
        (["red"], {"top_k": -1}, "top_k = -1: expected a whole number of at least 0"),
        (["red"], {"top_k": (1, 2, 3)}, "top_k: found 3 numbers, expected one per step at most"),
        (["red"], {"reuse": 0}, "reuse = 0: expected a whole number of at least 1"),
        (["red"], {"guidance": float("nan")}, "guidance = nan: expected a number of at least 0"),
        (["red"], {"max_sequence_length": 3}, "this model has no T5"),
        (["red"], {"tile": 8}, "tile = 8: this model has no autoencoder, expected none"),
        (["red"], {"negative_prompts": ["blue"] * 2}, "negative_prompts: found 2, expected 1"),
        (["red"], {"latents": np.full((1, 12, 12), np.nan)}, "latents[0]: found NaN or infinity"),
        (["red"], {"latents": np.zeros((1, 5, 12), np.float32)}, "latents: found shape"),
        (["red"], {"latents": np.zeros((2, 12, 12), np.float32)}, "latents: found shape"),
        (
            ["red"],
            {"num_inference_steps": 4},
            "num_inference_steps: unknown option, here it is ste",
        ),
        ((), {"prompt": "red"}, "prompt: unknown option, here it is prompts"),
        (["red"], {"hieght": 4}, "hieght: unknown option, did you mean height?"),
    ],
)
def test_bad_input_is_one_line(pipe, prompts, options, message):
    with pytest.raises(ConfigError) as error:
        pipe(prompts, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_prompts_come_in_any_form(pipe, images):
    one = pipe("red anchor", seed=3)
    assert one.shape == (1, 6, 8, 3)
    # another batch is another program: float rounding
    np.testing.assert_allclose(one, images[:1], atol=1e-5)
    for same in (tuple(PROMPTS), np.array(PROMPTS), (prompt for prompt in PROMPTS)):
        np.testing.assert_array_equal(pipe(same, seed=3), images)
    options = {"seed": 3, "true_cfg": 2.0}
    each = pipe(PROMPTS, negative_prompts=["earth"] * 5, **options)
    np.testing.assert_array_equal(pipe(PROMPTS, negative_prompts="earth", **options), each)
    assert np.abs(each - images).max() > 1e-3


def test_what_is_ignored_is_said_once(pipe, images, capsys):
    found = pipe(PROMPTS, seed=3, negative_prompts="earth")
    np.testing.assert_array_equal(found, images)
    pipe("red", true_cfg=3.0)
    assert capsys.readouterr().err.splitlines() == [
        "negative_prompts: ignored, expected true_cfg above 1, found 1.0",
        "true_cfg = 3.0: ignored, expected negative_prompts (one may be empty)",
    ]
    pipe("red", guidance=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_images_of_nan_are_refused(params, bad):
    broken = params | {"final_layer": jax.tree.map(lambda a: a * bad, params["final_layer"])}
    with pytest.raises(ConfigError, match="images: found NaN or infinity.* ran in float32"):
        Pipeline(CONFIG, broken)(["red"])


PROGRAMS = ("encoding_captions", "denoising", "decoding", "_noise")


def test_other_numbers_of_prompts_and_steps_are_the_same_program(pipe, caplog):
    """Three and four prompts, up to 32 steps, with experts by a schedule and reused."""

    def compiled():
        lines = [record.getMessage() for record in caplog.records]
        done = [line for line in lines if line.startswith("Finished XLA compilation of")]
        return [name for name in PROGRAMS for line in done if f"jit({name})" in line]

    options = {"top_k": (4, 1), "reuse": 2, "seed": 1}
    jax.clear_caches()
    caplog.set_level(logging.DEBUG, "jax._src.dispatch")
    whole = pipe(PROMPTS[:4], steps=5, **options)
    assert sorted(compiled()) == sorted(PROGRAMS)
    caplog.clear()
    np.testing.assert_array_equal(pipe(PROMPTS[:3], steps=5, **options), whole[:3])
    pipe(PROMPTS[:4], steps=32, guidance=2, **options)
    pipe(PROMPTS, steps=2, batch_size=4, **options)  # in two batches
    assert compiled() == []


@pytest.mark.parametrize(
    ("prompts", "asked", "sizes"),
    [
        *[(1, None, [1]), (3, None, [4]), (5, None, [8]), (17, None, [24]), (56, None, [56])],
        *[(5, 6, [6]), (7, 4, [4, 4]), (7, 6, [4, 4]), (169, None, [170]), (171, None, [88] * 2)],
    ],
)
def test_batches_are_equal_and_filled_up(pipe, monkeypatch, prompts, asked, sizes):
    """To a power of two or a multiple of 8, never above what was asked for or 2048 tokens."""
    if jax.device_count() > 1:
        pytest.skip("each device has samples")
    seen = []

    def none(*arguments):
        seen.append(len(arguments[6]))
        return arguments[6]

    monkeypatch.setattr("d2m_jax.sampling.pipeline.denoising", none)
    assert len(pipe(["red"] * prompts, batch_size=asked)) == prompts
    assert seen == sizes


def test_it_says_what_it_is(pipe):
    said = repr(pipe)
    total = sum(a.size for a in jax.tree.leaves(pipe.params))
    assert f"Pipeline: {total / 1e3:.3f} k parameters" in said and said.count("\n") == 3
    assert "2 of 6 normal ones" in said and "float32" in said and "4 words" in said


def test_a_dense_model_has_no_top_k():
    config = replace(CONFIG, transformer=replace(CONFIG.transformer, double=toy.DENSE.double))
    config = replace(config, transformer=replace(config.transformer, single=toy.DENSE.single))
    with pytest.raises(ConfigError, match="no MoE layers"):
        Pipeline(config, {})(["red"], top_k=1)
    with pytest.raises(ConfigError, match="reuse = 2: this model has no MoE layers, expected 1"):
        Pipeline(config, {})(["red"], reuse=2)


def test_load_pipeline_restores_a_model_directory(tmp_path, params, images):
    model_directory.save(tmp_path / "model", CONFIG, params)
    np.testing.assert_array_equal(load_pipeline(tmp_path / "model")(PROMPTS, seed=3), images)


def test_blocks_of_a_mixture_are_loaded_apart(tmp_path):
    """They give the same images, and so do those of another model that is asked to."""
    mixed = replace(CONFIG.transformer, single=(StackConfig(1, 2, 1, ffn="moe"),))
    config = replace(CONFIG, transformer=mixed)
    model_directory.save(tmp_path / "model", config, toy.params(mixed))
    apart, stacked = (load_pipeline(tmp_path / "model", unrolled=u) for u in (None, False))
    assert is_unstacked(apart.params["single"]) and not is_unstacked(stacked.params["single"])
    options = {"seed": 3, "reuse": 2, "batch_size": 2}
    # float32 in another order, through two steps
    np.testing.assert_allclose(apart(PROMPTS, **options), stacked(PROMPTS, **options), atol=1e-4)


def test_load_pipeline_of_nothing(tmp_path):
    with pytest.raises(ConfigError, match="nothing"):
        load_pipeline(tmp_path / "nothing")


def test_quantised_once_and_near(tmp_path, params, images):
    model_directory.save(tmp_path / "model", CONFIG, params)
    given = load_pipeline(tmp_path / "model", quantize="int8")
    kernel = given.params["single"][0]["block"]["qkv"]["kernel"]
    assert kernel.qvalue.dtype == np.int8 and kernel.scale.shape == (2, 1, 1, 96)
    # rounding to eight bits, through two steps
    found = given(PROMPTS, seed=3)
    assert 1e-4 < np.abs(found - images).mean() < 0.02
    small = Pipeline(CONFIG, params, quantize="int8")  # the caller's parameters stay as they are
    np.testing.assert_array_equal(small(PROMPTS, seed=3), found)
    mine = put_parameters(local_mesh(), jax.tree.map(jnp.array, params))
    block = mine["single"][0]["block"]["qkv"]
    Pipeline(CONFIG, mine, quantize="int8", unrolled=True, release=True)
    assert block["kernel"].is_deleted() and block["bias"].is_deleted()
    with pytest.raises(ConfigError, match="quantize = int3: expected int8 or fp8, or None"):
        load_pipeline(tmp_path / "model", quantize="int3")
