"""Small transformers whose every parameter matters, and inputs for them."""

from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from d2m_jax import flow
from d2m_jax.config import FluxConfig, MoEConfig, StackConfig
from d2m_jax.models import experts
from d2m_jax.models.flux import abstract as shapes
from d2m_jax.models.reports import Context
from tests.seed import generator

DENSE = FluxConfig(
    in_channels=6,
    vec_in_dim=5,
    context_in_dim=7,
    hidden_size=32,
    num_heads=2,
    axes_dim=(4, 6, 6),
    double=(StackConfig(1),),
    single=(StackConfig(2),),
)
SPARSE = replace(
    DENSE,
    double=(StackConfig(1, ffn="moe"),),
    single=(StackConfig(2, ffn="moe"),),
    moe=MoEConfig(experts=6),
)


def random_like(tree, seed=0):
    """Arrays of these shapes, of the size of trained ones: none is zero as some are at birth."""
    rng = generator(seed)

    def draw(path, a):
        name = jax.tree_util.keystr(path)
        fan_in = a.shape[-2] if "kernel" in name else 4
        mean = 1.0 if "scale" in name else 0.0
        return jnp.asarray(mean + rng.normal(size=a.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def params(config, seed=0):
    return random_like(shapes(config), seed)


def computed_by(way):
    """While programs are traced in here, experts are computed in this way.

    The environment stays as it is: to change it while threads of XLA read it crashes the process.
    """
    return mock.patch.object(experts, "asked", lambda: way)


def context(vec, **fields):
    """What an FFN reads of a Context."""
    table = jnp.zeros((1, 1, 1, 1))
    return Context(vec=vec, cond=vec, pe=(table, table), text_tokens=0, **fields)


def inputs(config=DENSE, batch=3, grid=(3, 5), text=4, seed=0):
    """The arguments of Flux.__call__ up to guidance; odd sizes, a time for each sample."""
    rng = generator(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return (
        normal(batch, grid[0] * grid[1], config.in_channels),
        flow.image_ids(*grid),
        normal(batch, text, config.context_in_dim),
        flow.text_ids(text),
        jnp.asarray(rng.uniform(size=batch), jnp.float32),
        normal(batch, config.vec_in_dim),
        jnp.asarray(rng.uniform(1, 5, size=batch), jnp.float32) if config.guidance_embed else None,
    )
