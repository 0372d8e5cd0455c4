"""The parts of a block, and the traps that their numerics hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2m_jax import flow
from d2m_jax.models import layers
from tests.seed import generator


def normal(*shape, seed=0):
    return generator(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_layer_norm_at_a_large_mean(offset):
    """The one-pass variance errs by 0.18 at mean 1000."""
    x = normal(4, 64) + np.float32(offset)
    exact = x.astype(np.float64)
    exact = exact - exact.mean(-1, keepdims=True)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.layer_norm(jnp.asarray(x)), exact, atol=1e-3)


def test_norms_are_float32_in_half_precision():
    x = jnp.asarray(200 * normal(4, 64), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    norm = layers.RMSNorm(64)
    norm.scale[...] = jnp.asarray(1 + 0.1 * normal(64))
    result = norm(x)
    assert result.dtype == jnp.bfloat16
    expected = exact * np.asarray(norm.scale[...])
    # one rounding at the end, by half a step at most, and float32's own before it
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=2**-8 + 2**-18)
    assert layers.layer_norm(x).dtype == jnp.bfloat16


def test_ffn_has_the_tanh_form_of_gelu():
    ffn = layers.FFN(8, 8, rngs=nnx.Rngs(0))
    ffn.in_layer.kernel[...] = ffn.out_layer.kernel[...] = jnp.eye(8)
    x = np.linspace(-4, 4, 8, dtype=np.float32)[None]
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    result = np.asarray(ffn(jnp.asarray(x)))
    np.testing.assert_allclose(result, tanh, atol=1e-6)
    assert np.abs(result - np.asarray(jax.nn.gelu(x, approximate=False))).max() > 1e-4


def test_timestep_embedding_is_bfl_s():
    t = np.float32([0.0, 0.1234567, 0.7173, 1.0, 3.5])  # 3.5: guidance takes the same way
    frequency = np.exp(-np.log(1e4) * np.arange(128) / 128)
    angle = 1000.0 * t.astype(np.float64)[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    # float32 knows an angle of 3500 to 2e-4; bfloat16 would make 3504 of it
    np.testing.assert_allclose(layers.timestep_embedding(jnp.asarray(t)), expected, atol=1e-3)


def test_rope_rotates_interleaved_pairs_by_position():
    axes_dim, theta = (4, 6, 6), 10_000
    ids = flow.image_ids(3, 4)
    x = normal(2, 12, 3, 16)
    rotated = layers.apply_rope(jnp.asarray(x), layers.rope(ids, axes_dim, theta))
    angle = np.concatenate(
        [
            np.asarray(ids[0])[:, axis, None] * theta ** -(np.arange(0, dim, 2) / dim)
            for axis, dim in enumerate(axes_dim)
        ],
        axis=-1,
    )
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[None, :, None]
    np.testing.assert_allclose(rotated[..., 0::2], pairs.real, atol=1e-5)
    np.testing.assert_allclose(rotated[..., 1::2], pairs.imag, atol=1e-5)


def test_rope_knows_positions_above_256():
    """bfloat16 would make 256 of 257."""
    cos, sin = layers.rope(flow.image_ids(1, 400), (2, 2, 12), 10_000)
    column = np.arange(400)[:, None] * 10_000.0 ** -(np.arange(0, 12, 2) / 12)
    np.testing.assert_allclose(cos[0, :, 0, 2:], np.cos(column), atol=1e-4)
    np.testing.assert_allclose(sin[0, :, 0, 2:], np.sin(column), atol=1e-4)


def test_modulation_is_shift_scale_gate_and_nothing_at_birth():
    modulation = layers.Modulation(4, 2, 1, rngs=nnx.Rngs(0))
    cond = jnp.asarray(normal(5, 4))
    (branch,) = modulation(cond)
    assert all(part.shape == (5, 1, 2) and not part.any() for part in branch)
    modulation.lin.bias[...] = jnp.arange(6.0)
    (branch,) = modulation(cond)
    np.testing.assert_array_equal(jnp.concatenate(branch, axis=-1)[0, 0], [0, 1, 2, 3, 4, 5])
    x = normal(5, 3, 2)
    result = layers.modulate(jnp.asarray(x), branch.shift, branch.scale)
    np.testing.assert_allclose(result, x * (1 + np.float32([2, 3])) + np.float32([0, 1]), rtol=1e-6)


def test_linear_computes_in_the_dtype_of_its_input():
    linear = layers.Linear(3, 2, rngs=nnx.Rngs(0))
    for dtype in (jnp.float32, jnp.bfloat16):
        assert linear(jnp.ones((1, 3), dtype)).dtype == dtype
    assert linear.kernel[...].dtype == jnp.float32
