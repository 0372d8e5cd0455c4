"""Mixture of Blocks (docs/method.md): per sample a router picks κ of a group's m blocks to run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from d2m_jax.models.layers import Linear32, broadcast
from d2m_jax.models.reports import NOTHING, Context, Known, Streams
from d2m_jax.sharding import BY_NAME, on_own_part

PARTS = 4  # of a batch, at most: the more, the fewer samples too many, and the smaller the products


class BlockRouter(nnx.Module):
    """α · W_x [x_p, c_p] + (1 − α) · W_y y in float32: pooled image and text features, and the
    global vector.

    >>> router = BlockRouter(16, blocks=4, rngs=nnx.Rngs(0))
    >>> logits = router((jnp.ones((2, 6, 16)), jnp.ones((2, 3, 16))), vec=jnp.ones((2, 16)))
    >>> probability, chosen, weight = choose(logits, active=2)  # blocks to run, and their weights
    >>> chosen.shape
    (2, 2)
    """

    def __init__(self, dim: int, blocks: int, alpha: float = 0.5, *, rngs: nnx.Rngs):
        self.features = Linear32(2 * dim, blocks, rngs=rngs)
        self.vec = Linear32(dim, blocks, bias=False, rngs=rngs)
        self.alpha = alpha

    def __call__(
        self, streams: Streams, vec: Float[Array, "b d"], text_tokens: int = 0
    ) -> Float[Array, "b m"]:
        """Logits of streams (img, txt), or of one whose first tokens are text."""
        pooled, y = layer_pool(streams, text_tokens), vec.astype(jnp.float32)
        return self.alpha * self.features(pooled) + (1 - self.alpha) * self.vec(y)


def layer_pool(streams: Streams, text_tokens: int) -> Float[Array, "b e"]:
    """[x_p, c_p]: means over image and over text tokens, each normalised, for they grow with depth;
    float32."""
    if len(streams) == 2:
        img, txt = streams
    else:
        txt, img = streams[0][:, :text_tokens], streams[0][:, text_tokens:]
    # By hand, for the mean of no tokens, in a model without text, is to be zero.
    means = [part.astype(jnp.float32).sum(1) / max(1, part.shape[1]) for part in (img, txt)]
    means = [m * jax.lax.rsqrt(jnp.square(m).mean(-1, keepdims=True) + 1e-6) for m in means]
    return jnp.concatenate(means, axis=-1)


def choose(
    logits: Float[Array, "b m"], active: int, which: Literal["any", "adjacent"] = "any"
) -> tuple[Float[Array, "b m"], Int[Array, "b k"], Float[Array, "b k"]]:
    """Probabilities, the chosen blocks in their order, and weights: exactly 1 forward,
    straight-through backward.

    "any": the blocks of the largest logits, each by its own probability. "adjacent": the run of
    blocks that follow one another with the largest sum of logits; all by the probability of that
    run among the runs, of which a block's probability is its share, so that blocks' sum to 1.
    """
    if which == "any":
        probability = jax.nn.softmax(logits, axis=-1)
        chosen = jnp.sort(jax.lax.top_k(logits, active)[1], axis=-1)
        p = jnp.take_along_axis(probability, chosen, axis=-1)
    else:
        blocks = logits.shape[-1]
        runs = np.arange(blocks - active + 1)[:, None] + np.arange(active)  # [runs, κ]
        of_runs = logits[:, runs].sum(-1)
        best, of_runs = of_runs.argmax(-1), jax.nn.softmax(of_runs, axis=-1)
        chosen = best[:, None] + jnp.arange(active)
        p = jnp.take_along_axis(of_runs, best[:, None], axis=-1)
        p = jnp.broadcast_to(p, chosen.shape)
        shares = np.zeros((len(runs), blocks), np.float32)
        np.put_along_axis(shares, runs, 1 / active, axis=1)
        probability = jnp.matmul(of_runs, shares, precision=jax.lax.Precision.HIGHEST)
    return probability, chosen, 1 + (p - jax.lax.stop_gradient(p))


RunBlock = Callable[[Any, Streams, Context], tuple[Streams, Any]]  # and what it reports, a tree


def run_chosen(
    run_block: RunBlock,
    params: Any,
    streams: Streams,
    context: Context,
    chosen: Int[Array, "b k"],
    weight: Float[Array, "b k"],
    known: Known = NOTHING,
) -> tuple[Streams, Any]:
    """Run each sample through its chosen blocks. `params` leaves are [m, …]; or they are a tuple of
    the blocks' parameters, whose weights are then read where they are. `known` is what
    Context.known is to be, for all blocks: [m, b, …].

    Block after block, the samples that run it come first and go through it in parts of the batch;
    a part in which none runs is skipped. So samples that choose alike are computed together, and
    of a block at most a part's samples too many.
    What a block reports per sample comes back as [m, b, …], zero where the block did not run.
    """
    # Position tables of one row serve all samples, those of many belong to theirs.
    pe_mapped = context.pe[0].shape[0] != 1
    known = jax.tree.map(lambda a: a.swapaxes(0, 1), known)
    pe = context.pe if pe_mapped else None
    each = context.top_k_each
    asked = each, context.tokens, context.text_lengths
    samples = streams, context.vec, context.cond, chosen, weight, pe, known, asked
    arguments = samples, params, None if pe_mapped else context.pe
    run = partial(_run_blocks, run_block, context)
    streams, reports = on_own_part(run, arguments, (("batch",), BY_NAME, ()), ("batch",))
    return streams, jax.tree.map(lambda a: a.swapaxes(0, 1), reports)


def _run_blocks(
    run_block: RunBlock,
    context: Context,
    samples: tuple,
    params: Any,
    pe_of_all: tuple[Array, Array] | None,
) -> tuple[Streams, Any]:
    """All blocks; reports are [b, m, …]."""
    streams, vec, cond, chosen, weight, pe, known, asked = samples
    apart, batch = isinstance(params, tuple), vec.shape[0]
    blocks = len(params) if apart else jax.tree.leaves(params)[0].shape[0]
    parts = max(n for n in range(1, PARTS + 1) if batch % n == 0)
    chooses = chosen[:, :, None] == jnp.arange(blocks)
    runs, weights = chooses.any(1), (chooses * weight[:, :, None]).sum(1)

    def block(streams: Streams, mine: tuple) -> tuple[Streams, Any]:
        params, runs, weight, known = mine
        given = streams, vec, cond, pe, known, asked, runs, weight

        @partial(jax.checkpoint, prevent_cse=False)
        def part(given: tuple) -> tuple[Streams, Any]:
            streams, vec, cond, pe, known, asked, runs, weight = given
            pe = pe_of_all if pe is None else pe
            each, tokens, lengths = asked
            own = {"vec": vec, "cond": cond, "pe": pe, "known": known}
            own |= {"top_k_each": each, "tokens": tokens, "text_lengths": lengths}

            def run(streams: Streams) -> tuple[Streams, Any]:
                new, reports = run_block(params, streams, replace(context, **own))
                reports = jax.tree.map(lambda a: jnp.where(_like(runs, a), a, 0), reports)
                return tuple(map(partial(_through, runs, weight), streams, new)), reports

            def skip(streams: Streams) -> tuple[Streams, Any]:
                shapes = jax.eval_shape(run, streams)[1]
                return streams, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

            return jax.lax.cond(runs[0], run, skip, streams)  # the first one tells of all

        if batch == 1:
            return part(given)
        order = jnp.argsort(~runs, stable=True)

        def cut(a: Array) -> Array:
            return a[order].reshape(parts, -1, *a.shape[1:])

        def joined(a: Array) -> Array:
            return a.reshape(batch, *a.shape[2:])[jnp.argsort(order)]

        return jax.tree.map(joined, jax.lax.map(part, jax.tree.map(cut, given)))

    of_blocks = runs.T, weights.T, jax.tree.map(lambda a: a.swapaxes(0, 1), known)
    if not apart:
        streams, reports = jax.lax.scan(block, streams, (params, *of_blocks))
    else:
        found = []
        for i, mine in enumerate(params):
            streams, report = block(streams, (mine, *jax.tree.map(lambda a, i=i: a[i], of_blocks)))
            found.append(report)
        reports = jax.tree.map(lambda *a: jnp.stack(a), *found)
    return streams, jax.tree.map(lambda a: a.swapaxes(0, 1), reports)


def _through(
    runs: Bool[Array, " b"],
    weight: Float[Array, " b"],
    x: Float[Array, "b n d"],
    y: Float[Array, "b n d"],
) -> Float[Array, "b n d"]:
    """y where it runs. The weight − 1 is exactly 0, so the block's output passes as it is; the
    gradient of the weight is y − x."""
    runs, weight = _like(runs, x), _like(weight, x)
    return jnp.where(runs, y + broadcast(weight - 1, x) * (y - x), x)


def _like(a: Array, b: Array) -> Array:
    """One value per sample, for all that b has of it."""
    return a.reshape(-1, *(1,) * (b.ndim - 1))
