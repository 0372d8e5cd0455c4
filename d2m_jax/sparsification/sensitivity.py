"""What a neuron is worth to the velocity: the variance that it alone brings there.

    score_j = E_t [ (h_tj − mean h_j)² · Σ_d S_td W_jd² ]

h: hidden activations over calibration tokens t, W: the output kernel, S_td = E_u (∂(u · v)/∂y_td)²:
the sensitivity of the velocity v to the FFN's output y (sparsification/importance.py). Neither loss
nor labels enter, and a neuron that is always on is worth nothing: its mean can go into the bias
(sparsification/refit.py). Taylor's |∂L/∂w · w| at a trained teacher is the noise of a gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Per neuron, over tokens: `count`, `mean` of h, and with r_t = Σ_d S_td W_jd² the sums of r
# (`worth`), of (h − mean) r (`first`) and of (h − mean)² r (`second`).
Sums = dict[str, Array | np.ndarray]


def sums(
    ffn: dict,
    inputs: Float[Array | np.ndarray, "g m b t d"],
    sensitivity: Float[Array | np.ndarray, "g m b t d"],
) -> Sums:
    """Of a stack's FFNs over these tokens, [groups, blocks, width]; float32."""

    def of_layer(layer: tuple):
        ffn, x, s = layer
        h = hidden(x, **ffn["in_layer"])
        squares = jnp.square(ffn["out_layer"]["kernel"].astype(jnp.float32)).T
        worth = jnp.matmul(s, squares, precision=jax.lax.Precision.HIGHEST)
        mean, count = h.mean(0), jnp.full(h.shape[1], len(h), jnp.float32)
        h = h - mean
        products = {"worth": worth, "first": h * worth, "second": h * h * worth}
        return {"count": count, "mean": mean} | jax.tree.map(lambda a: a.sum(0), products)

    parts = {"in_layer": ffn["in_layer"], "out_layer": {"kernel": ffn["out_layer"]["kernel"]}}
    dim, (groups, blocks) = inputs.shape[-1], inputs.shape[:2]
    x, s = (a.reshape(groups * blocks, -1, dim) for a in (inputs, sensitivity))
    layers = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)
    found = jax.lax.map(of_layer, (layers, x, s))
    return jax.tree.map(lambda a: a.reshape(groups, blocks, -1), found)


def no_tokens(ffn: dict) -> Sums:
    """The sums before any token."""
    shape = ffn["in_layer"]["bias"].shape
    names = ("count", "mean", "worth", "first", "second")
    return {name: jnp.zeros(shape, jnp.float32) for name in names}


def merged(some: Sums, others: Sums) -> Sums:
    """The sums over both sets of tokens, about the mean of all, so that nothing large cancels."""
    count = some["count"] + others["count"]
    mean = (some["count"] * some["mean"] + others["count"] * others["mean"]) / count
    moved = [_about(mean, part) for part in (some, others)]
    both = {name: moved[0][name] + moved[1][name] for name in moved[0]}
    return both | {"count": count, "mean": mean}


def _about(mean: Array | np.ndarray, part: Sums) -> Sums:
    away, worth, first = part["mean"] - mean, part["worth"], part["first"]
    second = part["second"] + 2 * away * first + away * away * worth
    return {"worth": worth, "first": first + away * worth, "second": second}


def scores(sums: Sums) -> Float[np.ndarray, "g m w"]:
    """The score of every neuron."""
    return np.asarray(sums["second"] / sums["count"], np.float32)


@jax.jit
def hidden(
    x: Float[Array | np.ndarray, "t d"],
    kernel: Float[Array | np.ndarray, "d w"],
    bias: Float[Array | np.ndarray, " w"],
) -> Float[Array, "t w"]:
    """Activations of hidden neurons, float32."""
    into, kernel, bias = (a.astype(jnp.float32) for a in (x, kernel, bias))
    into = jnp.matmul(into, kernel, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.gelu(into + bias, approximate=True)
