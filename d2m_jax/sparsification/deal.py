"""An FFN as shared expert, normal experts and gate: the same neurons dealt out (docs/recipe.md)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import softmax

from d2m_jax.config import FluxConfig, SparsifyConfig, StackConfig
from d2m_jax.sparsification.prune import ranked, take

ROUNDS = 20  # of k-means, fewer where it settles


def make_moe(
    ffn: dict,
    scores: Float[np.ndarray, "g m w"],
    inputs: Float[np.ndarray, "g m t d"] | None,
    config: FluxConfig,
    stack: StackConfig,
    sparsify: SparsifyConfig,
    generator: np.random.Generator,
) -> tuple[dict, Int[np.ndarray, "g m w"]]:
    """Parameters of models.moe.MoE for the FFNs of one stack, leading axes (groups, blocks), and
    the order that their neurons are in.

    The top-scored neurons are the shared expert, the others are dealt to the normal ones. `inputs`
    are calibration tokens, which only a clustered deal and a fitted gate need.
    """
    shared, experts = config.shared_width(stack), config.moe.experts
    order, lead = ranked(scores), scores.shape[:2]
    for layer in np.ndindex(lead):
        rest = order[layer][shared:]
        if sparsify.deal == "rank":
            labels = snake(len(rest), experts)
        elif sparsify.deal == "random":
            labels = generator.permutation(np.arange(len(rest)) % experts)
        else:
            assert inputs is not None
            hidden = features(
                inputs[layer],
                ffn["in_layer"]["kernel"][layer],
                ffn["in_layer"]["bias"][layer],
                ffn["out_layer"]["kernel"][layer],
            )
            labels = cluster(np.asarray(hidden)[rest], experts, generator)
        order[layer][shared:] = rest[np.argsort(labels, kind="stable")]
    moe = split(take(ffn, order), shared, experts)

    dim, parts = config.hidden_size, moe["experts"]
    kernel = np.zeros((*lead, dim, experts), np.float32)
    bias = np.zeros((*lead, experts), np.float32)
    for layer in np.ndindex(lead):
        if sparsify.gate == "fitted":
            assert inputs is not None
            kernel[layer], bias[layer] = fit_gate(
                inputs[layer], *(parts[n][layer] for n in ("in_kernel", "in_bias", "out_kernel"))
            )
        else:
            kernel[layer] = generator.standard_normal((dim, experts)) / dim**0.5
    moe["gate"] = {"kernel": kernel, "bias": bias}
    if config.moe.router_input == "unmodulated":
        moe["gate_cond"] = {"kernel": np.zeros_like(kernel)}
    return moe | {"scale": np.full(lead, sparsify.routed_scale, np.float32)}, order


def split(ffn: dict, shared: int, experts: int) -> dict:
    """The first `shared` neurons as the shared expert, the rest in equal runs as normal experts.

    The output bias, where there is one, is the shared expert's.
    """
    lead = ffn["in_layer"]["bias"].shape[:-1]
    kernel, bias = ffn["in_layer"]["kernel"], ffn["in_layer"]["bias"]
    out = ffn["out_layer"]["kernel"]
    dim = kernel.shape[-2]
    return {
        "shared": {
            "in_layer": {"kernel": kernel[..., :shared], "bias": bias[..., :shared]},
            "out_layer": ffn["out_layer"] | {"kernel": out[..., :shared, :]},
        },
        "experts": {
            "in_kernel": kernel[..., shared:].reshape(*lead, dim, experts, -1).swapaxes(-3, -2),
            "in_bias": bias[..., shared:].reshape(*lead, experts, -1),
            "out_kernel": out[..., shared:, :].reshape(*lead, experts, -1, dim),
        },
    }


def snake(neurons: int, experts: int) -> Int[np.ndarray, " w"]:
    """Experts of neurons in rank order: 0 … n−1, then n−1 … 0, so that all start equally strong."""
    rounds = np.arange(neurons) // experts
    place = np.arange(neurons) % experts
    return np.where(rounds % 2 == 0, place, experts - 1 - place)


@jax.jit
def features(
    x: Float[Array | np.ndarray, "t d"],
    in_kernel: Float[Array | np.ndarray, "d w"],
    in_bias: Float[Array | np.ndarray, " w"],
    out_kernel: Float[Array | np.ndarray, "w d"],
) -> Float[Array, "w t"]:
    """What clustering compares: every neuron's activations over the tokens, times the norm of its
    output row, centred and of unit length."""
    into, bias, out = (part.astype(jnp.float32) for part in (in_kernel, in_bias, out_kernel))
    hidden = jax.nn.gelu(x.astype(jnp.float32) @ into + bias, approximate=True)
    hidden = hidden.T * jnp.linalg.norm(out, axis=-1)[:, None]
    hidden = hidden - hidden.mean(1, keepdims=True)
    return hidden / (jnp.linalg.norm(hidden, axis=1, keepdims=True) + 1e-9)


def cluster(
    vectors: Float[np.ndarray, "w t"], experts: int, generator: np.random.Generator
) -> Int[np.ndarray, " w"]:
    """Balanced k-means of unit vectors: every expert gets equally many neurons."""
    centres = vectors[generator.choice(len(vectors), experts, replace=False)]
    labels = np.full(len(vectors), -1)  # dealt to nobody yet
    for _ in range(ROUNDS):
        # ‖v − c‖² = 1 + ‖c‖² − 2 v·c, and equal sizes make the sum of ‖c‖² the same for every deal.
        new = assign(-vectors @ centres.T)
        if (new == labels).all():
            break
        labels = new
        centres = np.eye(experts, dtype=vectors.dtype)[labels].T @ vectors
        centres *= experts / len(vectors)
    return labels


def assign(cost: Float[np.ndarray, "w e"], steps: int = 60) -> Int[np.ndarray, " w"]:
    """A cheap column for every row, each column equally often; within 1 % of the optimal sum.

    Exact linear assignment takes rows³, too long for a FLUX.1 FFN. Here a price per column balances
    the softmax over columns while it cools (Sinkhorn); rows still in excess move at the least cost.
    """
    rows, columns = cost.shape
    size, price = rows // columns, np.zeros(columns, cost.dtype)
    for heat in np.geomspace(1, 0.003, steps).astype(cost.dtype) * (cost.std() + 1e-9):
        share = softmax(-(cost + price) / heat, axis=1)
        price += heat * np.log(np.maximum(share.mean(0) * columns, 1e-6))
    labels = (cost + price).argmin(1)
    count = np.bincount(labels, minlength=columns)
    while (count > size).any():
        over, under = np.flatnonzero(count[labels] > size), np.flatnonzero(count < size)
        change = cost[over][:, under] - cost[over, labels[over]][:, None]
        row, column = np.unravel_index(change.argmin(), change.shape)
        row, column = over[row], under[column]
        count[labels[row]] -= 1
        count[column] += 1
        labels[row] = column
    return labels


@jax.jit
def fit_gate(
    x: Float[Array | np.ndarray, "t d"],
    in_kernel: Float[Array | np.ndarray, "e d f"],
    in_bias: Float[Array | np.ndarray, "e f"],
    out_kernel: Float[Array | np.ndarray, "e f d"],
) -> tuple[Float[Array, "d e"], Float[Array, " e"]]:
    """Ridge regression, with a bias, from the FFN's input to the norm of every expert's output.

    Norms are centred over a token's experts and divided by one common deviation: a gate's logits.
    """
    with jax.default_matmul_precision("float32"):
        x = x.astype(jnp.float32)

        def norm(expert: tuple[Array, Array, Array]):
            into, bias, out = (part.astype(jnp.float32) for part in expert)
            return jnp.linalg.norm(jax.nn.gelu(x @ into + bias, approximate=True) @ out, axis=-1)

        y = jax.lax.map(norm, (in_kernel, in_bias, out_kernel)).T
        y = y - y.mean(1, keepdims=True)
        y = y / (jnp.sqrt(jnp.square(y).mean()) + 1e-9)
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        square = x.T @ x
        # The mean eigenvalue times D / tokens: the fewer the tokens, the stronger.
        ridge = jnp.trace(square) / x.shape[0] * jnp.eye(x.shape[1])
        kernel = jnp.linalg.solve(square + ridge, x.T @ y)
        return kernel, y_mean - x_mean @ kernel
