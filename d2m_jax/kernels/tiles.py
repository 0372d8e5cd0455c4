"""Grouped matmul for a CPU, in plain JAX: one group after the other, tile by tile of its rows.

How many tiles there are is computed from the group sizes at run time, so that neither padding nor
rows of no group cost work. Such loops have no automatic gradient: `gradient` is that of the
weights, and `multiply` with transposed weights that of the rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim
from jaxtyping import Array, Float, Int

from d2m_jax.kernels.quantized import QArray, product

TILES = 128, 16  # rows of a tile; the small ones hold what the large ones leave of a group


def multiply(
    x: Float[Array | QArray, "r d"], w: Float[Array | QArray, "g d f"], sizes: Int[Array, " g"]
) -> Float[Array, "r f"]:
    """The rows of group i times w[i]; rows past the last group give zeros. Both arrays or both
    QArrays."""

    def group(y, one):
        w, start, end = one

        def tile(y, at, size, mine):
            new = product(jax.tree.map(lambda a: dynamic_slice_in_dim(a, at, size), x), w)
            if mine is not None:
                new = jnp.where(mine, new, dynamic_slice_in_dim(y, at, size))
            return dynamic_update_slice_in_dim(y, new, at, 0)

        return _over_tiles(tile, y, start, end, len(y)), None

    ends = jnp.cumsum(sizes)
    y = jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return jax.lax.scan(group, y, (w, ends - sizes, ends))[0]


def gradient(
    x: Float[Array, "r d"], dy: Float[Array, "r f"], sizes: Int[Array, " g"]
) -> Float[Array, "g d f"]:
    """xᵀ dy over the rows of each group, summed in float32."""

    def group(_, one):
        start, end = one

        def tile(dw, at, size, mine):
            x_rows, dy_rows = (dynamic_slice_in_dim(a, at, size) for a in (x, dy))
            if mine is not None:
                x_rows = jnp.where(mine, x_rows, 0)
            return dw + jnp.matmul(x_rows.T, dy_rows, preferred_element_type=jnp.float32)

        dw = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
        return None, _over_tiles(tile, dw, start, end, len(x))

    ends = jnp.cumsum(sizes)
    return jax.lax.scan(group, None, (ends - sizes, ends))[1]


def _over_tiles(body: Callable[..., Any], carry: Any, start: Array, end: Array, rows: int) -> Any:
    """carry = body(carry, at, size, mine) over rows start to end: a tile's first row, how many it
    has, and a column that says which of them are new to it and inside (None: all are)."""
    tiles = [tile for tile in TILES if tile <= rows] or [rows]
    for tile in tiles:
        last = tile == tiles[-1]
        count = (end - start + (tile - 1 if last else 0)) // tile

        def one(i, carry, first=start, tile=tile, last=last):
            first = first + i * tile
            if not last:
                return body(carry, first, tile, None)
            at = jnp.minimum(first, rows - tile)
            index = at + jnp.arange(tile)[:, None]
            return body(carry, at, tile, (first <= index) & (index < end))

        carry = jax.lax.fori_loop(0, count, one, carry)
        start = start + count * tile
    return carry
