"""From prompts to images: independence of the batch, given noise, errors in one line."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from d2m_jax.config import ConfigError, ModelConfig, PixelsConfig, StackConfig, WordsConfig
from d2m_jax.models.parameters import is_unstacked
from d2m_jax.sampling.pipeline import Pipeline, load_pipeline, noise
from d2m_jax.weights import model_directory
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


def test_seed_and_given_noise(pipe, images):
    channels = CONFIG.transformer.in_channels
    given = noise(3, 5, 12, channels)
    np.testing.assert_array_equal(pipe(PROMPTS, latents=given, seed=9), images)
    assert np.abs(pipe(PROMPTS, seed=4) - images).max() > 0.05
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
        (["red"], {"width": -2}, "image size 6 × -2"),
        (["red"], {"steps": 0}, "steps = 0: expected at least 1"),
        (["red"], {"top_k": 7}, "top_k = 7: expected 0 to 6"),
        (["red"], {"top_k": -1}, "top_k = -1: expected 0 to 6"),
        (["red"], {"reuse": 0}, "reuse = 0: expected at least 1"),
        (["red"], {"latents": np.zeros((1, 5, 12), np.float32)}, "latents: found shape"),
        (["red"], {"latents": np.zeros((2, 12, 12), np.float32)}, "latents: found shape"),
    ],
)
def test_bad_input_is_one_line(pipe, prompts, options, message):
    with pytest.raises(ConfigError) as error:
        pipe(prompts, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


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
    with pytest.raises(ConfigError, match="quantize = int3: expected int8 or fp8, or None"):
        load_pipeline(tmp_path / "model", quantize="int3")
