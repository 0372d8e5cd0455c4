"""What a neuron is worth to the velocity: the variance that it alone brings there.

    score_j = E_t [ (h_tj − mean h_j)² · Σ_d S_td W_jd² ]

h: hidden activations over calibration tokens t, W: the output kernel, S_td = E_u (∂(u · v)/∂y_td)²:
the sensitivity of the velocity v to the FFN's output y (sparsify/importance.py). Neither loss nor
labels enter, and a neuron that is always on is worth nothing: its mean can go into the bias
(sparsify/refit.py). Taylor's |∂L/∂w · w| at a trained teacher is the noise of a gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CHUNK = 4096  # tokens at a time


def scores(
    ffn: dict, inputs: Float[np.ndarray, "g m t d"], sensitivity: Float[np.ndarray, "g m t d"]
) -> Float[np.ndarray, "g m w"]:
    """The score of every neuron of a stack's FFNs."""
    result = np.zeros(ffn["in_layer"]["bias"].shape, np.float32)
    for layer in np.ndindex(result.shape[:2]):
        kernel, bias = (ffn["in_layer"][part][layer] for part in ("kernel", "bias"))
        out, x, s = ffn["out_layer"]["kernel"][layer], inputs[layer], sensitivity[layer]
        parts = [slice(i, i + CHUNK) for i in range(0, len(x), CHUNK)]
        mean = sum(np.asarray(hidden(x[i], kernel, bias).sum(0)) for i in parts) / len(x)
        found = [np.asarray(_score(x[i], s[i], kernel, bias, out, mean)) for i in parts]
        result[layer] = np.sum(found, axis=0, dtype=np.float64) / len(x)
    return result


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


@jax.jit
def _score(
    x: Float[Array | np.ndarray, "t d"],
    s: Float[Array | np.ndarray, "t d"],
    kernel: Float[Array | np.ndarray, "d w"],
    bias: Float[Array | np.ndarray, " w"],
    out: Float[Array | np.ndarray, "w d"],
    mean: Float[Array | np.ndarray, " w"],
) -> Float[Array, " w"]:
    """The sum over these tokens."""
    squares = jnp.square(out.astype(jnp.float32)).T
    worth = jnp.matmul(s.astype(jnp.float32), squares, precision=jax.lax.Precision.HIGHEST)
    return (jnp.square(hidden(x, kernel, bias) - mean) * worth).sum(0)
