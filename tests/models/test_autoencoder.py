"""The autoencoder against code that we did not write: diffusers' AutoencoderKL."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2m_jax.config import AutoencoderConfig, ConfigError
from d2m_jax.models.autoencoder import Attention, GroupNorm, initialise, model_of, tiles_of
from d2m_jax.weights.keys import autoencoder_keys
from tests.models.oracle import imported, operations, relative, shaken, tensors
from tests.seed import generator

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Widths that change on every level, so that both kinds of shortcut are there.
CONFIG = AutoencoderConfig(
    height=32,
    width=32,
    block_out_channels=(8, 16, 24),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=4,
)
FACTOR = 4


def normal(*shape, seed=0):
    return generator(seed).normal(size=shape).astype(np.float32)


def first(x):
    """Channels first, for torch."""
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))


def last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def theirs():
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=CONFIG.block_out_channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    model = shaken(model)
    with torch.no_grad():
        model.encoder.conv_out.bias[16] -= 100  # log variances beyond both clips
        model.encoder.conv_out.bias[17] += 100
    return model


@pytest.fixture(scope="module")
def params(theirs):
    table = autoencoder_keys.diffusers_keys(CONFIG)
    return imported(table, tensors(theirs), partial(initialise, CONFIG, 0))


def ours(params, dtype=jnp.float32):
    return model_of(CONFIG, params, dtype)


def test_config_is_read_from_diffusers(theirs):
    value = json.loads(theirs.to_json_string())
    assert autoencoder_keys.autoencoder_config(value, "vae/config.json") == CONFIG


@pytest.mark.parametrize(
    "size", [(20, 36), (45, 27)]
)  # latents 5 × 9; sides that 4 does not divide
def test_encode(theirs, params, size):
    images, key = np.tanh(normal(2, *size, 3)), jax.random.key(3)
    with torch.no_grad():
        distribution = theirs.encode(first(images)).latent_dist

    @jax.jit
    def encode(params, images):
        model = ours(params)
        return *model.mean_and_std(images), model.encode(images), model.encode(images, key)

    mean, std, latents, draw = encode(params, images)
    # float32 sums in another order
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    assert relative(mean, (last(distribution.mean) - shift) * scale) < 1e-5
    expected = last(distribution.std) * scale
    for channel in range(16):  # they differ by 1e11
        assert relative(std[..., channel], expected[..., channel]) < 1e-5
    np.testing.assert_allclose(std[..., 0], np.exp(-15) * scale, rtol=1e-5)
    np.testing.assert_array_equal(latents, mean)
    noise = jax.random.normal(key, mean.shape)
    np.testing.assert_allclose(draw, mean + std * noise, rtol=1e-5, atol=1e-5)


# 45 places in blocks of 16 queries, the last one short; 28 places in one
@pytest.mark.parametrize(("size", "queries"), [((5, 9), 16), ((7, 4), 1024)])
def test_decode_and_its_gradient(theirs, params, size, queries, monkeypatch):
    monkeypatch.setattr("d2m_jax.models.autoencoder.QUERIES", queries)
    latents, weight = normal(2, *size, 16), normal(2, *(FACTOR * n for n in size), 3, seed=1)
    x = first(latents).requires_grad_()
    expected = theirs.decode(x / theirs.config.scaling_factor + theirs.config.shift_factor).sample
    (expected * first(weight)).sum().backward()

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(latents, params):
        images = ours(params).decode(latents)
        return (images * weight).sum(), images

    (_, images), gradient = loss(jnp.asarray(latents), params)
    # float32 sums in another order
    assert relative(images, last(expected)) < 1e-5
    assert relative(gradient, last(x.grad)) < 1e-5


def test_attention_at_full_size_holds_one_block_of_weights():
    """1024² pixels are 16384 places: 2^28 weights in all, 2^24 of 1024 queries."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Attention(32, 512, rngs=nnx.Rngs(0))))

    def total(x, state):
        return nnx.merge(graph, state)(x).sum()

    x = jax.ShapeDtypeStruct((1, 128, 128, 512), jnp.float32)
    program = jax.make_jaxpr(jax.value_and_grad(total))(x, state)
    sizes = [out.aval.size for op in operations(program.jaxpr) for out in op.outvars]
    assert max(sizes) == 2**24


