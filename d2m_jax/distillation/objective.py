"""What a stage minimises, so that a batch in parts has the gradient of the whole batch.

Balance and the weights of features are not sums over samples: they ask for shares and means of the
whole batch, which nobody knows while its first part is computed. So a loss is made in two steps.
`means` gives means over samples, which parts may be averaged of. `value` is the loss of these,
linear in them once it is told by which means it is to weigh: in training by running means of
earlier steps, constants for the gradient, in evaluation by the batch's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Means = dict[str, Any]  # nested, of arrays
REMEMBERED = 0.9  # of running means, from one step to the next


@dataclass(frozen=True, eq=False)
class Objective:
    """A stage's loss, for the training loop."""

    # (batch, key) → the whole batch with everything random that its samples need
    draw: Callable[[dict, Array], dict]
    # (params, constants, part of that batch) → means over its samples, float32
    means: Callable[[dict, Any, dict], Means]
    # (means, means to weigh by) → loss and metrics, scalars or one per layer
    value: Callable[[Means, Means], tuple[Float[Array, ""], dict[str, Array]]]
    start: Means  # before the first step: zeros, which weigh nothing

    def __call__(
        self, params: dict, constants: Any, batch: dict, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Loss and metrics of one whole batch, weighed by its own means."""
        means = self.means(params, constants, self.draw(batch, key))
        return self.value(means, jax.lax.stop_gradient(means))


def remembered(running: Means, means: Means, step: Int[Array, ""]) -> Means:
    """The running means after a step: a plain average at first, then one that forgets."""
    keep = jnp.minimum(REMEMBERED, step / (step + 1.0))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, running, means)
