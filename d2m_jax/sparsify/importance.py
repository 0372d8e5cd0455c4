"""What each hidden FFN neuron is worth, and what each FFN reads, over calibration batches.

Values per FFN are trees {"double": {stack: {"img_mlp": …}}, "single": …}, as `ffns` gives.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d2m_jax.config import FluxConfig
from d2m_jax.models.flux import model_of

# (batch, key) → the arguments of Flux.embed at random times, and the velocity that is true there
Noisy = Callable[[dict, Array], tuple[tuple, Array]]

FFNS = {"double": ("img_mlp", "txt_mlp"), "single": ("mlp",)}
SPREAD = 64  # tokens of one sample that calibration draws from, evenly spaced


def ffns(params: dict) -> dict:
    """The parameters of all FFNs, per kind of block, stack and name."""
    return {
        kind: {
            i: {name: stack["block"][name] for name in names} for i, stack in params[kind].items()
        }
        for kind, names in FFNS.items()
    }


def taylor(
    config: FluxConfig, params: dict, batches: Sequence[dict], noisy: Noisy, key: Array
) -> dict:
    """Taylor scores [groups, blocks, width] per FFN (PAPER.md, step 0), the mean over the batches.

    Σ |∂L/∂w · w| over a neuron's in-row, in-bias and out-column; L is the flow matching loss.
    """
    dtype = params["img_in"]["kernel"].dtype

    @jax.jit
    def score(params, batch, key):
        inputs, target = noisy(batch, key)

        def loss(chosen):
            model = model_of(config, _with_ffns(params, chosen), dtype)
            velocity, _ = model.run(*model.embed(*inputs), remat=True)
            return jnp.square(velocity - target).mean()

        chosen = ffns(params)
        products = jax.tree.map(
            lambda w, g: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)),
            chosen,
            jax.grad(loss)(chosen),
        )
        return each(_per_neuron, products)

    total = None
    for i, batch in enumerate(batches):
        new = score(params, batch, jax.random.fold_in(key, i))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return jax.tree.map(lambda a: np.asarray(a) / len(batches), total)


def magnitude(params: dict) -> dict:
    """Σ |w| over a neuron's weights, [groups, blocks, width] per FFN."""
    absolute = jax.tree.map(lambda w: np.abs(np.asarray(w, np.float32)), ffns(params))
    return each(_per_neuron, absolute)


def random(params: dict, generator: np.random.Generator) -> dict:
    """Scores that know nothing, [groups, blocks, width] per FFN."""
    return each(lambda ffn: generator.random(ffn["in_layer"]["bias"].shape), ffns(params))


def ffn_inputs(
    config: FluxConfig,
    params: dict,
    batches: Sequence[dict],
    noisy: Noisy,
    key: Array,
    tokens: int,
) -> dict:
    """About `tokens` inputs [groups, blocks, tokens, D] of every FFN, equally many of each batch.

    They are fewer where the batches hold fewer.
    """
    dtype = params["img_in"]["kernel"].dtype
    share = -(-tokens // len(batches))

    @jax.jit
    def collect(params, batch, key):
        noise, drawn = jax.random.split(key)
        model = model_of(config, params, dtype)
        _, report = model.run(*model.embed(*noisy(batch, noise)[0], collect=SPREAD))

        def draw(x: Float[Array, "g m b n d"]) -> Float[Array, "g m t d"]:
            x = x.reshape(*x.shape[:2], -1, x.shape[-1])
            count = min(share, x.shape[2])
            return x[:, :, jax.random.choice(drawn, x.shape[2], (count,), replace=False)]

        return {
            kind: {
                i: {name: draw(aux[name]["input"]) for name in names}
                for i, aux in enumerate(report[kind])
            }
            for kind, names in FFNS.items()
        }

    parts = [
        jax.tree.map(np.asarray, collect(params, batch, jax.random.fold_in(key, i)))
        for i, batch in enumerate(batches)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x, axis=2), *parts)


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