def test_tiles_are_blended_as_in_diffusers(theirs, params):
    """Tiles of 8 latents every 6, where diffusers has whole tiles; its last ones are cut.

    Where four tiles meet, its blending in place weighs one twice: left out as well.
    """
    latents = normal(2, 20, 14, 16)
    theirs.enable_tiling()
    assert theirs.tile_latent_min_size == 8
    with torch.no_grad():
        z = first(latents) / theirs.config.scaling_factor + theirs.config.shift_factor
        expected = last(theirs.decode(z).sample)
    theirs.disable_tiling()
    tiled = jax.jit(lambda p, x: ours(p).decode_tiled(x, tile=8))(params, latents)
    assert tiled.shape == expected.shape
    place = [np.arange(FACTOR * n) for n in (20, 14)]
    shared = [(p >= FACTOR * 6) & (p % (FACTOR * 6) < FACTOR * 2) for p in place]
    whole = [p < FACTOR * n for p, n in zip(place, (18, 12), strict=True)]
    same = np.outer(*whole) & ~np.outer(*shared)
    assert relative(tiled[:, same], expected[:, same]) < 1e-5


@pytest.mark.parametrize("length", [1, 3, 12, 13, 17, 21, 22, 64, 100])
def test_shares_of_tiles(length):
    starts, shares = tiles_of(length, 12, 4)
    tile = min(length, 12)
    assert starts[0] == 0 and starts[-1] == length - tile
    assert (np.diff(starts) <= 9).all() and (np.diff(starts) > 0).all()
    total, steps = np.zeros(4 * length), []
    for start, share in zip(starts, shares, strict=True):
        total[4 * start : 4 * (start + tile)] += share
        steps.append(np.abs(np.diff(share)).max(initial=0))
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert len(starts) == 1 + max(0, -(-(length - 12) // 9))
    assert max(steps) < 0.1  # no seam: a hard edge would be a step of 1


def test_a_tile_too_small_for_an_overlap(params):
    with pytest.raises(ConfigError, match="tile = 3: expected at least 4"):
        ours(params).decode_tiled(jnp.zeros((1, 5, 3, 16)), 3)


def test_bfloat16_activations(params):
    latents = normal(1, 6, 5, 16)
    whole, half = jax.jit(lambda p, x: (ours(p).decode(x), ours(p, jnp.bfloat16).decode(x)))(
        params, latents
    )
    assert half.dtype == jnp.float32
    # 8 bits in every activation
    assert 1e-5 < relative(half, np.asarray(whole)) < 0.05


def exact_norm(x):
    """Of two groups, in float64."""
    y = np.asarray(x, np.float64).reshape(*x.shape[:3], 2, -1)
    y = y - y.mean((1, 2, 4), keepdims=True)
    return (y / np.sqrt((y**2).mean((1, 2, 4), keepdims=True) + 1e-6)).reshape(x.shape)


@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_group_norm_at_a_large_mean(offset):
    """The one-pass variance errs by 0.18 at mean 1000; images have large means."""
    x = normal(2, 5, 4, 8) + np.float32(offset)
    np.testing.assert_allclose(GroupNorm(2, 8)(jnp.asarray(x)), exact_norm(x), atol=1e-3)


def test_group_norm_is_float32_in_half_precision():
    x = jnp.asarray(200 * normal(2, 32, 32, 8) + 100, jnp.bfloat16)
    result = GroupNorm(2, 8)(x)
    assert result.dtype == jnp.bfloat16
    # one rounding at the end, by half a step at most, and float32's own before it: of numbers near
    # the mean, whose difference from it has lost digits
    np.testing.assert_allclose(
        np.asarray(result, np.float64), exact_norm(x), rtol=2**-8 + 2**-18, atol=2**-18
    )


def test_full_size_has_the_published_parameters():
    shapes = jax.eval_shape(partial(initialise, AutoencoderConfig(), 0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) == 83_819_683
