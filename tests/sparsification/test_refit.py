"""The fit against a dense solution in float64, and what it gains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2m_jax.config import FluxConfig, MoEConfig, SparsifyConfig, StackConfig
from d2m_jax.models import blocks
from d2m_jax.sparsification import refit
from d2m_jax.sparsification.deal import make_moe
from d2m_jax.sparsification.prune import prune
from tests.models import toy
from tests.seed import generator

DIM, TOKENS = 16, 300
MOE = MoEConfig(experts=6)
CONFIG = FluxConfig(hidden_size=DIM, num_heads=1, axes_dim=(4, 6, 6), moe=MOE)
STACK = StackConfig(1, ffn="moe")


@pytest.fixture(scope="module")
def whole():
    rng = generator()

    def draw(*shape):
        return rng.standard_normal((1, 1, *shape), np.float32) / np.float32(shape[0] ** 0.5)

    return {
        "in_layer": {"kernel": draw(DIM, 64), "bias": draw(64)},
        "out_layer": {"kernel": draw(64, DIM), "bias": draw(DIM)},
    }


@pytest.fixture(scope="module")
def inputs():
    rng = generator(3)
    x = rng.standard_normal((1, 1, TOKENS, DIM), np.float32)
    return x, rng.random((1, 1, TOKENS), np.float32) ** 6


def cut(whole, inputs, method):
    scores = generator(1).random((1, 1, 64))
    if method == "prune":
        return prune(whole, scores, 24)[0], None
    sparsify = SparsifyConfig(moe=MOE, routed_scale=0.7)
    made, _ = make_moe(whole, scores, inputs, CONFIG, STACK, sparsify, generator(2))
    return made, MOE


def output(ffn, x, moe):
    """By the modules of the model."""
    x = jnp.asarray(x)
    if moe is None:
        hidden = jax.nn.gelu(x @ ffn["in_layer"]["kernel"][0, 0] + ffn["in_layer"]["bias"][0, 0])
        return hidden @ ffn["out_layer"]["kernel"][0, 0] + ffn["out_layer"]["bias"][0, 0]
    graph, state = nnx.split(nnx.eval_shape(lambda: blocks.ffn(CONFIG, STACK, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda a: jnp.asarray(a[0, 0]), ffn))
    vec = jnp.zeros((1, DIM))
    return nnx.merge(graph, state)(x[None], x[None], toy.context(vec))[0][0]


@pytest.mark.parametrize("method", ["prune", "moe"])
@pytest.mark.parametrize("kind", ["bias", "plain", "weighted"])
def test_refit_is_the_dense_solution(whole, inputs, method, kind, monkeypatch):
    monkeypatch.setattr(refit, "CHUNK", 128)  # 300 tokens in three parts
    x, sensitivity = inputs
    made, moe = cut(whole, x, method)
    weights = sensitivity if kind == "weighted" else None
    new, gain = refit.refit(made, whole, x, weights, moe, bias_alone=kind == "bias")

    mine = jax.tree.map(lambda a: a[0, 0], made)
    features = refit.pruned_features if moe is None else partial_features
    phi = np.asarray(features(mine, x[0, 0]), np.float64)
    old = np.asarray(refit.kernel_of(mine), np.float64)
    y = np.asarray(output(whole, x[0, 0], None), np.float64) - whole["out_layer"]["bias"][0, 0]
    w = np.ones(TOKENS)
    if kind == "weighted":
        w = sensitivity[0, 0].astype(np.float64)
        w = (w / w.mean()) ** refit.DAMPING
    # the intercept as one more feature, without a ridge
    centred = phi - (w @ phi) / w.sum()
    ridge = refit.RIDGE * np.trace(centred.T @ (w[:, None] * centred)) / phi.shape[1]
    one = np.concatenate([phi, np.ones((TOKENS, 1))], 1)
    if kind == "bias":
        one = one[:, -1:]
    penalty = np.diag([ridge] * (one.shape[1] - 1) + [0.0])
    solution = np.linalg.solve(
        one.T @ (w[:, None] * one) + penalty, one.T @ (w[:, None] * (y - phi @ old))
    )
    np.testing.assert_allclose(gain[0, 0], solution[-1], atol=2e-4)
    found = np.asarray(refit.kernel_of(jax.tree.map(lambda a: a[0, 0], new)))
    np.testing.assert_allclose(found, old + (solution[:-1] if kind != "bias" else 0), atol=2e-3)

    # and what the model computes with it is what was fitted
    expected = phi @ found + gain[0, 0] + whole["out_layer"]["bias"][0, 0]
    np.testing.assert_allclose(output(new, x[0, 0], moe) + gain[0, 0], expected, atol=1e-3)


def partial_features(ffn, x):
    return refit.moe_features(MOE, ffn, x)


def test_a_fit_misses_less(whole, inputs):
    x = inputs[0]
    errors = {}
    for method in ("prune", "moe"):
        made, moe = cut(whole, x, method)
        y = output(whole, x[0, 0], None)
        for kind in ("none", "bias", "plain"):
            new, gain = made, np.zeros((1, 1, DIM))
            if kind != "none":
                new, gain = refit.refit(made, whole, x, None, moe, kind == "bias")
            errors[method, kind] = float(
                jnp.square(output(new, x[0, 0], moe) + gain[0, 0] - y).mean()
            )
        assert errors[method, "plain"] < errors[method, "bias"] < errors[method, "none"], errors
