"""One small teacher for the room, all of its parameters at work, and calibration batches for it."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import flow
from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.flux import initialise, model_of
from tests.seed import generator

CONFIG = FluxConfig(
    in_channels=48,
    vec_in_dim=16,
    context_in_dim=16,
    hidden_size=32,
    num_heads=2,
    axes_dim=(4, 6, 6),
    double=(StackConfig(2),),
    single=(StackConfig(4),),
)


def noisy(batch, key):
    """Random data at random times: arguments of Flux.embed, and the velocity."""
    batch = jax.tree.map(jnp.asarray, batch)
    noise = jax.random.normal(key, batch["image"].shape)
    t = (jnp.arange(len(noise)) + 0.5) / len(noise)
    ids = flow.image_ids(3, 3), flow.text_ids(batch["words"].shape[1])
    y, guidance = batch["words"].mean(1), jnp.full(t.shape, 3.5)
    mixed = flow.mix(batch["image"], noise, t)
    return (mixed, ids[0], batch["words"], ids[1], t, y, guidance), noise - batch["image"]


@partial(jax.jit, static_argnums=0)
def velocity(config, params):
    """The model on one batch."""
    inputs, _ = noisy(batches(1)[0], jax.random.key(5))
    return model_of(config, params)(*inputs)


def batches(count, size=8):
    """Batches of random latents and words."""
    rng = generator(1)
    shapes = {"image": (size, 9, 48), "words": (size, 2, 16)}
    return [
        {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def small():
    """Config, parameters, batches, noisy and velocity of the small teacher."""
    rng = generator()

    def stir(a):  # zero at birth are biases and modulations, which would hide the FFNs
        return np.asarray(a) + 0.1 * rng.standard_normal(a.shape).astype(np.float32)

    params = jax.tree.map(stir, initialise(CONFIG, 0))
    return SimpleNamespace(
        config=CONFIG, params=params, batches=batches, noisy=noisy, velocity=velocity
    )


@pytest.fixture(scope="session")
def calibration(small):
    from d2m_jax.sparsification.importance import calibrate  # after the root conftest's import hook

    key, batches = jax.random.key(0), small.batches(3)
    return calibrate(small.config, small.params, batches, small.noisy, key, tokens=96, count=3)
