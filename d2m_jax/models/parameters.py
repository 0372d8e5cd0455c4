"""A model's parameters as a pure dict, and the model around such a dict: for jit, Orbax, optax."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@partial(jax.jit, static_argnums=(0, 1))
def _initialise(kind: type, config: Any, key):
    return nnx.split(kind(config, rngs=nnx.Rngs(key)))[1]


def initialise(kind: type, config: Any, seed: int) -> dict:
    """Fresh parameters of kind(config, rngs=…) as a pure dict, made in one compiled call."""
    return nnx.to_pure_dict(_initialise(kind, config, jax.random.key(seed)))


def abstract(kind: type, config: Any) -> dict:
    """Shapes and types of what `initialise` gives, without computing any."""
    return jax.eval_shape(partial(initialise, kind, config, 0))


def model_of(kind: type, config: Any, params: dict, dtype=jnp.float32) -> nnx.Module:
    """The module with these parameters; `dtype` is that of activations."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=dtype)))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
