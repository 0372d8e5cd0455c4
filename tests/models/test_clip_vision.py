"""Both of CLIP's towers: features equal to transformers' CLIPModel's, half precision near."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import CLIPConfig, CLIPModelConfig, CLIPVisionConfig
from d2m_jax.models.clip_vision import initialise, model_of
from d2m_jax.weights.keys.text_encoder_keys import (
    clip_model_config,
    clip_model_keys,
    clip_model_tensors,
)
from tests.models import oracle
from tests.seed import SEED, generator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

END = 44
TINY = CLIPModelConfig(
    CLIPConfig(45, 32, 56, 2, 4, 12, END),
    CLIPVisionConfig(48, 80, 3, 4, image_size=24, patch_size=8),
    projection_dim=20,
)


def of_transformers(config=TINY):
    torch.manual_seed(SEED)
    text, vision = vars(config.text), vars(config.vision)
    kind = transformers.CLIPConfig(
        text_config=text | {"bos_token_id": 1, "pad_token_id": 0},
        vision_config=vision,
        projection_dim=config.projection_dim,
    )
    return oracle.shaken(transformers.CLIPModel(kind))


@pytest.fixture(scope="module")
def theirs():
    return of_transformers()


@pytest.fixture(scope="module")
def params(theirs):
    config = clip_model_config(theirs.config.to_dict(), "config.json")
    assert config == TINY
    tensors = clip_model_tensors(oracle.tensors(theirs))
    return oracle.imported(clip_model_keys(config), tensors, partial(initialise, config, 0))


@partial(jax.jit, static_argnums=3)
def features(params, ids, images, dtype=jnp.float32):
    model = model_of(TINY, params, dtype)
    return model.texts(ids), model.images(images)


def test_features_are_transformers_features(theirs, params):
    rng = generator()
    ids = rng.integers(2, 40, (3, 12)).astype(np.int32)
    ids[:, 7:] = END
    images = rng.normal(size=(3, 24, 24, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(ids).long(),
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        )
    texts, mine = features(params, ids, images)
    np.testing.assert_allclose(texts, expected.text_embeds, atol=2e-6)
    np.testing.assert_allclose(mine, expected.image_embeds, atol=2e-6)
    assert np.std(expected.image_embeds.numpy(), axis=0).max() > 0.01  # images tell
    half = features(params, ids, images, jnp.bfloat16)
    for a, b in zip(half, (texts, mine), strict=True):
        assert 0 < oracle.relative(a, np.asarray(b)) < 0.02
