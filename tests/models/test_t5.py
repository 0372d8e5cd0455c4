"""T5's encoder: equal to transformers', full size without its numbers, half precision."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import T5Config
from d2m_jax.models.t5 import initialise, model_of, position_buckets
from d2m_jax.weights.keys.text_encoder_keys import t5_config, t5_keys, t5_tensors
from tests import own_process
from tests.models import oracle
from tests.seed import generator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = T5Config(
    vocab_size=40,
    d_model=32,
    d_kv=12,  # heads together wider than the stream, as in no T5 that divides d_model
    d_ff=56,
    num_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
)


def torch_model(config=TINY):
    kind = transformers.T5Config(
        **vars(config), feed_forward_proj="gated-gelu", tie_word_embeddings=False
    )
    return oracle.shaken(transformers.T5EncoderModel(kind))


def params_of(model):
    config = t5_config(model.config.to_dict(), "config.json")
    tensors = t5_tensors(oracle.tensors(model))
    return config, oracle.imported(t5_keys(config), tensors, partial(initialise, config, 0))


@partial(jax.jit, static_argnums=(0, 3))
def run(config, params, ids, dtype=jnp.float32):
    return model_of(config, params, dtype)(ids)


@pytest.fixture(scope="module")
def theirs():
    return torch_model()


@pytest.fixture(scope="module")
def params(theirs):
    config, params = params_of(theirs)
    assert config == TINY
    return params


def draw(batch, length, vocab=TINY.vocab_size):
    return generator(length).integers(0, vocab, (batch, length), np.int32)


def expect(model, ids, **mask):
    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), **mask)[0].float().numpy()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (2, 64)])
def test_equals_transformers(theirs, params, batch, length):
    """Up to float32 sums in another order; a wrong formula is off by 1e-3 and more."""
    ids = draw(batch, length)
    assert oracle.relative(run(TINY, params, ids), expect(theirs, ids)) < 1e-5


def test_equals_transformers_with_the_buckets_of_flux():
    """Buckets and distance of every T5, one layer, long enough for the farthest bucket."""
    model = torch_model(
        replace(
            TINY,
            num_layers=1,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
        )
    )
    config, params = params_of(model)
    ids = draw(1, 300)
    assert oracle.relative(run(config, params, ids), expect(model, ids)) < 1e-5


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 1000), (32, 17)])
def test_buckets_are_transformers(buckets, farthest):
    """Every distance, those on the boundaries above all."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-1100, 1101)
    expected = T5Attention._relative_position_bucket(
        torch.from_numpy(distance), num_buckets=buckets, max_distance=farthest
    )
    config = T5Config(
        relative_attention_num_buckets=buckets, relative_attention_max_distance=farthest
    )
    np.testing.assert_array_equal(position_buckets(distance, config), expected.numpy())


def test_padding_is_attended_to(theirs, params):
    """FLUX.1's trap: diffusers' pipeline pads the prompt and passes no attention mask."""
    from diffusers import FluxPipeline

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁red", -1.0), ("▁anchor", -1.0)]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    pipeline = SimpleNamespace(text_encoder_2=theirs, tokenizer_2=tokenizer)
    with torch.no_grad():
        features = FluxPipeline._get_t5_prompt_embeds(
            pipeline, ["red anchor"], max_sequence_length=9, device="cpu", dtype=torch.float32
        ).numpy()
    ids = np.int32([[3, 4, 1, 0, 0, 0, 0, 0, 0]])
    ours = run(TINY, params, ids)
    assert oracle.relative(ours, features) < 1e-5
    masked = expect(theirs, ids, attention_mask=torch.from_numpy((ids > 0).astype(np.int64)))
    assert oracle.relative(ours[:, :3], masked[:, :3]) > 0.1


def test_xxl_has_all_its_parameters():
    shapes = jax.eval_shape(partial(initialise, T5Config(), 0))
    count = sum(a.size for a in jax.tree.leaves(shapes))
    assert count == 4_762_310_656
    # files that hold the embedding under both of its names are larger
    assert count + shapes["shared"]["embedding"].size == 4_893_906_944


def test_the_program_does_not_grow_with_depth_and_its_products_are_half_precision():
    def trace(config):
        shapes = jax.eval_shape(partial(initialise, config, 0))
        ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
        return jax.make_jaxpr(lambda p, ids: model_of(config, p, jnp.bfloat16)(ids))(shapes, ids)

    xxl, two = trace(T5Config()), trace(replace(T5Config(), num_layers=2))
    operations = oracle.operations(xxl.jaxpr)
    assert len(operations) == len(oracle.operations(two.jaxpr))
    products = [e for e in operations if e.primitive.name == "dot_general"]
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype("bfloat16")}
    assert xxl.out_avals[0].shape == (2, 512, 4096) and xxl.out_avals[0].dtype == jnp.float32


def test_half_precision_is_near(params):
    ids = draw(3, 7)
    full, half = run(TINY, params, ids), run(TINY, params, ids, jnp.bfloat16)
    assert half.dtype == jnp.float32
    # three blocks of products with 8 bits of mantissa: 0.014, times four for other weights
    assert 1e-4 < oracle.relative(half, full) < 0.06


def test_half_precision_does_not_round_the_stream(params):
    """A stream beyond float16's range, of which the blocks add a hundredth: it keeps float32's
    digits. In bfloat16 it would lose 2e-3, a fifth of what the blocks add."""
    large = params | {"shared": {"embedding": 1e5 * params["shared"]["embedding"]}}
    large["block"] = jax.tree_util.tree_map_with_path(
        lambda path, a: a * 1000 if path[-2].key in ("o", "wo") else a, params["block"]
    )
    ids = draw(3, 7)
    half = run(TINY, large, ids, jnp.bfloat16)
    assert np.isfinite(half).all()
    # 1.6e-4: what the blocks add, a hundredth, rounded as in the test above
    assert oracle.relative(half, run(TINY, large, ids)) < 6e-4


SHARDED = r"""
import re
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from d2m_jax.config import MeshConfig, T5Config
from d2m_jax.models.t5 import initialise, model_of
from d2m_jax.sharding import make_mesh

config = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=56, num_layers=3, num_heads=4)
params = initialise(config, 0)
ids = jnp.arange(18).reshape(2, 9)
run = jax.jit(lambda params, ids: model_of(config, params)(ids))
alone = run(params, ids)
mesh = make_mesh(MeshConfig(data=1, fsdp=4))

def cut(a):
    axes = [None] * (a.ndim - 1) + ["fsdp"]
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))

params = jax.tree.map(cut, params)
np.testing.assert_allclose(run(params, ids), alone, atol=1e-4 * np.abs(alone).max())
program = run.lower(params, ids).compile().as_text()
gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", program)
assert gathered and not any(shape.startswith("3,") for shape in gathered), gathered
print("equal")
"""


def test_cut_over_devices_equals_one_device():
    """Every matrix cut over four devices, and none put together for all layers at once."""
    own_process.assert_equal(SHARDED, timeout=300)
