"""Tokens to rows of their experts and back: gathers, whose gradients gather too, where JAX's would
scatter.

A choice is token · k + its place among the token's k. `choice` names that of each row, one past the
last where the row is empty; `row` names the row of each choice, one past the last where it has
none. Either way zeros are read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def spread(
    x: Float[Array, "t d"], choice: Int[Array, " r"], row: Int[Array, "t k"]
) -> Float[Array, "r d"]:
    """The token of each row."""
    return take(x, choice // row.shape[1])


@jax.custom_vjp
def collect(
    y: Float[Array, "r d"], choice: Int[Array, " r"], row: Int[Array, "t k"]
) -> Float[Array, "t d"]:
    """The sum of each token's rows. The gradient of an empty row is zero."""
    return sum((take(y, row[:, i]) for i in range(row.shape[1])), jnp.zeros((), y.dtype))


spread.defvjp(
    lambda x, *places: (spread(x, *places), places),
    lambda places, dy: (collect(dy, *places), None, None),
)
collect.defvjp(
    lambda y, *places: (collect(y, *places), places),
    lambda places, dy: (spread(dy, *places), None, None),
)


def take(a: Array, index: Int[Array, " n"]) -> Array:
    """Rows of a, zero for an index past its end."""
    return a.at[index].get(mode="fill", fill_value=0)
