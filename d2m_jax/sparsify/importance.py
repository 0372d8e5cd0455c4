"""What each hidden FFN neuron is worth, and what FFNs and modulations read: measured on a teacher.

Values per FFN are trees {"double": {stack: {"img_mlp": …}}, "single": …}, as `ffns` gives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d2m_jax.config import FluxConfig
from d2m_jax.models.blocks import FFNS
from d2m_jax.models.flux import model_of
from d2m_jax.models.protocol import Body, FFNReport, GroupReport
from d2m_jax.sharding import whole

# (batch, key) → the arguments of Flux.embed at random times, and the velocity that is true there
Noisy = Callable[[dict, Array], tuple[tuple, Array]]

SPREAD = 64  # evenly spaced tokens of one sample that calibration inputs are drawn from


@dataclass(frozen=True)
class Calibration:
    """What calibration batches tell of a teacher."""

    taylor: dict  # scores [groups, blocks, width] per FFN
    inputs: dict  # of every FFN, [groups, blocks, tokens, D]
    cond: Float[np.ndarray, "n d"]  # of the modulations: silu(vec), one per sample


def calibrate(
    config: FluxConfig,
    params: dict,
    batches: Sequence[dict],
    noisy: Noisy,
    key: Array,
    tokens: int,
) -> Calibration:
    """One pass over the batches, forward and backward; about `tokens` inputs are kept of every FFN.

    Taylor scores (docs/method.md, step 0) are Σ |∂L/∂w · w| over a neuron's in-row, in-bias and
    out-column, L the flow matching loss, averaged over the batches, which give equally many inputs.
    """
    params, count = jax.tree.map(jnp.asarray, params), -(-tokens // len(batches))
    parts = []
    for i, batch in enumerate(batches):
        mine = jax.random.fold_in(key, i)
        found = _measure(params, batch, mine, config=config, noisy=noisy, count=count)
        parts.append(jax.tree.map(whole, found))
    scores, inputs, cond = zip(*parts, strict=True)
    return Calibration(
        taylor=jax.tree.map(lambda *a: sum(a) / len(a), *scores),
        inputs=jax.tree.map(lambda *a: np.concatenate(a, axis=2), *inputs),
        cond=np.concatenate(cond),
    )


@partial(jax.jit, static_argnames=("config", "noisy", "count"))
def _measure(
    params: dict, batch: dict, key: Array, *, config: FluxConfig, noisy: Noisy, count: int
):
    """Calibration of one batch, as a tuple."""
    noise, drawn, spread = jax.random.split(key, 3)
    inputs, target = noisy(batch, noise)
    dtype = params["img_in"]["kernel"].dtype

    def loss(chosen: dict):
        model = model_of(config, _with_ffns(params, chosen), dtype)
        velocity, report = model.run(*model.embed(*inputs, collect=SPREAD), remat=True)
        return jnp.square(velocity - target).mean(), _draw(report, drawn, count)

    chosen = ffns(params)
    gradient, seen = jax.grad(loss, has_aux=True)(chosen)
    product = jax.tree.map(
        lambda w, g: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)), chosen, gradient
    )
    # Modulations must hold for other guidance too: from 0 to twice the calibration's.
    *others, guidance = inputs
    if guidance is not None:
        guidance = guidance * jax.random.uniform(spread, guidance.shape, maxval=2.0)
    _, context = model_of(config, params).embed(*others, guidance=guidance)
    return each(_per_neuron, product), seen, jax.nn.silu(context.vec)


def _draw(report: Body[GroupReport], key: Array, count: int) -> dict:
    """`count` of the inputs that every FFN reported, or all where there are fewer."""

    def draw(ffn: FFNReport) -> Float[Array, "g m t d"]:
        x = ffn.inputs  # [groups, blocks, batch, tokens, D]
        assert x is not None  # Context.collect asked for them
        x = x.reshape(*x.shape[:2], -1, x.shape[-1])
        chosen = jax.random.permutation(key, x.shape[2])[:count]
        return x[:, :, chosen]

    return {
        kind: {
            i: {name: draw(stack.ffns[name]) for name in names}
            for i, stack in enumerate(report[kind])
        }
        for kind, names in FFNS.items()
    }


def magnitude(params: dict) -> dict:
    """Σ |w| over a neuron's weights, [groups, blocks, width] per FFN."""
    absolute = jax.tree.map(lambda w: np.abs(whole(w).astype(np.float32)), ffns(params))
    return each(_per_neuron, absolute)


def random(params: dict, generator: np.random.Generator) -> dict:
    """Scores that know nothing, [groups, blocks, width] per FFN."""
    return each(lambda ffn: generator.random(ffn["in_layer"]["bias"].shape), ffns(params))


def ffns(params: dict) -> dict:
    """The parameters of all FFNs, per kind of block, stack and name."""
    return {
        kind: {
            i: {name: stack["block"][name] for name in names} for i, stack in params[kind].items()
        }
        for kind, names in FFNS.items()
    }


def each(function: Callable[[dict], Any], tree: dict) -> dict:
    """The function of every FFN of a tree, as a tree."""
    return {
        kind: {
            i: {name: function(ffn) for name, ffn in named.items()} for i, named in stacks.items()
        }
        for kind, stacks in tree.items()
    }


def _per_neuron(weights: dict) -> Float[Array | np.ndarray, "g m w"]:
    inward = weights["in_layer"]["kernel"].sum(-2) + weights["in_layer"]["bias"]
    return inward + weights["out_layer"]["kernel"].sum(-1)


def _with_ffns(params: dict, chosen: dict) -> dict:
    """The parameters with these FFNs in their places."""
    return params | {
        kind: {
            i: stack | {"block": stack["block"] | chosen[kind][i]}
            for i, stack in params[kind].items()
        }
        for kind in FFNS
    }
