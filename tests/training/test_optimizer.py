"""Schedules, rates by name, weight decay, and the split into trainable and frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2m_jax.config import ConfigError, OptimizerConfig
from d2m_jax.named_arrays import names
from d2m_jax.training.optimizer import make_optimizer, make_schedule, merge, split
from tests.training import toy


def test_schedules():
    def rates(schedule, **others):
        config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup=4, **others)
        return [float(make_schedule(config, 24)(step)) for step in (0, 1, 3, 4, 14, 24)]

    assert rates("constant") == pytest.approx([0.5, 1, 2, 2, 2, 2])
    assert rates("linear") == pytest.approx([0.5, 1, 2, 2, 1, 0])
    assert rates("cosine", final_rate=0.1) == pytest.approx([0.5, 1, 2, 2, 1.1, 0.2])


def update(config, params, gradients):
    optimizer = make_optimizer(config, 10, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return names(updates)


def test_rate_factors():
    """Factors of all patterns that match multiply; other names keep their rate."""
    params = toy.initial()
    gradients = jax.tree.map(jnp.ones_like, params)
    config = OptimizerConfig(learning_rate=1e-2, warmup=0, schedule="constant")
    plain = update(config, params, gradients)
    rates = {"body.*": 3.0, "*.bias": 0.5}
    config = OptimizerConfig(learning_rate=1e-2, warmup=0, schedule="constant", rates=rates)
    for name, array in update(config, params, gradients).items():
        factor = (3.0 if name.startswith("body") else 1.0) * (0.5 if "bias" in name else 1.0)
        np.testing.assert_allclose(array, factor * plain[name], rtol=1e-6)


def test_weight_decay_on_matrices_only():
    # Stacked as in Flux: the bias has leading axes too.
    params = {"block": {"kernel": jnp.ones((2, 1, 3, 4)), "bias": jnp.ones((2, 1, 4))}}
    gradients = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(learning_rate=0.5, warmup=0, schedule="constant", weight_decay=0.1)
    updates = update(config, params, gradients)
    np.testing.assert_allclose(updates["block.kernel"], -0.05, rtol=1e-6)
    assert (updates["block.bias"] == 0).all()


def test_clipping():
    """A first Adam step hides the scale of gradients, so look at the moments."""
    params = {"kernel": jnp.zeros(4)}
    optimizer = make_optimizer(OptimizerConfig(clip=0.5, b1=0.0), 10, params)
    _, state = optimizer.update({"kernel": jnp.full(4, 3.0)}, optimizer.init(params), params)
    moments = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(moments.mu["kernel"], 0.25, rtol=1e-6)


def test_split_and_merge():
    params = toy.initial()
    trainable, frozen = split(params, ("body.*", "out.bias"), ("body.1.*",))
    assert list(names(trainable)) == ["body.0.bias", "body.0.kernel", "out.bias"]
    assert list(names(frozen)) == ["body.1.bias", "body.1.kernel", "out.kernel"]
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (merged, params)), strict=True))


@pytest.mark.parametrize(
    ("train", "freeze", "message"),
    [
        (("*.kernal",), (), "StageConfig.train: '.*' matches no parameter, did you mean kernel"),
        (("*",), ("bdy.*",), "StageConfig.freeze: '.*' matches no parameter, did you mean body"),
        (("out.*",), ("out.*",), "at least one parameter to train, found none"),
        ((), (), "at least one parameter to train, found none"),
    ],
)
def test_bad_selections(train, freeze, message):
    with pytest.raises(ConfigError, match=message):
        split(toy.initial(), train, freeze)


def test_bad_rates():
    config = OptimizerConfig(rates={"oot.*": 2.0})
    with pytest.raises(ConfigError, match="OptimizerConfig.rates: .*did you mean out"):
        make_optimizer(config, 10, toy.initial())
