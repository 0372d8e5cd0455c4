"""The noise from which images begin."""

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int


def noise(seed: int, count: int, tokens: int, channels: int) -> Float[Array, "b n c"]:
    """Packed noise for `count` prompts, each from its own key."""
    return noise_of(seed, np.arange(count), tokens, channels)


def noise_of(
    seed: int, numbers: Int[np.ndarray, " b"], tokens: int, channels: int
) -> Float[Array, "b n c"]:
    """The same for the prompts of these numbers."""
    return _noise(jax.random.key(seed), numbers, tokens, channels)


@partial(jax.jit, static_argnums=(2, 3))
def _noise(key: Array, numbers: Int[Array, " b"], tokens: int, channels: int):
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
    return jax.vmap(lambda key: jax.random.normal(key, (tokens, channels)))(keys)
