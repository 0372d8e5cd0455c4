"""Moves tokens to the rows of their experts, and what came of them back.

Every token chose k experts. Choice number token · k + i is its i-th, and every choice has a row of
its own; rows are in the order of experts. Two arrays say which belongs to which: `choice` holds for
each row the number of its choice, `row` for each token and i the row. A number one past the last
stands for none (a row that is empty, a choice without a row), of which zeros are read.

All is done by gathers. The gradient of each of the two functions is the other, which gathers too,
where JAX would scatter.
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
