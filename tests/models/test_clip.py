"""CLIP's text encoder: equal to transformers', which token it pools, half precision."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import CLIPConfig
from d2m_jax.models.clip import initialise, model_of
from d2m_jax.weights.keys.text_encoder_keys import clip_config, clip_keys, clip_tensors
from tests.models import oracle
from tests.seed import generator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

END = 41
TINY = CLIPConfig(
    vocab_size=45,  # some ids lie above the end's, as those of textual inversion do
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    eos_token_id=END,
)


@pytest.fixture(scope="module")
def theirs():
    kind = transformers.CLIPTextConfig(**vars(TINY), bos_token_id=40)
    return oracle.shaken(transformers.CLIPTextModel(kind))


@pytest.fixture(scope="module")
def params(theirs):
    config = clip_config(theirs.config.to_dict(), "config.json")
    assert config == TINY
    tensors = clip_tensors(oracle.tensors(theirs))
    return oracle.imported(clip_keys(config), tensors, partial(initialise, config, 0))


@partial(jax.jit, static_argnums=(0, 3))
def run(config, params, ids, dtype=jnp.float32):
    return model_of(config, params, dtype)(ids)


def draw(batch, length):
    """Captions as CLIP's tokenizer pads them: with the end's id."""
    rng = generator(length)
    ids = rng.integers(3, 40, (batch, length)).astype(np.int32)
    for row, words in zip(ids, rng.integers(0, length, batch), strict=True):
        row[words:] = END
    return ids


def expect(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).pooler_output.numpy()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (5, 9), (2, 77)])
def test_equals_transformers(theirs, params, batch, length):
    """Up to float32 sums in another order; a wrong formula is off by 1e-3 and more."""
    ids = draw(batch, length)
    assert oracle.relative(run(TINY, params, ids), expect(theirs, ids)) < 1e-5


@pytest.mark.parametrize("end", [END, 2])
def test_pools_the_token_that_transformers_pools(theirs, params, end, monkeypatch):
    """The first end, or where config.json says 2, as FLUX.1's does, the first of the largest id."""
    ids = np.int32(
        [
            [40, 7, 8, END, END, END],
            [40, 7, 44, 8, END, END],  # an id above the end's
            [40, 44, 7, 44, 8, END],
            [40, 7, 8, 9, 10, 11],  # none
        ]
    )
    monkeypatch.setattr(theirs, "eos_token_id", end)
    config = replace(TINY, eos_token_id=end)
    ours = run(config, params, ids)
    assert oracle.relative(ours, expect(theirs, ids)) < 1e-5
    # what comes after the pooled token is not seen
    for row, last in enumerate([3, 4, 5, 0] if end == END else [3, 2, 1, 5]):
        ids[row, last + 1 :] = 3
    np.testing.assert_array_equal(run(config, params, ids), ours)


def test_too_many_tokens_is_an_error(params):
    with pytest.raises(ValueError, match="78 tokens, expected at most 77"):
        run(TINY, params, draw(1, 78))


def test_large_has_all_its_parameters():
    shapes = jax.eval_shape(partial(initialise, CLIPConfig(), 0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) == 123_060_480


def test_the_program_does_not_grow_with_depth_and_its_products_are_half_precision():
    def trace(config):
        shapes = jax.eval_shape(partial(initialise, config, 0))
        ids = jax.ShapeDtypeStruct((2, 77), jnp.int32)
        return jax.make_jaxpr(lambda p, ids: model_of(config, p, jnp.bfloat16)(ids))(shapes, ids)

    large, two = trace(CLIPConfig()), trace(replace(CLIPConfig(), num_hidden_layers=2))
    operations = oracle.operations(large.jaxpr)
    assert len(operations) == len(oracle.operations(two.jaxpr))
    products = [e for e in operations if e.primitive.name == "dot_general"]
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype("bfloat16")}
    assert large.out_avals[0].shape == (2, 768) and large.out_avals[0].dtype == jnp.float32


def test_half_precision_is_near(params):
    ids = draw(5, 9)
    full, half = (run(TINY, params, ids, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.float32
    # three layers of products with 8 bits of mantissa
    assert 1e-4 < oracle.relative(half, full) < 0.03
