"""Attention against the formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.kernels.attention import attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_attention_is_the_formula(dtype, tolerance):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 7, 3, 4)), dtype) for _ in range(3))
    result = attention(q, k, v)
    assert result.dtype == dtype and result.shape == (2, 7, 3, 4)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(4))
    scores /= scores.sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhd->bnhd", scores, v)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, atol=tolerance)


def test_softmax_is_float32_in_half_precision():
    """Two keys whose scores differ by less than bfloat16 can tell at this size."""
    q = jnp.asarray([[16.0, 0.0], [0.0, 0.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    k = jnp.asarray([[23.0, 0.0], [23.125, 0.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.asarray([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    weight = float(attention(q, k, v)[0, 0, 0, 0])
    difference = 16 * 0.125 / np.sqrt(2)
    assert weight == pytest.approx(1 / (1 + np.exp(-difference)), abs=4e-3)
