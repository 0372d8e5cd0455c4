"""What each hidden FFN neuron is worth, and what FFNs and modulations read: measured on a teacher.

Values per FFN are trees {"double": {stack: {"img_mlp": …}}, "single": …}, as `ffns` gives.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d2m_jax import hosts
from d2m_jax.config import FluxConfig, check
from d2m_jax.keys import inner_key
from d2m_jax.models.blocks import FFNS
from d2m_jax.models.flux import model_of
from d2m_jax.models.reports import Body, GroupReport, Known
from d2m_jax.progress import bar
from d2m_jax.sharding import in_parts, whole
from d2m_jax.sparsification import sensitivity

# (batch, key) → the arguments of Flux.embed at random times, and the velocity that is true there
Noisy = Callable[[dict, Array], tuple[tuple, Array]]

PROJECTIONS = 2  # of the velocity at random, per batch, that sensitivities are the mean of
ALL = ("taylor", "sensitivity", "inputs", "weights")  # what can be asked for


@dataclass(frozen=True)
class Calibration:
    """What calibration batches tell of a teacher; {} for what was not asked for. Tokens are the
    same in all arrays of an FFN."""

    taylor: dict  # scores [groups, blocks, width] per FFN (docs/method.md, step 0)
    sensitivity: dict  # scores [groups, blocks, width] per FFN (sparsification/sensitivity.py)
    inputs: dict  # of every FFN, [groups, blocks, tokens, D]
    weights: dict  # of these tokens: the velocity's sensitivity, Σ_d S_td, [groups, blocks, tokens]
    cond: Float[np.ndarray, "n d"]  # of the modulations: silu(vec), one per sample


def calibrate(
    config: FluxConfig,
    params: dict,
    batches: Iterable[dict],
    noisy: Noisy,
    key: Array,
    tokens: int,
    text_share: float = 0.25,
    want: tuple[str, ...] = ALL,
    *,
    count: int,
    micro_batch: int | None = None,
) -> Calibration:
    """One pass over the first `count` batches, forward and backward, for what is in `want`. About
    `tokens` tokens of every FFN are read, `text_share` of them text: a double block's FFNs have a
    part each, a single block's all.

    Positions are drawn anew for every sample. Padding is text like other: the model attends to it,
    and a student that was not calibrated on it is farther from its teacher (docs/decisions.md).
    Everything is float32, whatever the teacher is stored in, so that the cut depends on the mesh no
    more than float32's sums do; what is kept of tokens has the teacher's type.
    "taylor": scores by the flow matching loss of a batch, averaged over the batches. "sensitivity":
    scores by S_td = E_u (∂(u · v) / ∂y_td)² of the velocity v to an FFN's output y at these tokens,
    u random projections: no loss, no labels. Scores are sums that tokens are added to; "inputs" and
    "weights" alone keep something of every token, on the host.
    Held on the devices: one batch at a time, the activations of `micro_batch` of its samples (None:
    all), and for "taylor" the batch's gradient of all FFNs. The results are those of whole batches,
    to the rounding of float32's sums. ConfigError where there are fewer batches.
    """
    params = jax.tree.map(jnp.asarray, params)
    found, kept, counts = [], [], None
    score_sums = {}
    for i, batch in enumerate(first_batches(batches, count, "measuring the teacher")):
        size = jax.tree.leaves(batch)[0].shape[0]
        counts = counts or tokens_of(count * size, tokens, text_share)
        mine, parts = jax.random.fold_in(key, i), size // (micro_batch or size)
        with jax.default_matmul_precision("float32"):
            taylor, sums, tokens_seen, cond = measure(
                params, batch, mine, config, noisy, counts, want, parts
            )
        found.append(jax.tree.map(whole, (taylor, cond)))
        kept.append(jax.tree.map(_in_order, jax.tree.map(whole, tokens_seen)))
        sums = jax.tree.map(lambda a: np.asarray(whole(a), np.float64), sums)
        score_sums = each(sensitivity.merged, score_sums, sums) if score_sums else sums
        del batch, tokens_seen
    check(
        len(found) == count, f"calibration: expected batches = {count} of them, found {len(found)}"
    )
    scores, cond = zip(*found, strict=True)
    joined = _joined(kept)
    return Calibration(
        taylor=jax.tree.map(lambda *a: sum(a) / len(a), *scores),
        sensitivity=each(sensitivity.scores, score_sums),
        inputs=joined.get("inputs", {}),
        weights=joined.get("weights", {}),
        cond=np.concatenate(cond),
    )


def first_batches(batches: Iterable[dict], count: int, what: str) -> Iterator[dict]:
    """The first `count` batches, or all that there are; it tells how far it is."""
    with bar(count, what, "batches", "compiling …", hosts.first()) as advance:
        for batch in islice(batches, count):
            yield batch
            advance(1)


def tokens_of(samples: int, tokens: int, text_share: float) -> tuple[int, int]:
    """Image and text tokens of each of so many samples, at least one of both."""
    shares = 1 - text_share, text_share
    image, text = (max(1, round(tokens * share / samples)) for share in shares)
    return image, text


@partial(jax.jit, static_argnames=("config", "noisy", "counts", "want", "parts"))
def measure(
    params: dict,
    batch: dict,
    key: Array,
    config: FluxConfig,
    noisy: Noisy,
    counts: tuple[int, int],
    want: tuple[str, ...],
    parts: int,
) -> tuple[dict, dict, dict, Array]:
    """Calibration of one batch in so many parts: Taylor scores, sums for the sensitivity's, what is
    kept of tokens ([parts, groups, blocks, samples, …] per FFN), `cond`."""
    noise, drawn, spread = jax.random.split(key, 3)
    (image, image_ids, txt, text_ids, *others), target = noisy(batch, noise)
    tokens = _positions(drawn, (*image.shape[:2], txt.shape[1]), counts)
    projections = tuple(
        jax.random.normal(inner_key(key, f"projection {i}"), target.shape)
        for i in range(PROJECTIONS)
    )
    chosen = ffns(params)

    def of_part(gradient: dict, part: tuple) -> tuple[tuple[dict, dict], dict]:
        (image, txt, *others), target, tokens, projections = part

        def run(chosen: dict, probes: dict, asked: tuple | None):
            model = model_of(config, _with_ffns(params, chosen), jnp.float32)
            given = image, image_ids, txt, text_ids, *others
            known = {
                kind: [Known(probes=probes[kind][i]) for i in range(len(probes[kind]))]
                for kind in probes
            }
            streams, context = model.embed(*given, tokens=asked)
            return model.run(streams, context, *([known] if probes else []), remat=True)

        sums, seen, squares = {}, {}, {}
        if "taylor" in want:

            def loss(chosen: dict):
                return jnp.square(run(chosen, {}, None)[0] - target).mean() / parts

            gradient = jax.tree.map(jnp.add, gradient, jax.grad(loss)(chosen))
        if "sensitivity" in want or "weights" in want:
            like = jax.eval_shape(lambda: _by_sample(run(chosen, {}, tokens)[1]))
            probes = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), like)
            _, back, report = jax.vjp(
                lambda probes: run(chosen, probes, tokens), probes, has_aux=True
            )
            seen = _by_sample(report)
            for i, u in enumerate(projections):
                more = jax.tree.map(lambda g: jnp.square(g) / PROJECTIONS, *back(u))
                squares = jax.tree.map(jnp.add, squares, more) if i else more
        elif "inputs" in want:
            seen = _by_sample(run(chosen, {}, tokens)[1])
        if "sensitivity" in want:
            sums = each(sensitivity.sums, chosen, seen, squares)
        return (gradient, sums), _kept(seen, squares, want, params["img_in"]["kernel"].dtype)

    def add(total: tuple[dict, dict], part: tuple):
        gradient, before = total
        (gradient, sums), kept = of_part(gradient, part)
        return (gradient, each(sensitivity.merged, before, sums) if sums else {}), kept

    per_sample = (image, txt, *others), target, tokens, projections
    start = {}, {}
    if "taylor" in want:
        start = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), chosen), {}
    if "sensitivity" in want:
        start = start[0], each(sensitivity.no_tokens, chosen)
    (gradient, sums), kept = jax.lax.scan(add, start, in_parts(per_sample, parts))
    product = jax.tree.map(
        lambda w, g: jnp.abs(w.astype(jnp.float32) * g), chosen if gradient else {}, gradient
    )
    # Modulations must hold for other guidance too: from 0 to twice the calibration's.
    t, y, guidance = others
    if guidance is not None:
        guidance = guidance * jax.random.uniform(spread, guidance.shape, maxval=2.0)
    vec, _ = model_of(config, params).condition(t, y, guidance)
    return each(_per_neuron, product), sums, kept, jax.nn.silu(vec)


def _kept(seen: dict, squares: dict, want: tuple[str, ...], stored: Any) -> dict:
    """What the host keeps of these tokens: 64 thousand of FLUX.1's FFNs are 46 GB in float32."""
    kept = {}
    if "inputs" in want:
        kept["inputs"] = jax.tree.map(lambda a: a.astype(stored), seen)
    if "weights" in want:
        kept["weights"] = jax.tree.map(lambda a: a.sum(-1), squares)
    return kept


def _in_order(a: Float[np.ndarray, "parts g m b t *d"]) -> Float[np.ndarray, "g m n *d"]:
    """The tokens of a batch that was cut by in_parts, sample after sample."""
    a = np.moveaxis(a, 0, 3)
    return a.reshape(*a.shape[:2], -1, *a.shape[5:])


def _joined(kept: list[dict]) -> dict:
    """The tokens of all batches together; each batch's are freed on the way."""
    leaves, structures = zip(*(jax.tree.flatten(tree) for tree in kept), strict=True)
    kept.clear()
    found = []
    for i in range(len(leaves[0])):
        found.append(np.concatenate([mine[i] for mine in leaves], axis=2))
        for mine in leaves:
            mine[i] = None
    return jax.tree.unflatten(structures[0], found)


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


def each(function: Callable[..., Any], *trees: dict) -> dict:
    """The function of every FFN of a tree, or of what several trees have of it, as a tree."""
    return {
        kind: {
            i: {name: function(*(tree[kind][i][name] for tree in trees)) for name in named}
            for i, named in stacks.items()
        }
        for kind, stacks in trees[0].items()
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
