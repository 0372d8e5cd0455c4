"""Transformers to measure: the committed configs at any size, random parameters, routing whose
loads are known."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp

from d2m_jax import flow
from d2m_jax.command_line import load_config
from d2m_jax.config import ROOT, FluxConfig, StackConfig
from d2m_jax.models.flux import abstract
from d2m_jax.models.moe import MoE

NAMES = ("flux_dev", "flux_moe_l", "flux_moe_m", "flux_moe_s", "flux_moe_xs")
LOADS = ("balanced", "random", "skewed")


def config_of(name: str, dim: int, divide: int) -> FluxConfig:
    """configs/<name>.py with this hidden size, heads of 128, and every stack's groups divided."""
    config = load_config(ROOT / "configs" / f"{name}.py")

    def fewer(stacks: tuple[StackConfig, ...]) -> tuple[StackConfig, ...]:
        return tuple(replace(s, groups=max(1, round(s.groups / divide))) for s in stacks)

    return replace(
        config,
        hidden_size=dim,
        num_heads=dim // 128,
        double=fewer(config.double),
        single=fewer(config.single),
    )


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key, shape, dtype, spread):
    return (spread * jax.random.normal(key, shape)).astype(dtype)


def random_params(config: FluxConfig, dtype) -> dict:
    """Parameters none of which is zero, drawn one by one: no copy in another dtype."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract(config))
    drawn = []
    for i, (path, leaf) in enumerate(leaves):
        spread = leaf.shape[-2] ** -0.5 if "kernel" in path[-1].key else 0.1
        drawn.append(_draw(jax.random.key(i), leaf.shape, jnp.dtype(dtype), spread))
    return tree.unflatten(drawn)


def inputs(config: FluxConfig, image_tokens: int, text_tokens: int, dtype, batch: int = 1) -> tuple:
    """Arguments of Flux.__call__, a square image."""
    side = round(image_tokens**0.5)
    keys = jax.random.split(jax.random.key(1), 3)
    return (
        jax.random.normal(keys[0], (batch, side * side, config.in_channels), dtype),
        flow.image_ids(side, side),
        jax.random.normal(keys[1], (batch, text_tokens, config.context_in_dim), dtype),
        flow.text_ids(text_tokens),
        jnp.full(batch, 0.5),
        jax.random.normal(keys[2], (batch, config.vec_in_dim), dtype),
        jnp.full(batch, 3.5) if config.guidance_embed else None,
    )


@contextmanager
def routing(load: str, tokens: int):
    """While programs are traced in here, gates choose with these loads, whatever their weights say.

    "balanced": every expert equally often. "random": any experts, all as likely. "skewed": the i-th
    in proportion to 1/i; of 12, every second token chooses the first.
    """
    own = MoE.logits

    def logits(self, x, unmodulated, vec):
        n, k = self.config.experts, self.config.top_k
        place = jnp.arange(tokens)[:, None] * k % n
        if load == "balanced":
            wish = -((jnp.arange(n) - place) % n).astype(jnp.float32)
        else:
            wish = jax.random.gumbel(jax.random.key(2), (tokens, n))
            wish -= jnp.log(jnp.arange(1.0, n + 1)) * (load == "skewed")
        # The gate still computes, and its result is still needed.
        return 1e-6 * own(self, x, unmodulated, vec) + wish[: x.shape[1]]

    with mock.patch.object(MoE, "logits", logits):
        yield
