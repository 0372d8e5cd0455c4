"""Attention against the formula: plain, head by head, and the TPU's kernel in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.kernels import attention as kernels
from d2m_jax.kernels import target
from d2m_jax.kernels.attention import attention
from tests.seed import generator


def formula(q, k, v):
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, axis=-1), v)


def draw(*shape, dtype=jnp.float32):
    rng = generator()
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]


def forward_and_gradients(function, q, k, v, dy):
    @jax.jit
    def compute(q, k, v, dy):
        y, back = jax.vjp(function, q, k, v)
        return y, *back(dy)

    return compute(q, k, v, dy)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)])
@pytest.mark.parametrize("limit", [kernels.SCORE_BYTES, 0])
def test_attention_is_the_formula(dtype, tolerance, limit, monkeypatch):
    monkeypatch.setattr(kernels, "SCORE_BYTES", limit or 100)  # less: head by head, in parts
    q, k, v, _ = draw(2, 7, 3, 4, dtype=dtype)
    result = attention(q, k, v)
    assert result.dtype == dtype and result.shape == (2, 7, 3, 4)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(4))
    scores /= scores.sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhd->bnhd", scores, v)
    # probabilities and the result lose half a step each: of bfloat16, 2^-9 of numbers up to 4
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, atol=tolerance)


# 37 queries in parts of 37, 13 (three, one padded), and 1
@pytest.mark.parametrize("limit", [4 * 2 * 37**2, 4 * 2 * 37 * 13, 4])
def test_head_by_head_has_the_gradients_of_the_formula(limit, monkeypatch):
    monkeypatch.setattr(kernels, "SCORE_BYTES", limit)
    arguments = draw(2, 37, 3, 8)
    found = forward_and_gradients(kernels.by_head, *arguments)
    for a, b in zip(found, forward_and_gradients(formula, *arguments), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # float32 sums in another order


@pytest.mark.parametrize("tokens", [512, 600])
def test_splash_has_the_gradients_of_the_formula(tokens, monkeypatch):
    """600 tokens are filled up to 1024, which nothing may see."""
    monkeypatch.setattr(kernels, "INTERPRET", True)
    arguments = draw(1, tokens, 2, 128)
    found = forward_and_gradients(kernels.splash, *arguments)
    for a, b in zip(found, forward_and_gradients(formula, *arguments), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # float32 sums in another order


def test_no_scores_of_all_heads_are_kept(monkeypatch):
    """Neither forward nor backward: 8 heads of 512 tokens have 8 MiB of scores."""
    monkeypatch.setattr(kernels, "SCORE_BYTES", 2**20)
    q, k, v, dy = draw(1, 512, 8, 16)

    def compute(q, k, v, dy):
        return jax.vjp(attention, q, k, v)[1](dy)

    compiled = jax.jit(compute).lower(q, k, v, dy).compile()
    inputs = 4 * q.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**20 + 4 * inputs


def test_softmax_is_float32_in_half_precision():
    """Two keys whose scores differ by less than bfloat16 can tell at this size."""
    q = jnp.asarray([[16.0, 0.0], [0.0, 0.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    k = jnp.asarray([[23.0, 0.0], [23.125, 0.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.asarray([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    difference = 16 * 0.125 / np.sqrt(2)
    for function in (attention, kernels.by_head):
        weight = float(function(q, k, v)[0, 0, 0, 0])
        assert weight == pytest.approx(1 / (1 + np.exp(-difference)), abs=4e-3)


@pytest.mark.parametrize(
    ("device", "shape", "says"),
    [
        ("gpu", (1, 8, 2, 64), "cuDNN cannot run (needs a GPU at hand"),
        ("tpu", (1, 512, 1, 64), "splash needs heads of 128, found 64"),
    ],
)
def test_without_the_kernel_one_line_says_what_it_costs(device, shape, says, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "target", lambda: device)
    target.log_once.cache_clear()
    q, k, v, _ = draw(*shape, dtype=jnp.bfloat16)
    for _ in range(3):
        jax.eval_shape(attention, q, k, v)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("attention: ") and says in line
    assert line.endswith("scores go through memory") and "\n" not in line


def test_splash_on_a_tpu(monkeypatch):
    taken = []
    monkeypatch.setattr(kernels, "target", lambda: "tpu")
    monkeypatch.setattr(kernels, "splash", lambda q, k, v: taken.append(q.shape) or q)
    for tokens in (100, 512):
        jax.eval_shape(attention, *draw(1, tokens, 1, 128)[:3])
    assert taken == [(1, 512, 1, 128)]
