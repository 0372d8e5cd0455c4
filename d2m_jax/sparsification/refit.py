"""Output kernels and bias of a cut FFN, fitted to the whole one before any training.

    min_Δ,b  Σ_t w_t ‖ y_t − φ_t (W + Δ) − b ‖²  +  λ ‖Δ‖²

y: the whole FFN's output at calibration token t. φ: what the cut FFN's output kernels W multiply:
the hidden neurons of the shared expert and, times the gate's weight, of those normal experts that
the token chose, zero for the others; of a pruned FFN those that are left. λ: RIDGE times the mean
eigenvalue of the centred Σ w φᵀφ, towards the old kernels. b, the mean of what is missing, is what
`bias` alone gives (Δ = 0). w is 1, or "weighted" the damped sensitivity of the velocity
(S_t / mean S)^½, S_t = Σ_d S_td (sparsification/importance.py): it is heavy-tailed.

Tokens are streamed: a Gram matrix of all hidden neurons is all that is held, 0.6 GB at a width of
12,288.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d2m_jax.config import MoEConfig
from d2m_jax.models.moe import route
from d2m_jax.sparsification.sensitivity import hidden

RIDGE = 1e-3
DAMPING = 0.5  # exponent of a token's sensitivity
CHUNK = 2048  # tokens at a time
EXACT = jax.lax.Precision.HIGHEST

# (parameters of the FFN, x [t, d]) → what its output kernels multiply, [t, f]
Features = Callable[[dict, Array | np.ndarray], Array]


def refit(
    cut: dict,
    whole: dict,
    inputs: Float[np.ndarray, "g m t d"],
    sensitivity: Float[np.ndarray, "g m t"] | None,
    moe: MoEConfig | None,
    bias_alone: bool = False,
) -> tuple[dict, Float[np.ndarray, "g m d"]]:
    """The cut FFNs of a stack with other output kernels, and what their output's bias gains.

    `moe` of an MoE FFN, None of a pruned one; tokens are weighed by `sensitivity` where it is
    given. With `bias_alone` kernels stay as they are.
    """
    features = pruned_features if moe is None else partial(moe_features, moe)
    lead = inputs.shape[:2]
    kernels, biases = [], []
    for layer in np.ndindex(lead):
        mine, old = (jax.tree.map(lambda a, i=layer: a[i], tree) for tree in (cut, whole))
        weights = np.ones(inputs.shape[2], np.float32)
        if sensitivity is not None:
            weights = sensitivity[layer].astype(np.float64)
            weights = ((weights / weights.mean()) ** DAMPING).astype(np.float32)
        kernel, bias = fit(features, mine, old, inputs[layer], weights, bias_alone)
        kernels.append(np.asarray(kernel))
        biases.append(np.asarray(bias))
    kernel = np.stack(kernels).reshape(*lead, *kernels[0].shape)
    return with_kernel(cut, kernel), np.stack(biases).reshape(*lead, -1)


def fit(
    features: Features,
    cut: dict,
    whole: dict,
    x: Float[np.ndarray, "t d"],
    weights: Float[np.ndarray, " t"],
    bias_alone: bool = False,
) -> tuple[Float[Array, "f d"], Float[Array, " d"]]:
    """The output kernels of one cut FFN, one below the other, and the bias that it gains."""
    kernel, sums = kernel_of(cut), None
    for i in range(0, len(x), CHUNK):
        part = slice(i, i + CHUNK)
        found = _sums(features, bias_alone, cut, whole, kernel, x[part], weights[part])
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    assert sums is not None  # there are tokens
    return _solve(kernel, *sums)


@partial(jax.jit, static_argnums=(0, 1))
def _sums(
    features: Features,
    bias_alone: bool,
    cut: dict,
    whole: dict,
    kernel: Float[Array, "f d"],
    x: Float[Array | np.ndarray, "t d"],
    weights: Float[Array | np.ndarray, " t"],
) -> tuple:
    """Of these tokens: Σ w, Σ w φ, Σ w r, Σ w φᵀφ, Σ w φᵀr, r being what the cut FFN misses."""
    phi = features(cut, x)
    missing = jnp.matmul(
        hidden(x, **whole["in_layer"]),
        whole["out_layer"]["kernel"].astype(jnp.float32),
        precision=EXACT,
    ) - jnp.matmul(phi, kernel, precision=EXACT)
    weighed = phi * weights[:, None]
    firsts = weights.sum(), weighed.sum(0), (missing * weights[:, None]).sum(0)
    if bias_alone:
        return *firsts, None, None
    gram = jnp.matmul(weighed.T, phi, precision=EXACT)
    return *firsts, gram, jnp.matmul(weighed.T, missing, precision=EXACT)


@jax.jit
def _solve(
    kernel: Float[Array, "f d"],
    count: Float[Array, ""],
    phi: Float[Array, " f"],
    missing: Float[Array, " d"],
    gram: Float[Array, "f f"] | None,
    cross: Float[Array, "f d"] | None,
) -> tuple[Float[Array, "f d"], Float[Array, " d"]]:
    phi, missing = phi / count, missing / count
    if gram is None or cross is None:
        return kernel, missing
    gram = gram - count * jnp.outer(phi, phi)
    cross = cross - count * jnp.outer(phi, missing)
    ridge = RIDGE * jnp.trace(gram) / len(gram) + 1e-30
    change = jax.scipy.linalg.solve(gram + ridge * jnp.eye(len(gram)), cross, assume_a="pos")
    return kernel + change, missing - jnp.matmul(phi, change, precision=EXACT)


def pruned_features(ffn: dict, x: Float[Array | np.ndarray, "t d"]) -> Float[Array, "t f"]:
    """The hidden neurons that are left."""
    return hidden(x, **ffn["in_layer"])


def moe_features(
    moe: MoEConfig, ffn: dict, x: Float[Array | np.ndarray, "t d"]
) -> Float[Array, "t f"]:
    """Hidden neurons of the shared expert, and of all normal ones times weight and scale, as
    models/moe.py and models/experts.py have it."""
    experts, x = ffn["experts"], x.astype(jnp.float32)
    logits = jnp.matmul(x, ffn["gate"]["kernel"], precision=EXACT) + ffn["gate"]["bias"]
    _, chosen, weight = route(moe, logits[None], moe.top_k)
    masked = (jax.nn.one_hot(chosen[0], moe.experts) * weight[0][..., None]).sum(1)
    into, biases = (experts[name].astype(jnp.float32) for name in ("in_kernel", "in_bias"))
    normal = jnp.einsum("td,edf->tef", x, into, precision=EXACT) + biases
    normal = jax.nn.gelu(normal, approximate=True) * masked[..., None] * ffn["scale"]
    shared = hidden(x, **ffn["shared"]["in_layer"])
    return jnp.concatenate([shared, normal.reshape(len(x), -1)], axis=1)


def kernel_of(ffn: dict) -> Float[Array, "f d"]:
    """All output kernels of one cut FFN, in the order of its features."""
    if "shared" not in ffn:
        return jnp.asarray(ffn["out_layer"]["kernel"], jnp.float32)
    parts = ffn["shared"]["out_layer"]["kernel"], ffn["experts"]["out_kernel"]
    return jnp.concatenate([jnp.asarray(a, jnp.float32).reshape(-1, a.shape[-1]) for a in parts])


def with_kernel(ffn: dict, kernel: Float[np.ndarray, "g m f d"]) -> dict:
    """The cut FFNs of a stack with these output kernels, in the types of the old ones."""
    if "shared" not in ffn:
        old = ffn["out_layer"]["kernel"]
        return ffn | {"out_layer": ffn["out_layer"] | {"kernel": kernel.astype(old.dtype)}}
    shared, old = ffn["shared"], ffn["experts"]["out_kernel"]
    width = shared["out_layer"]["kernel"].shape[-2]
    first, rest = kernel[..., :width, :], kernel[..., width:, :]
    layer = shared["out_layer"] | {"kernel": first.astype(shared["out_layer"]["kernel"].dtype)}
    normal = rest.reshape(old.shape).astype(old.dtype)
    return ffn | {
        "shared": shared | {"out_layer": layer},
        "experts": ffn["experts"] | {"out_kernel": normal},
    }
