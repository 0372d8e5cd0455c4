from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from d2m_jax.config import SparsifyConfig
from d2m_jax.sparsification.deal import assign, cluster, fit_gate, make_moe, snake, split
from tests.seed import generator


@pytest.mark.parametrize("shape", ["even", "lumped", "equal"])
def test_assign_is_balanced_and_near_the_optimum(shape):
    rng = generator()
    vectors = rng.standard_normal((240, 16), np.float32)
    if shape == "lumped":
        vectors[:170] = 2 * vectors[0] + 0.5 * vectors[:170]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if shape == "equal":
        vectors[:80] = 0  # neurons that never fire
    cost = -vectors @ vectors[::20].T
    labels = assign(cost)
    assert (np.bincount(labels, minlength=12) == 20).all()
    best = np.repeat(cost, 20, axis=1)
    best = best[linear_sum_assignment(best)].sum()
    assert cost[np.arange(240), labels].sum() <= best + 0.01 * abs(best)


def test_cluster_finds_neurons_that_fire_together():
    rng = generator()
    truth = rng.permutation(np.repeat(np.arange(4), 24))
    vectors = 2 * rng.standard_normal((4, 50))[truth] + rng.standard_normal((96, 50))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels = cluster(vectors, 4, generator(3))
    # every cluster is one of the true ones
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 4


def test_snake_deals_equal_sums():
    labels = snake(48, 12)
    assert (np.bincount(labels) == 4).all()
    assert labels[:24].tolist() == [*range(12), *reversed(range(12))]
    assert len(set(np.bincount(labels, weights=np.arange(48)))) == 1


def test_fitted_gate_knows_the_strong_experts():
    """On tokens that it has not seen; which experts answer a token is planted in its direction."""
    rng = generator()
    x = rng.standard_normal((1200, 16)).astype(np.float32)
    into = rng.standard_normal((4, 16, 8)).astype(np.float32) * 0.1
    into += rng.standard_normal((4, 16, 1)) * 0.5
    into = into.astype(np.float32)
    bias, out = np.zeros((4, 8), np.float32), rng.standard_normal((4, 8, 16)).astype(np.float32)
    kernel, intercept = fit_gate(x[:800], into, bias, out)
    x = x[800:]
    hidden = jax.nn.gelu(np.einsum("td,edf->tef", x, into), approximate=True)
    norm = np.linalg.norm(np.einsum("tef,efd->ted", hidden, out), axis=-1)
    logits = x @ kernel + intercept
    energy = np.square(norm)
    share = energy[np.arange(400), logits.argmax(1)].sum() / energy.sum()
    assert share > 0.6 > 1.5 * 0.25
    assert abs(logits.mean()) < 0.2 and 0.3 < logits.std() < 1.5


def test_split_keeps_every_neuron():
    numbers = np.arange(24.0)
    ffn = {
        "in_layer": {"kernel": numbers.reshape(1, 1, 2, 12), "bias": numbers[None, None, :12]},
        "out_layer": {"kernel": numbers.reshape(1, 1, 12, 2)},
    }
    moe = split(ffn, shared=4, experts=2)
    assert moe["shared"]["in_layer"]["bias"].tolist() == [[[0, 1, 2, 3]]]
    assert moe["experts"]["in_bias"].tolist() == [[[[4, 5, 6, 7], [8, 9, 10, 11]]]]
    np.testing.assert_array_equal(
        moe["experts"]["in_kernel"][0, 0, 1], [[8, 9, 10, 11], [20, 21, 22, 23]]
    )
    np.testing.assert_array_equal(moe["experts"]["out_kernel"][0, 0, 1, 0], [16, 17])
    assert "bias" not in moe["shared"]["out_layer"]


@pytest.mark.parametrize("deal", ["rank", "random", "clustered"])
def test_all_experts_under_a_uniform_gate_are_the_dense_ffn(small, calibration, deal):
    """The whole model, double and single blocks, and again with the top 2 experts it is another."""
    sparsify = SparsifyConfig(deal=deal, gate="random", routed_scale=1.0)
    moe = replace(small.config.moe, top_k=12)
    stacks = {
        kind: (replace(getattr(small.config, kind)[0], ffn="moe"),) for kind in ("double", "single")
    }
    config = replace(small.config, moe=moe, **stacks)
    params = dict(small.params)
    for kind, names in (("double", ("img_mlp", "txt_mlp")), ("single", ("mlp",))):
        block = dict(params[kind][0]["block"])
        for name in names:
            block[name], _ = make_moe(
                block[name],
                calibration.taylor[kind][0][name],
                calibration.inputs[kind][0][name],
                config,
                stacks[kind][0],
                sparsify,
                generator(),
            )
            block[name]["gate"] = jax.tree.map(np.zeros_like, block[name]["gate"])
        params[kind] = {0: {"block": block}}
    dense = small.velocity(small.config, small.params)
    np.testing.assert_allclose(small.velocity(config, params), dense, atol=1e-5)
    fewer = replace(config, moe=replace(moe, top_k=2))
    assert np.abs(small.velocity(fewer, params) - dense).max() > 1e-2
