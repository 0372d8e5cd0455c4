"""A CLIPModel's folder: read as transformers saved it, and what is wrong with it told."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.models.clip_vision import model_of
from d2m_jax.named_arrays import names
from d2m_jax.weights.torch_files import clip_folder
from tests.models.test_clip_vision import TINY, of_transformers

torch = pytest.importorskip("torch")


@pytest.fixture
def folder(tmp_path):
    of_transformers().save_pretrained(tmp_path)
    return tmp_path


def change(file, **fields):
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(value | fields))


def test_what_was_saved_is_read(folder):
    theirs = of_transformers()
    config, params = clip_folder.load_clip(folder)
    assert config == TINY
    kernel = names(params)["visual_projection.kernel"]
    assert np.array_equal(kernel, theirs.visual_projection.weight.detach().numpy().T)
    images = jnp.ones((1, 24, 24, 3))
    assert model_of(config, params).images(images).shape == (1, 20)
    assert clip_folder.config_of(folder)[1] == clip_folder.Preprocessor(24, 24)


def test_older_files(folder):
    """Numbers of pixels by themselves, as the hub has them, and what transformers leaves out."""
    change(folder / "preprocessor_config.json", size=30, crop_size=24, image_mean=[0, 0, 0.5])
    found = clip_folder.config_of(folder)[1]
    assert found == clip_folder.Preprocessor(30, 24, (0.0, 0.0, 0.5), clip_folder.STD)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"model_type": "siglip"}, "model_type = 'siglip', expected 'clip'"),
        ("config.json", {"projection_dim": 21}, "projection.weight"),
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}, "vision_config: hidden_act = "),
        ("preprocessor_config.json", {"resample": 2}, "resample = 2, expected 3"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize = False, expected"),
        ("preprocessor_config.json", {"crop_size": 30}, "crop_size = 30, expected 24 × 24"),
        ("preprocessor_config.json", {"size": 20}, "size = 20, expected at least"),
        ("preprocessor_config.json", {"image_std": [1]}, "image_std = .*expected three numbers"),
    ],
)
def test_what_is_wrong_is_named(folder, file, fields, message):
    change(folder / file, **fields)
    with pytest.raises(ConfigError, match=message):
        clip_folder.config_of(folder)


def test_a_text_tower_alone_is_refused(folder):
    """As FLUX.1's text_encoder folder is."""
    of_transformers().text_model.save_pretrained(folder / "text")
    (folder / "text" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ConfigError, match="tensors do not fit this model"):
        clip_folder.config_of(folder)
