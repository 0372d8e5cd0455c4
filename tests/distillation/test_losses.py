"""The losses against docs/method.md's formulas in NumPy, and what the health numbers say."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.distillation import losses
from d2m_jax.models.reports import Choice, FFNReport, GroupReport, Routing

DENSE = GroupReport({"mlp": FFNReport()})


def test_mean_square_is_float32():
    a, b = jnp.full((2, 3, 4), 1, jnp.bfloat16), jnp.full((2, 3, 4), 1 + 2**-7, jnp.bfloat16)
    result = losses.mean_square(a, b)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, 2.0**-14, rtol=1e-6)


def test_feature_weights_are_the_paper_s():
    distill, feature = 0.3, np.float32([0.5, 2.0, 0.01])
    norm = np.float32([1.0, 4.0, 10.0])
    expected = [
        abs(distill) / abs(feature[i]) * sum(norm) / (len(norm) * norm[i]) for i in range(3)
    ]
    weights = losses.feature_weights(jnp.float32(distill), jnp.asarray(feature), jnp.asarray(norm))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_feature_weights_are_constants_for_the_gradient():
    def total(distill, feature, norm):
        return losses.feature_weights(distill, feature, norm).sum()

    values = jnp.float32(0.3), jnp.asarray([0.5, 2.0]), jnp.asarray([1.0, 4.0])
    for gradient in jax.grad(total, argnums=(0, 1, 2))(*values):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_feature_weights_are_0_when_student_is_teacher():
    zero = jnp.zeros(3)
    assert (losses.feature_weights(zero[0], zero, jnp.ones(3)) == 0).all()


def test_feature_weights_are_0_when_nothing_is_known():
    zero = jnp.zeros(3)
    assert (losses.feature_weights(zero[0], zero, zero) == 0).all()


def test_balance_is_1_when_even_and_n_when_one_has_all():
    even = jnp.full((2, 4), 0.25)
    one = jnp.zeros((2, 4)).at[..., 2].set(1)
    assert losses.balance(even, even, even) == pytest.approx(1)
    assert losses.balance(one, one, one) == pytest.approx(4)


def test_balance_by_hand_and_its_gradient_is_the_load_of_the_whole():
    probability = jnp.asarray([[0.4, 0.25, 0.35]])
    load = jnp.asarray([[0.25, 0.5, 0.25]])
    expected = 3 * (0.25 * 0.4 + 0.5 * 0.25 + 0.25 * 0.35)
    np.testing.assert_allclose(losses.balance(probability, load, probability), expected, rtol=1e-6)
    # a part of the batch, weighed by the whole
    part = jnp.asarray([[0.6, 0.3, 0.1]])
    found = jax.grad(losses.balance)(part, load, probability)
    np.testing.assert_allclose(found, 3 * load, rtol=1e-6)


def test_balance_takes_shares_anew_where_blocks_were_skipped():
    load = jnp.asarray([[0.25, 0.25]])  # half of the samples skipped this block
    assert losses.balance(load, load, load) == pytest.approx(1)
    zeros = jnp.zeros((1, 2))
    assert losses.balance(zeros, zeros, zeros) == 0
    # a block that nobody ran in earlier steps is not suddenly all that counts
    assert losses.balance(load, load, zeros) < 100


def test_health():
    n = 8
    even, one = jnp.full(n, 1 / n), jnp.eye(n)[0]
    half = jnp.asarray([2 / n] * 4 + [0.0] * 4)
    result = losses.health(jnp.stack([even, one, half])[:, None])
    np.testing.assert_allclose(result["entropy"], [1, 0, np.log(4) / np.log(8)], atol=1e-5)
    np.testing.assert_allclose(result["largest_load"], [1, 8, 2], rtol=1e-5)
    np.testing.assert_allclose(result["dead_experts"], [0, 7, 4])
    assert losses.health(jnp.ones((2, 3, 1)))["entropy"].tolist() == [1, 1]  # a single expert


def test_health_sees_the_batch_not_the_sample():
    result = losses.health(jnp.eye(4)[None])
    np.testing.assert_allclose(result["entropy"], [1], atol=1e-5)
    assert result["dead_experts"] == 0


def test_routing_names_layers_like_parameters():
    even = jnp.full((2, 3, 5, 4), 0.25)  # groups, blocks, batch, experts
    used = jnp.zeros((2, 5, 3)).at[..., 0].set(1)
    moe = FFNReport(Routing(even, even))
    report = {
        "double": [GroupReport({"img_mlp": moe, "txt_mlp": FFNReport()})],
        "single": [DENSE, replace(DENSE, choice=Choice(used, used))],
    }
    means = losses.routing_means(report)
    experts, blocks, metrics = losses.routing(means, means)
    assert experts == pytest.approx(1) and blocks == pytest.approx(3)
    assert set(metrics) == {
        "double.0.img_mlp/entropy",
        "double.0.img_mlp/largest_load",
        "double.0.img_mlp/dead_experts",
        "single.1.blocks/use",
        "single.1.blocks/entropy",
    }
    assert metrics["double.0.img_mlp/entropy"].shape == (6,)
    np.testing.assert_allclose(metrics["single.1.blocks/use"], [1, 0, 0] * 2)


def test_routing_of_a_dense_model_is_nothing():
    experts, blocks, metrics = losses.routing(
        *[losses.routing_means({"double": [DENSE], "single": []})] * 2
    )
    assert experts == 0 and blocks == 0 and metrics == {}
