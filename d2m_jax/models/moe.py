"""The MoE FFN (docs/method.md): y = MLP_s(x) + scale · Σ_TopK g_i · MLP_i(x), dropless."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.kernels.grouped_matmul import choose, grouped_matmul
from d2m_jax.kernels.quantized import QArray, cast, dot
from d2m_jax.kernels.rows import collect, spread, take
from d2m_jax.kernels.tiles import chosen_experts
from d2m_jax.models.layers import FFN, Linear
from d2m_jax.sharding import PARAMETERS, on_own_part

SPARSE_TOKENS = 64  # from which only the chosen experts' work is less time, on a CPU


class Experts(nnx.Module):
    """The normal experts: n FFNs of equal width, without output bias (the shared expert owns
    it)."""

    def __init__(self, experts: int, dim: int, width: int, *, rngs):
        init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        self.in_kernel = nnx.Param(init(rngs.params(), (experts, dim, width), jnp.float32))
        self.in_bias = nnx.Param(jnp.zeros((experts, width)))
        self.out_kernel = nnx.Param(init(rngs.params(), (experts, width, dim), jnp.float32))

    def cast(self, dtype) -> tuple[Array | QArray, Array, Array | QArray]:
        return tuple(cast(p[...], dtype) for p in (self.in_kernel, self.in_bias, self.out_kernel))


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
        routed: Float[Array, "b n d"] | None = None,
        keep: bool = False,
    ) -> tuple[Float[Array, "b n d"], dict[str, Array]]:
        """Output and what the router did, per sample: `load` (share of choices), `probability`,
        each [b, n], and `entropy`.

        With `keep` also `routed`, what the normal experts added; given back in a later step, it
        is added again without computing it.
        """
        k = self.config.top_k if top_k is None else top_k
        y, aux = self.shared(x), {}
        if routed is None and k > 0:
            routed, aux = self.routed(x, unmodulated, vec, k)
        if keep:
            aux = aux | {"routed": jnp.zeros_like(y) if routed is None else routed}
        return y if routed is None else y + routed, aux

    def routed(
        self, x: Float[Array, "b n d"], unmodulated: Array, vec: Array, k: int
    ) -> tuple[Float[Array, "b n d"], dict[str, Array]]:
        """What k normal experts per token add, and what the router did."""
        logits = self.logits(x, unmodulated, vec)
        probability, chosen, weight = self.route(logits, k)
        # Tokens are sorted on their own device; so are they where experts are spread over devices.
        run = partial(run_own_experts, self.config.implementation, self.experts.in_bias.shape)
        stored = (PARAMETERS[f"experts.{name}"] for name in ("in_kernel", "in_bias", "out_kernel"))
        routed = on_own_part(
            run,
            (x, chosen, weight, *self.experts.cast(x.dtype)),
            (*(("batch",),) * 3, *stored),
            ("batch",),
        )
        load = jax.nn.one_hot(chosen, self.config.experts).mean((1, 2))
        entropy = -(probability * jnp.log(probability + 1e-9)).sum(-1).mean(1)
        aux = {"load": load, "probability": probability.mean(1), "entropy": entropy}
        return self.scale[...].astype(x.dtype) * routed, aux

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
        1; "softmax": n·s_i, "sigmoid": 2·sigmoid, scaled likewise to 1 at zero logits.
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


def run_own_experts(implementation: str, whole: tuple[int, int], x, chosen, weight, *own):
    """run_experts on a device that has all experts, some of them, or some neurons of each; `whole`
    is what there is of both.

    Devices with other experts send their tokens and get sums back.
    """
    (experts, width), (mine, neurons) = whole, own[1].shape
    if mine < experts:
        x, chosen, weight = (
            jax.lax.all_gather(a, "expert", tiled=True) for a in (x, chosen, weight)
        )
        chosen = chosen - jax.lax.axis_index("expert") * mine
        chosen = jnp.where((chosen >= 0) & (chosen < mine), chosen, mine)
    cut = "tensor" if neurons < width else None
    y = run_experts(implementation, (x, chosen, weight), own, experts, cut)
    if mine < experts:
        y = jax.lax.psum_scatter(y, "expert", tiled=True)
    return jax.lax.psum(y, cut) if cut else y


def run_experts(
    implementation: str,
    samples: tuple,
    experts: tuple,
    among: int | None = None,
    cut: str | None = None,
) -> Float[Array, "b n d"]:
    """Σ_k weight · expert(x) of samples (x, chosen, weight), in the way asked for or fit.

    Where these are some `among` more experts, the id after the last marks a choice of another
    device's expert: it adds exactly zero, to gradients too, and costs no matmul. `cut` is the mesh
    axis over which devices have other neurons of them, or None.
    """
    x, chosen, weight = samples
    tokens, k = x.shape[0] * x.shape[1], chosen.shape[-1]
    # A short sequence is cheaper with all experts masked (benchmarks/ffn.py).
    few = tokens < SPARSE_TOKENS or k >= (among or experts[0].shape[0])
    way = "reference" if implementation == "auto" and few else choose(implementation)
    plain = {
        "reference": partial(reference_experts, cut),
        "tiled": partial(tiled_experts, among, cut),
    }
    function = plain.get(way) or partial(sorted_experts, way, cut)
    flat = x.reshape(tokens, -1), chosen.reshape(tokens, k), weight.reshape(tokens, k)
    return function(*flat, *experts).reshape(x.shape)


def reference_experts(
    cut: str | None,
    x: Float[Array, "t d"],
    chosen: Int[Array, "t k"],
    weight: Float[Array, "t k"],
    in_kernel: Float[Array | QArray, "e d f"],
    in_bias: Float[Array, "e f"],
    out_kernel: Float[Array | QArray, "e f d"],
) -> Float[Array, "t d"]:
    """Σ_k weight · expert(x): all experts on all tokens, those not chosen masked. The plain
    form."""
    masked = (jax.nn.one_hot(chosen, in_kernel.shape[0]) * weight[..., None]).sum(1)
    if isinstance(in_kernel, QArray):  # whose scales differ by expert: summed over them after
        hidden = jax.nn.gelu(jax.vmap(dot, (None, 0), 1)(x, in_kernel) + in_bias, approximate=True)
        out = jax.vmap(partial(dot, cut=cut), (1, 0), 1)(hidden, out_kernel)
        return jnp.einsum("ted,te->td", out, masked.astype(x.dtype))
    hidden = jax.nn.gelu(jnp.einsum("td,edf->tef", x, in_kernel) + in_bias, approximate=True)
    return jnp.einsum("tef,efd->td", hidden * masked[..., None].astype(x.dtype), out_kernel)


def tiled_experts(
    among: int | None,
    cut: str | None,
    x: Float[Array, "t d"],
    chosen: Int[Array, "t k"],
    weight: Float[Array, "t k"],
    *experts: Array | QArray,
) -> Float[Array, "t d"]:
    """The same with only the chosen experts' work, for a CPU: tiles of each one's tokens."""
    return chosen_experts(partial(_expert, cut), x, chosen, weight, experts, among)


def _expert(cut, x, weight, in_kernel, in_bias, out_kernel):
    hidden = jax.nn.gelu(dot(x, in_kernel) + in_bias, approximate=True)
    return dot(hidden * weight[:, None].astype(x.dtype), out_kernel, cut)


def sorted_experts(
    way: str,
    cut: str | None,
    x: Float[Array, "t d"],
    chosen: Int[Array, "t k"],
    weight: Float[Array, "t k"],
    in_kernel: Float[Array | QArray, "e d f"],
    in_bias: Float[Array, "e f"],
    out_kernel: Float[Array | QArray, "e f d"],
) -> Float[Array, "t d"]:
    """The same with only the chosen experts' work: choices sorted by expert, grouped matmuls."""
    order, row, sizes = sort(chosen, in_kernel.shape[0])
    one_hot = jax.nn.one_hot(chosen.reshape(-1)[order], in_kernel.shape[0], dtype=x.dtype)
    hidden = grouped_matmul(spread(x, order, row), in_kernel, sizes, way) + one_hot @ in_bias
    weights = take(weight.reshape(-1), order)[:, None].astype(x.dtype)
    hidden = jax.nn.gelu(hidden, approximate=True) * weights
    return collect(grouped_matmul(hidden, out_kernel, sizes, way, cut), order, row)


def sort(
    chosen: Int[Array, "t k"], experts: int
) -> tuple[Int[Array, " r"], Int[Array, "t k"], Int[Array, " e"]]:
    """Choices by expert, those of no expert last: the choice of each row, the row of each choice
    (kernels/rows.py), and how many rows each expert has."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    sizes = jax.nn.one_hot(flat, experts, dtype=jnp.int32).sum(0)
    return order, row.reshape(chosen.shape), sizes
