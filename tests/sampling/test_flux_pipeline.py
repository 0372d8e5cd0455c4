"""A whole FluxPipeline against diffusers': prompts and latents in, pixels out, all in float32."""

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.sampling.pipeline import load_pipeline, noise
from tests.sampling.flux_oracle import tiny_pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

PROMPTS = ["red anchor left of blue earth", "blue earth and a red thing"]


@pytest.fixture(scope="module", params=["dev", "schnell"])
def both(request, tmp_path_factory):
    """Diffusers' pipeline, ours from its folder."""
    dev = request.param == "dev"
    theirs = tiny_pipeline(guidance=dev, dynamic=dev)
    folder = tmp_path_factory.mktemp(request.param) / "flux"
    theirs.save_pretrained(folder)
    return theirs, load_pipeline(folder)


def run(both, height, width, steps, latents=None, **options):
    theirs, ours = both
    tokens = (height // 4) * (width // 4)
    latents = np.array(noise(0, len(PROMPTS), tokens, 64)) if latents is None else latents
    expected = theirs(
        PROMPTS,
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=torch.from_numpy(latents),
        max_sequence_length=12,
        output_type="np",
        guidance_scale=options.get("guidance", 3.5),
        negative_prompt=options.get("negative_prompts"),
        true_cfg_scale=options.get("true_cfg", 1.0),
    ).images
    found = ours(
        PROMPTS,
        height=height,
        width=width,
        steps=steps,
        latents=latents,
        max_sequence_length=12,
        **options,
    )
    assert found.shape == expected.shape and expected.std() > 0.02
    return np.abs(found - expected).max()


def test_images_are_diffusers_images(both):
    """1e-4 in pixels of [0, 1]: float32 rounding through four steps and the decoder."""
    assert run(both, 16, 24, 4) <= 1e-4
    assert run(both, 32, 8, 3, guidance=1.5) <= 1e-4


def test_true_guidance_is_diffusers(both):
    negative = ["left", "of a blue anchor"]
    assert run(both, 16, 16, 3, negative_prompts=negative, true_cfg=2.5) <= 1e-4


def test_what_the_folder_says_is_what_the_pipeline_uses(both):
    theirs, ours = both
    dev = theirs.transformer.config.guidance_embeds
    assert ours.config.shift == (None if dev else 1.0)
    assert ours.config.sample_steps == (28 if dev else 4)
    assert ours.config.transformer.axes_dim == (8, 12, 12)


def test_a_folder_that_lacks_a_part_is_told(both, tmp_path):
    theirs, _ = both
    theirs.transformer.save_pretrained(tmp_path / "flux" / "transformer")
    with pytest.raises(ConfigError, match="expected a folder text_encoder in it"):
        load_pipeline(tmp_path / "flux")
