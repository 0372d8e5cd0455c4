"""Grouped matmul: rows sorted by group, one weight matrix per group.

The rows of a group start at a multiple of `tile`, so a tile of rows never meets two groups and the
shapes stay static without dropping a row: `tiles(rows, groups, tile)` tiles hold any split of
`rows` rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def tiles(rows: int, groups: int, tile: int) -> int:
    """Tiles that hold `rows` rows however they fall into `groups` groups, each padded to whole
    tiles."""
    return -(-rows // tile) + groups


def tile_groups(sizes: Int[Array, " g"], count: int, tile: int) -> Int[Array, " t"]:
    """The group of each of `count` tiles, for padded group sizes; tiles past the end belong to the
    last group."""
    ends = jnp.cumsum(sizes)
    starts = jnp.arange(count) * tile
    return jnp.minimum(jnp.searchsorted(ends, starts, side="right"), sizes.shape[0] - 1)


def reference(
    x: Float[Array, "r d"], w: Float[Array, "g d f"], sizes: Int[Array, " g"]
) -> Float[Array, "r f"]:
    """Every group's matrix on every row, the right one selected: the plain form that tests compare
    with."""
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")
    chosen = jax.nn.one_hot(group, w.shape[0], dtype=x.dtype)
    return jnp.einsum("rd,gdf,rg->rf", x, w, chosen)


# A gathered copy of one weight matrix per tile is quickest while it stays in the cache; above this
# size a scan reads each matrix in place and sums its gradient in the carry.
GATHER_BYTES = 4 * 2**20


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def tiled(
    x: Float[Array, "r d"], w: Float[Array, "g d f"], sizes: Int[Array, " g"], tile: int
) -> Float[Array, "r f"]:
    """The sparse form for a CPU: tile by tile with its group's matrix. `sizes` are multiples of
    `tile`, as are r."""
    return _forward(x, w, tile_groups(sizes, x.shape[0] // tile, tile), tile)


def _forward(x, w, group, tile):
    x = x.reshape(-1, tile, x.shape[-1])
    if x.shape[0] * w[0].nbytes <= GATHER_BYTES:
        y = jnp.einsum("tbd,tdf->tbf", x, w[group])
    else:
        y = jax.lax.map(lambda a: a[0] @ w[a[1]], (x, group))
    return y.reshape(-1, w.shape[-1])


def _forward_rule(x, w, sizes, tile):
    group = tile_groups(sizes, x.shape[0] // tile, tile)
    return _forward(x, w, group, tile), (x, w, group)


def _backward_rule(tile, residuals, dy):
    x, w, group = residuals
    dx = _forward(dy, w.swapaxes(1, 2), group, tile)
    x, dy = x.reshape(-1, tile, x.shape[-1]), dy.reshape(-1, tile, dy.shape[-1])
    if x.shape[0] * w[0].nbytes <= GATHER_BYTES:
        parts = jnp.einsum("tbd,tbf->tdf", x, dy, preferred_element_type=jnp.float32)
        dw = jax.ops.segment_sum(parts, group, w.shape[0])
    else:

        def add(dw, a):
            part = jnp.matmul(a[0].T, a[1], preferred_element_type=jnp.float32)
            return dw.at[a[2]].add(part), None

        dw, _ = jax.lax.scan(add, jnp.zeros(w.shape, jnp.float32), (x, dy, group))
    return dx, dw.astype(w.dtype), None


tiled.defvjp(_forward_rule, _backward_rule)
