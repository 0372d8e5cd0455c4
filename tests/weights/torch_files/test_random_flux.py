"""The tiny random FluxPipeline is one to diffusers too, which draws the same images with it."""

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.sampling.noise import noise
from d2m_jax.sampling.pipeline import load_pipeline
from d2m_jax.weights import load_config
from d2m_jax.weights.convert import convert
from d2m_jax.weights.torch_files.random_flux import random_flux

PROMPTS = ["a red fox", "an old lighthouse at night"]


def test_diffusers_draws_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    folder = random_flux(tmp_path / "flux", seed=1)
    theirs = diffusers.FluxPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    sizes = {"height": 16, "width": 24, "max_sequence_length": 32}
    expected = theirs(
        PROMPTS,
        **sizes,
        num_inference_steps=2,
        latents=torch.from_numpy(np.array(noise(0, 2, 6, 64))),
        output_type="np",
    ).images
    found = load_pipeline(folder)(PROMPTS, steps=2, **sizes)
    assert found.shape == (2, 16, 24, 3) and expected.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)  # float32 rounding
    assert np.abs(found[0] - found[1]).mean() > 0.01  # noise and prompt


def test_a_seed_gives_its_own_weights_and_nothing_is_replaced(tmp_path):
    file = "transformer/diffusion_pytorch_model.safetensors"
    first, other = (random_flux(tmp_path / str(i), seed=i) for i in (0, 1))
    again = random_flux(tmp_path / "again")
    assert (first / file).read_bytes() == (again / file).read_bytes()
    assert (first / file).read_bytes() != (other / file).read_bytes()
    with pytest.raises(ConfigError, match="0: exists"):
        random_flux(first)
    with pytest.raises(ConfigError, match="^seed = -1: expected a whole number from 0 to"):
        random_flux(tmp_path / "none", seed=-1)
    assert not (tmp_path / "none").exists()


def test_a_file_that_does_not_tell_the_axes_says_what_was_assumed(tmp_path, capfd):
    """BFL's layout has no place for them; a folder of diffusers has."""
    convert(random_flux(tmp_path / "flux"), tmp_path / "bfl.safetensors", export="bfl")
    assert "axes_dim" not in capfd.readouterr().err
    convert(tmp_path / "bfl.safetensors", tmp_path / "model")
    said = "how the 32 elements of a head are divided"
    assert said in capfd.readouterr().err
    assert load_config(tmp_path / "model").transformer.axes_dim == (4, 14, 14)
