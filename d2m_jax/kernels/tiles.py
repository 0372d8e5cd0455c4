"""Tokens through the experts that they chose, for a CPU, in plain JAX.

One tile of every expert at once, in a batch whose size is known when it is compiled and that holds
an even load, then what is left of crowded experts tile by tile, as many as there are at run time.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from d2m_jax.kernels.token_rows import collect, spread, take

TILES = 128, 32  # rows of a tile of what is left; the small ones hold what the large ones leave


def chosen_experts(
    expert: Callable[..., Array],
    x: Float[Array, "t d"],
    chosen: Int[Array, "t k"],
    weight: Float[Array, "t k"],
    params: Any,
    among: int | None = None,
) -> Float[Array, "t f"]:
    """Σ_k expert(rows of x, their weights, params of one expert), over the experts that each row
    chose.

    `params` is a tree of arrays or QArrays [e, …]; where these are some `among` more experts, a
    choice of e or more adds exactly zero. What `expert` gives for a row must depend on that row
    alone and be zero for the weight zero.
    """
    experts = jax.tree.leaves(params)[0].shape[0]
    return _run(expert, x, weight, params, place(chosen, experts, among or experts))


class Places(NamedTuple):
    """Where choices are computed, in the words of kernels/token_rows.py."""

    row: Int[Array, "t k"]  # of each choice in the batch, whose rows go by expert
    choice: Int[Array, " s"]  # of each row of the batch
    left: Int[Array, " r"]  # the choices that are left, by expert
    start: Int[Array, " e"]  # of each expert's part of `left`
    end: Int[Array, " e"]


def place(chosen: Int[Array, "t k"], experts: int, among: int) -> Places:
    """Choices of each expert in their order: the first into the batch, the others left over."""
    flat = chosen.reshape(-1)
    choices = jnp.arange(flat.size)
    mean = flat.size / among
    batch = 8 * math.ceil((mean + mean**0.5) / 8)  # rows per expert: an even load, give or take
    mine = jax.nn.one_hot(flat, experts, dtype=jnp.int32)
    counted = jnp.cumsum(mine, axis=0)
    rank, sizes = ((counted - mine) * mine).sum(1), counted[-1]
    row = jnp.where(rank < batch, flat * batch + rank, experts * batch)
    end = jnp.cumsum(jnp.maximum(sizes - batch, 0))
    start = end - jnp.maximum(sizes - batch, 0)
    left = jnp.where(rank < batch, flat.size, start[flat] + rank - batch)

    def choice_at(where: Int[Array, " r"], size: int):
        return jnp.full(size, flat.size).at[where].set(choices, mode="drop")

    in_batch = choice_at(row, experts * batch)
    return Places(row.reshape(chosen.shape), in_batch, choice_at(left, flat.size), start, end)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    expert: Callable[..., Array],
    x: Float[Array, "t d"],
    weight: Float[Array, "t k"],
    params: Any,
    places: Places,
):
    return _add_left(expert)(_batch(expert, places, x, weight, params), x, weight, params, places)


def _run_forward(
    expert: Callable[..., Array],
    x: Float[Array, "t d"],
    weight: Float[Array, "t k"],
    params: Any,
    places: Places,
):
    y, back = jax.vjp(partial(_batch, expert, places), x, weight, params)
    return _add_left(expert)(y, x, weight, params, places), (back, x, weight, params, places)


def _run_backward(expert: Callable[..., Array], residuals: tuple, dy: Float[Array, "t f"]):
    back, *inputs = residuals
    return *_add_gradients_left(expert)(back(dy), dy, *inputs), None


_run.defvjp(_run_forward, _run_backward)


def _batch(
    expert: Callable[..., Array],
    places: Places,
    x: Float[Array, "t d"],
    weight: Float[Array, "t k"],
    params: Any,
):
    """What the choices in the batch add."""
    rows = spread(x, places.choice, places.row)
    weights = take(weight.reshape(-1), places.choice)
    experts = places.start.size
    rows, weights = (a.reshape(experts, -1, *a.shape[1:]) for a in (rows, weights))
    y = jax.vmap(expert)(rows, weights, *params)
    return collect(y.reshape(-1, y.shape[-1]), places.choice, places.row)


def _add_left(expert: Callable[..., Array]):
    """(y, x, weight, params, places) → y with what the choices left over add.

    Under vmap (the samples of a Mixture of Blocks) one after the other: how many tiles there are
    differs. So it is with the gradients.
    """

    @jax.custom_batching.sequential_vmap
    def add(
        y: Float[Array, "t f"],
        x: Float[Array, "t d"],
        weight: Float[Array, "t k"],
        params: Any,
        places: Places,
    ):
        def tile(y: Float[Array, "t f"], own: Int[Array, ""], choice: Int[Array, " s"]):
            token, rows, weights = _rows(x, weight, places, choice)
            return y.at[token].add(expert(rows, weights, *_of(params, own)), mode="drop")

        return _over_left(tile, y, places)

    return add


def _add_gradients_left(expert: Callable[..., Array]):
    """(gradients, dy, x, weight, params, places) → gradients of x, weight and params, the latter
    summed in float32."""

    @jax.custom_batching.sequential_vmap
    def add(
        gradients: tuple[Array, Array, Any],
        dy: Float[Array, "t f"],
        x: Float[Array, "t d"],
        weight: Float[Array, "t k"],
        params: Any,
        places: Places,
    ):
        def tile(sums: tuple[Array, Array, Any], own: Int[Array, ""], choice: Int[Array, " s"]):
            dx, dweight, dparams = sums
            token, rows, weights = _rows(x, weight, places, choice)
            _, back = jax.vjp(expert, rows, weights, *_of(params, own))
            drows, dweights, *down = back(take(dy, token))
            dx = dx.at[token].add(drows, mode="drop")
            dweight = dweight.at[choice].set(dweights, mode="drop")
            dparams = jax.tree.map(lambda s, d: s.at[own].add(d.astype(s.dtype)), dparams, (*down,))
            return dx, dweight, dparams

        dx, dweight, dparams = gradients
        sums = dx, dweight.reshape(-1), jax.tree.map(lambda a: a.astype(jnp.float32), dparams)
        dx, dweight, sums = _over_left(tile, sums, places)
        dparams = jax.tree.map(lambda s, d: s.astype(d.dtype), sums, dparams)
        return dx, dweight.reshape(weight.shape), dparams

    return add


def _rows(
    x: Float[Array, "t d"], weight: Float[Array, "t k"], places: Places, choice: Int[Array, " s"]
):
    token = choice // places.row.shape[1]
    return token, take(x, token), take(weight.reshape(-1), choice)


def _of(params: Any, own: Int[Array, ""]):
    return jax.tree.map(lambda a: a[own], params)


def _over_left(body: Callable[..., Any], carry: Any, places: Places) -> Any:
    """carry = body(carry, expert, choices) over the tiles of what is left; past an expert's end
    the choice is the one after the last."""
    start = places.start
    for size in TILES:
        rows = places.end - start
        tiles = -(-rows // size) if size == TILES[-1] else rows // size
        last = jnp.cumsum(tiles)

        def one(
            i: Int[Array, ""],
            carry: Any,
            size: int = size,
            start: Int[Array, " e"] = start,
            tiles: Int[Array, " e"] = tiles,
            last: Int[Array, " e"] = last,
        ):
            own = (last <= i).sum()
            at = start[own] + (i - last[own] + tiles[own]) * size + jnp.arange(size)
            choice = jnp.where(at < places.end[own], take(places.left, at), places.left.size)
            return body(carry, own, choice)

        carry = jax.lax.fori_loop(0, last[-1], one, carry)
        start = start + tiles * size
    return carry
