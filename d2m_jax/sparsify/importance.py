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
from jaxtyping import Array, Float, Int

from d2m_jax.config import FluxConfig
from d2m_jax.keys import inner_key
from d2m_jax.models.blocks import FFNS
from d2m_jax.models.flux import model_of
from d2m_jax.models.protocol import Body, GroupReport, Known
from d2m_jax.sharding import whole

# (batch, key) → the arguments of Flux.embed at random times, and the velocity that is true there
Noisy = Callable[[dict, Array], tuple[tuple, Array]]

PROJECTIONS = 2  # of the velocity at random, per batch, that sensitivities are the mean of


@dataclass(frozen=True)
class Calibration:
    """What calibration batches tell of a teacher. Tokens are the same in all arrays of an FFN."""

    taylor: dict  # scores [groups, blocks, width] per FFN; {} if not asked for
    inputs: dict  # of every FFN, [groups, blocks, tokens, D]
    sensitivity: dict  # of the velocity to every FFN's output, [groups, blocks, tokens, D]; {}
    cond: Float[np.ndarray, "n d"]  # of the modulations: silu(vec), one per sample


def calibrate(
    config: FluxConfig,
    params: dict,
    batches: Sequence[dict],
    noisy: Noisy,
    key: Array,
    tokens: int,
    text_share: float = 0.25,
    want: tuple[str, ...] = ("taylor", "sensitivity"),
) -> Calibration:
    """One pass over the batches, forward and backward; about `tokens` inputs are kept, those of
    text being `text_share` of them: a double block's FFNs have a part each, a single block's all.

    Positions are drawn anew for every sample. Padding is text like other: the model attends to it,
    and a student that was not calibrated on it is farther from its teacher (docs/decisions.md).
    Everything is float32, whatever the teacher is stored in, so that the cut depends on the mesh no
    more than float32's sums do; what is kept of tokens has the teacher's type.
    `want`: "taylor", scores as docs/method.md's step 0 has them, L the flow matching loss, averaged
    over the batches; "sensitivity", E_u (∂(u · v) / ∂y)² of the velocity v to an FFN's output y at
    these tokens, u random projections: no loss, no labels (sparsify/sensitivity.py).
    """
    params = jax.tree.map(jnp.asarray, params)
    samples = sum(jax.tree.leaves(batch)[0].shape[0] for batch in batches)
    image = max(1, round(tokens * (1 - text_share) / samples))
    counts = image, max(1, round(tokens * text_share / samples))
    parts = []
    for i, batch in enumerate(batches):
        mine = jax.random.fold_in(key, i)
        with jax.default_matmul_precision("float32"):
            found = _measure(
                params, batch, mine, config=config, noisy=noisy, counts=counts, want=want
            )
        parts.append(jax.tree.map(whole, found))
    scores, inputs, sensitivity, cond = zip(*parts, strict=True)

    def joined(*a: np.ndarray) -> np.ndarray:
        return np.concatenate(a, axis=2)

    return Calibration(
        taylor=jax.tree.map(lambda *a: sum(a) / len(a), *scores),
        inputs=jax.tree.map(joined, *inputs),
        sensitivity=jax.tree.map(joined, *sensitivity),
        cond=np.concatenate(cond),
    )


@partial(jax.jit, static_argnames=("config", "noisy", "counts", "want"))
def _measure(
    params: dict,
    batch: dict,
    key: Array,
    *,
    config: FluxConfig,
    noisy: Noisy,
    counts: tuple[int, int],
    want: tuple[str, ...],
):
    """Calibration of one batch, as a tuple."""
    noise, drawn, spread = jax.random.split(key, 3)
    inputs, target = noisy(batch, noise)
    image, _, txt, *_ = inputs
    tokens = _positions(drawn, (*image.shape[:2], txt.shape[1]), counts)

    def run(chosen: dict, probes: dict):
        model = model_of(config, _with_ffns(params, chosen), jnp.float32)
        known = {
            kind: [Known(probes=probes[kind][i]) for i in range(len(probes[kind]))]
            for kind in probes
        }
        streams, context = model.embed(*inputs, tokens=tokens)
        return model.run(streams, context, *([known] if probes else []), remat=True)

    chosen, taylor, sensitivity = ffns(params), {}, {}
    if "taylor" in want:

        def loss(chosen: dict):
            velocity, report = run(chosen, {})
            return jnp.square(velocity - target).mean(), report

        gradient, report = jax.grad(loss, has_aux=True)(chosen)
        product = jax.tree.map(
            lambda w, g: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)), chosen, gradient
        )
        taylor = each(_per_neuron, product)
    else:
        _, report = run(chosen, {})
    seen = _inputs(report)
    if "sensitivity" in want:
        probes = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), _by_sample(report))
        velocity, back = jax.vjp(lambda probes: run(chosen, probes)[0], probes)
        for i in range(PROJECTIONS):
            u = jax.random.normal(inner_key(key, f"projection {i}"), velocity.shape)
            (gradient,) = back(u)
            squares = jax.tree.map(lambda g: jnp.square(g) / PROJECTIONS, gradient)
            sensitivity = jax.tree.map(jnp.add, sensitivity, squares) if i else squares
        sensitivity = jax.tree.map(_over_samples, sensitivity)
    # Modulations must hold for other guidance too: from 0 to twice the calibration's.
    *others, guidance = inputs
    if guidance is not None:
        guidance = guidance * jax.random.uniform(spread, guidance.shape, maxval=2.0)
    _, context = model_of(config, params).embed(*others, guidance=guidance)
    # 64 thousand tokens of FLUX.1's FFNs are 46 GB in float32.
    stored = params["img_in"]["kernel"].dtype
    seen, sensitivity = jax.tree.map(lambda a: a.astype(stored), (seen, sensitivity))
    return taylor, seen, sensitivity, jax.nn.silu(context.vec)


def _positions(
    key: Array, sizes: tuple[int, int, int], counts: tuple[int, int]
) -> tuple[Int[Array, "b p"], Int[Array, "b q"]]:
    """Of each of so many samples so many of its image and of its text tokens, without repetition;
    all of them where there are fewer. `sizes`: samples, image tokens, text tokens."""
    keys, samples = jax.random.split(key), sizes[0]

    def draw(key: Array, tokens: int, count: int) -> Int[Array, "b t"]:
        return jnp.argsort(jax.random.uniform(key, (samples, tokens)), axis=1)[:, :count]

    return draw(keys[0], sizes[1], counts[0]), draw(keys[1], sizes[2], counts[1])


def _by_sample(report: Body[GroupReport]) -> dict:
    """What every FFN read at Context.tokens, [groups, blocks, batch, tokens, D]."""
    return {
        kind: {
            i: {name: stack.ffns[name].inputs for name in names}
            for i, stack in enumerate(report[kind])
        }
        for kind, names in FFNS.items()
    }


def _inputs(report: Body[GroupReport]) -> dict:
    return jax.tree.map(_over_samples, _by_sample(report))


def _over_samples(x: Float[Array, "g m b t d"]) -> Float[Array, "g m n d"]:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


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
