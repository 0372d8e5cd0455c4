"""The normal experts of an MoE FFN: their parameters, and the ways to compute them.

EXPERTS in the environment asks for one of kernels/grouped_matmul.py's ways; it says nothing about
the model, so that no file of it has it.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from d2m_jax.kernels.grouped_matmul import EXPERTS, choose, grouped_matmul
from d2m_jax.kernels.quantized import QArray, cast, dot
from d2m_jax.kernels.tiles import chosen_experts
from d2m_jax.kernels.token_rows import collect, spread, take
from d2m_jax.models.layers import broadcast
from d2m_jax.sharding import PARAMETERS, on_own_part

SPARSE_TOKENS = 64  # from which only the chosen experts' work is less time, on a CPU


class Experts(nnx.Module):
    """The normal experts: n FFNs of equal width, without output bias (the shared expert owns
    it)."""

    def __init__(self, experts: int, dim: int, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        self.in_kernel = nnx.Param(init(rngs.params(), (experts, dim, width), jnp.float32))
        self.in_bias = nnx.Param(jnp.zeros((experts, width)))
        self.out_kernel = nnx.Param(init(rngs.params(), (experts, width, dim), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        chosen: Int[Array, "b n k"],
        weight: Float[Array, "b n k"],
    ) -> Float[Array, "b n d"]:
        """Σ_k weight · expert(x), in the way that EXPERTS asks for, or fit."""
        # Tokens are sorted on their own device; so are they where experts are spread over devices.
        run = partial(run_own_experts, asked(), self.in_bias.shape)
        stored = (PARAMETERS[f"experts.{name}"] for name in ("in_kernel", "in_bias", "out_kernel"))
        return on_own_part(
            run,
            (x, chosen, weight, *self.cast(x.dtype)),
            (*(("batch",),) * 3, *stored),
            ("batch",),
        )

    def cast(self, dtype: DTypeLike) -> tuple[Array | QArray, ...]:
        """Kernels, biases and kernels in a dtype; what is quantised stays so."""
        return tuple(cast(p[...], dtype) for p in (self.in_kernel, self.in_bias, self.out_kernel))


def asked() -> str:
    """The way that EXPERTS in the environment asks for."""
    return os.environ.get(EXPERTS, "auto")


def run_own_experts(
    way: str,
    whole: tuple[int, ...],
    x: Float[Array, "b n d"],
    chosen: Int[Array, "b n k"],
    weight: Float[Array, "b n k"],
    *own: Array | QArray,
):
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
    y = run_experts(way, (x, chosen, weight), own, experts, cut)
    if mine < experts:
        y = jax.lax.psum_scatter(y, "expert", tiled=True)
    return jax.lax.psum(y, cut) if cut else y


def run_experts(
    way: str,
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
    way = "reference" if way == "auto" and few else choose(way)
    flat = x.reshape(tokens, -1), chosen.reshape(tokens, k), weight.reshape(tokens, k)
    if way == "reference":
        y = reference_experts(cut, *flat, *experts)
    elif way == "tiled":
        y = chosen_experts(partial(_expert, cut), *flat, experts, among)
    else:
        y = sorted_experts(way, cut, *flat, *experts)
    return y.reshape(x.shape)


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
        hidden = jax.vmap(dot, (None, 0), 1)(x, in_kernel)
        hidden = jax.nn.gelu(hidden + in_bias, approximate=True)
        out = jax.vmap(partial(dot, cut=cut), (1, 0), 1)(hidden, out_kernel)
        return jnp.einsum("ted,te->td", out, masked.astype(x.dtype))
    hidden = jnp.einsum("td,edf->tef", x, in_kernel)
    hidden = jax.nn.gelu(hidden + broadcast(in_bias, hidden), approximate=True)
    return jnp.einsum("tef,efd->td", hidden * broadcast(masked[..., None], hidden), out_kernel)


def _expert(
    cut: str | None,
    x: Float[Array, "r d"],
    weight: Float[Array, " r"],
    in_kernel: Float[Array | QArray, "d f"],
    in_bias: Float[Array, " f"],
    out_kernel: Float[Array | QArray, "f d"],
):
    hidden = dot(x, in_kernel)
    hidden = jax.nn.gelu(hidden + broadcast(in_bias, hidden), approximate=True)
    return dot(hidden * broadcast(weight[:, None], hidden), out_kernel, cut)


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
    hidden = grouped_matmul(spread(x, order, row), in_kernel, sizes, way)
    hidden += one_hot @ in_bias
    hidden = jax.nn.gelu(hidden, approximate=True)
    hidden *= broadcast(take(weight.reshape(-1), order)[:, None], hidden)
    return collect(grouped_matmul(hidden, out_kernel, sizes, way, cut), order, row)


def sort(
    chosen: Int[Array, "t k"], experts: int
) -> tuple[Int[Array, " r"], Int[Array, "t k"], Int[Array, " e"]]:
    """Choices by expert, those of no expert last: the choice of each row, the row of each choice
    (kernels/token_rows.py), and how many rows each expert has."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    sizes = jax.nn.one_hot(flat, experts, dtype=jnp.int32).sum(0)
    return order, row.reshape(chosen.shape), sizes
