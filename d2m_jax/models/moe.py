"""The MoE FFN of PAPER.md: y = MLP_s(x) + scale · Σ_TopK g_i · MLP_i(x), dropless."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.kernels import grouped_matmul
from d2m_jax.models.layers import FFN, Linear
from d2m_jax.sharding import on_own_samples

SORTED_TOKENS = 512  # from which sorting tokens by expert pays on a CPU


class Experts(nnx.Module):
    """The normal experts: n FFNs of equal width, without output bias (the shared expert owns
    it)."""

    def __init__(self, experts: int, dim: int, width: int, *, rngs):
        init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        self.in_kernel = nnx.Param(init(rngs.params(), (experts, dim, width), jnp.float32))
        self.in_bias = nnx.Param(jnp.zeros((experts, width)))
        self.out_kernel = nnx.Param(init(rngs.params(), (experts, width, dim), jnp.float32))

    def cast(self, dtype) -> tuple[Array, Array, Array]:
        return tuple(p[...].astype(dtype) for p in (self.in_kernel, self.in_bias, self.out_kernel))


class MoE(nnx.Module):
    """Shared expert, normal experts and gate in the place of one FFN."""

    def __init__(self, config: FluxConfig, stack: StackConfig, *, out_bias: bool = True, rngs):
        dim, self.config = config.hidden_size, config.moe
        self.shared = FFN(dim, config.shared_width(stack), out_bias=out_bias, rngs=rngs)
        self.experts = Experts(config.moe.experts, dim, config.expert_width(stack), rngs=rngs)
        self.gate = Linear(dim, config.moe.experts, rngs=rngs)
        if config.moe.router_input == "unmodulated":
            self.gate_cond = Linear(dim, config.moe.experts, bias=False, zero=True, rngs=rngs)
        self.scale = nnx.Param(
            jnp.ones(())
        )  # of the normal experts' sum; 0 when they enter after stage 1

    def __call__(
        self,
        x: Float[Array, "b n d"],
        unmodulated: Float[Array, "b n d"],
        vec: Float[Array, "b d"],
        top_k: int | None = None,
    ) -> tuple[Float[Array, "b n d"], dict[str, Array]]:
        """Output and what the router did, per sample: `load` (share of choices) and `probability`,
        each [b, n]."""
        k = self.config.top_k if top_k is None else top_k
        y = self.shared(x)
        if k == 0:
            return y, {}
        logits = self.logits(x, unmodulated, vec)
        probability, chosen, weight = self.route(logits, k)
        run = partial(run_experts, self.config.implementation)
        routed = on_own_samples(run, (x, chosen, weight), self.experts.cast(x.dtype))
        y = y + self.scale[...].astype(x.dtype) * routed
        load = jax.nn.one_hot(chosen, self.config.experts).mean((1, 2))
        entropy = -(probability * jnp.log(probability + 1e-9)).sum(-1).mean(1)
        return y, {"load": load, "probability": probability.mean(1), "entropy": entropy}

    def logits(self, x, unmodulated, vec) -> Float[Array, "b n e"]:
        """Gate logits in float32. With router_input "unmodulated" the timestep enters beside the
        token."""
        if self.config.router_input == "modulated":
            return self.gate(x.astype(jnp.float32))
        cond = self.gate_cond(jax.nn.silu(vec.astype(jnp.float32)))[:, None]
        return self.gate(unmodulated.astype(jnp.float32)) + cond

    def route(
        self, logits: Float[Array, "b n e"], k: int
    ) -> tuple[Float[Array, "b n e"], Int[Array, "b n k"], Float[Array, "b n k"]]:
        """Probabilities over experts (for balance), the chosen experts, and their weights.

        "renormalised": k·s_i / Σ_TopK s with s = softmax, so that a uniform gate gives every weight
        1 (PAPER.md); "softmax": n·s_i, "sigmoid": 2·sigmoid, scaled likewise to 1 at zero logits.
        """
        probability = jax.nn.softmax(logits, axis=-1)
        top, chosen = jax.lax.top_k(logits, k)
        if self.config.gate == "renormalised":
            weight = k * jax.nn.softmax(top, axis=-1)
        elif self.config.gate == "softmax":
            weight = logits.shape[-1] * jnp.take_along_axis(probability, chosen, axis=-1)
        else:
            weight = 2 * jax.nn.sigmoid(top)
        return probability, chosen, weight


def run_experts(implementation: str, samples: tuple, experts: tuple) -> Float[Array, "b n d"]:
    """Σ_k weight · expert(x) of samples (x, chosen, weight), in the way asked for or fit."""
    x, chosen, weight = samples
    tokens, k = x.shape[0] * x.shape[1], chosen.shape[-1]
    if implementation == "auto":
        # A short sequence is cheaper with all experts masked than sorted (benchmarks/ffn.py).
        sparse = tokens >= SORTED_TOKENS and k < experts[0].shape[0]
        implementation = "tiled" if sparse else "reference"
    function = {"reference": reference_experts, "tiled": tiled_experts}[implementation]
    flat = x.reshape(tokens, -1), chosen.reshape(tokens, k), weight.reshape(tokens, k)
    return function(*flat, *experts).reshape(x.shape)


def reference_experts(
    x: Float[Array, "t d"],
    chosen: Int[Array, "t k"],
    weight: Float[Array, "t k"],
    in_kernel: Float[Array, "e d f"],
    in_bias: Float[Array, "e f"],
    out_kernel: Float[Array, "e f d"],
) -> Float[Array, "t d"]:
    """Σ_k weight · expert(x): all experts on all tokens, those not chosen masked. The plain
    form."""
    masked = (jax.nn.one_hot(chosen, in_kernel.shape[0]) * weight[..., None]).sum(1)
    hidden = jax.nn.gelu(jnp.einsum("td,edf->tef", x, in_kernel) + in_bias, approximate=True)
    return jnp.einsum("tef,efd->td", hidden * masked[..., None].astype(x.dtype), out_kernel)


def tiled_experts(
    x: Float[Array, "t d"],
    chosen: Int[Array, "t k"],
    weight: Float[Array, "t k"],
    in_kernel: Float[Array, "e d f"],
    in_bias: Float[Array, "e f"],
    out_kernel: Float[Array, "e f d"],
) -> Float[Array, "t d"]:
    """The same with only the chosen experts' work: tokens sorted into tiles of one expert each."""
    experts, k = in_kernel.shape[0], chosen.shape[1]
    tile = tile_rows(chosen.size, experts)
    slot, sizes, token = place(chosen, experts, tile)
    # Rows of empty places read token 0; their output is never read, so their gradient is zero.
    rows = _gather(x, token, slot)
    group = grouped_matmul.tile_groups(sizes, rows.shape[0] // tile, tile)
    bias = jnp.repeat(in_bias[group], tile, axis=0)
    hidden = grouped_matmul.tiled(rows, in_kernel, sizes, tile) + bias
    out = grouped_matmul.tiled(jax.nn.gelu(hidden, approximate=True), out_kernel, sizes, tile)
    out = _scatter(out, slot, token).reshape(-1, k, x.shape[-1])
    return jnp.einsum("tkd,tk->td", out, weight.astype(x.dtype))


def tile_rows(rows: int, experts: int) -> int:
    """Rows per tile: large enough for a matmul to be efficient, small enough that padding stays a
    small share."""
    share = rows / experts
    return next((tile for tile in (128, 64, 32) if share >= 3 * tile), 16)


def place(
    chosen: Int[Array, "t k"], experts: int, tile: int
) -> tuple[Int[Array, " tk"], Int[Array, " e"], Int[Array, " r"]]:
    """Where each choice goes in the tiled order: its row, the padded group sizes, and each row's
    token."""
    flat = chosen.reshape(-1)
    one_hot = jax.nn.one_hot(flat, experts, dtype=jnp.int32)
    rank = jnp.take_along_axis(jnp.cumsum(one_hot, axis=0), flat[:, None], axis=1)[:, 0] - 1
    sizes = -(-one_hot.sum(0) // tile) * tile
    slot = (jnp.cumsum(sizes) - sizes)[flat] + rank
    rows = grouped_matmul.tiles(flat.shape[0], experts, tile) * tile
    source = jnp.arange(flat.shape[0]) // chosen.shape[1]
    token = jnp.zeros(rows, jnp.int32).at[slot].set(source, unique_indices=True)
    return slot, sizes, token


@jax.custom_vjp
def _gather(x, token, slot):
    """Rows of x in tiled order; the gradient gathers back by `slot` instead of scattering."""
    return x[token]


def _gather_forward(x, token, slot):
    return x[token], (slot, x.shape[0])


def _gather_backward(residuals, dy):
    slot, tokens = residuals
    return dy[slot].reshape(tokens, -1, dy.shape[-1]).sum(1), None, None


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def _scatter(rows, slot, token):
    """Rows of the tiled order back in the order of choices."""
    return rows[slot]


def _scatter_forward(rows, slot, token):
    return rows[slot], (slot, token, rows.shape[0])


def _scatter_backward(residuals, dy):
    slot, token, rows = residuals
    return (
        jnp.zeros((rows, dy.shape[-1]), dy.dtype).at[slot].set(dy, unique_indices=True),
        None,
        None,
    )


_scatter.defvjp(_scatter_forward, _scatter_backward)
