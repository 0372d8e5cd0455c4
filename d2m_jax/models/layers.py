"""The parts of FLUX.1's blocks (BFL src/flux/modules/layers.py), with fused matrices split."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from d2m_jax.kernels.attention import attention
from d2m_jax.kernels.quantized import cast, dot
from d2m_jax.sharding import constrain, on_own_part


def broadcast(a: Float[Array, "*m"], x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """One value for many of x, in its shape and type. It is cast after it was broadcast, so that
    its gradient is summed in float32: in bfloat16 a sum over thousands of tokens stands still."""
    return jnp.broadcast_to(a.astype(jnp.float32), x.shape).astype(x.dtype)


class Linear(nnx.Module):
    """x W + b in the dtype of x; parameters are float32 at birth and stay in whatever dtype they
    were loaded, or quantised (kernels/quantized.py)."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, zero: bool = False, rngs: nnx.Rngs
    ):
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        x = dot(x, self.kernel[...])
        return x if self.bias is None else x + broadcast(self.bias[...], x)


class Linear32(Linear):
    """x W + b in float32, whatever x and the parameters are, to float32's rounding: a GPU else
    multiplies float32 in TF32 and a TPU in one pass of bfloat16, of 10 and 7 bits."""

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        x, kernel = x.astype(jnp.float32), self.kernel[...].astype(jnp.float32)
        x = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
        return x if self.bias is None else x + self.bias[...].astype(jnp.float32)


def layer_norm(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """LayerNorm without affine, eps 1e-6, computed in float32 with the two-pass variance."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a scale, eps 1e-6, in float32."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class QKNorm(nnx.Module):
    """Norms of queries and keys per head."""

    def __init__(self, dim: int):
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class MLPEmbedder(nnx.Module):
    """Linear, SiLU, Linear: timestep, guidance and pooled text enter the global vector through one
    each. Float32."""

    def __init__(self, inputs: int, dim: int, *, rngs: nnx.Rngs):
        self.in_layer = Linear32(inputs, dim, rngs=rngs)
        self.out_layer = Linear32(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class FFN(nnx.Module):
    """Linear, GELU (tanh form), Linear. Without `out_bias` the caller owns the bias of the
    output."""

    def __init__(self, dim: int, width: int, *, out_bias: bool = True, rngs: nnx.Rngs):
        self.in_layer = Linear(dim, width, rngs=rngs)
        self.out_layer = Linear(width, dim, bias=out_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        hidden = constrain(self.in_layer(x), "batch", *[None] * (x.ndim - 2), "inner")
        return self.out_layer(jax.nn.gelu(hidden, approximate=True))


class ModulationOut(NamedTuple):
    """What a branch of a block is modulated by."""

    shift: Float[Array, "b 1 d"]
    scale: Float[Array, "b 1 d"]
    gate: Float[Array, "b 1 d"]


class Modulation(nnx.Module):
    """lin(cond), for one branch of a block or for two. `cond` is silu(vec), or its projection on
    the basis that all blocks share (Flux.modulation_basis)."""

    def __init__(self, inputs: int, dim: int, branches: int, *, rngs: nnx.Rngs):
        self.lin = Linear(inputs, 3 * branches * dim, zero=True, rngs=rngs)
        self.branches = branches

    def __call__(
        self, cond: Float[Array, "b r"], known: Float[Array, "b o"] | None = None
    ) -> list[ModulationOut]:
        """`known` is lin(cond) where it was computed beforehand (Flux.modulations)."""
        out = constrain(self.lin(cond) if known is None else known, "batch", None)
        parts = jnp.split(out[:, None], 3 * self.branches, axis=-1)
        return [ModulationOut(*parts[3 * i : 3 * i + 3]) for i in range(self.branches)]


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"]
) -> Float[Array, "b n d"]:
    """x·(1 + scale) + shift."""
    return x * broadcast(1 + scale, x) + broadcast(shift, x)


class LastLayer(nnx.Module):
    """Modulated norm and projection to the tokens' channels."""

    def __init__(self, dim: int, channels: int, *, rngs: nnx.Rngs):
        self.adaLN_modulation = Linear(dim, 2 * dim, zero=True, rngs=rngs)
        self.linear = Linear(dim, channels, zero=True, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], vec: Float[Array, "b d"]) -> Float[Array, "b n c"]:
        shift, scale = jnp.split(self.adaLN_modulation(jax.nn.silu(vec))[:, None], 2, axis=-1)
        return self.linear(modulate(layer_norm(x), shift, scale))


def timestep_embedding(
    t: Float[Array, " b"], dim: int = 256, max_period: float = 1e4
) -> Float[Array, "b {dim}"]:
    """[cos, sin] of 1000·t in float32; t in [0, 1] (BFL timestep_embedding)."""
    half = dim // 2
    frequency = np.float32(max_period ** -(np.arange(half) / half))
    angle = 1000.0 * t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rope(
    ids: Float[Array, "b n a"], axes_dim: tuple[int, ...], theta: int
) -> tuple[Float[Array, "b n 1 f"], Float[Array, "b n 1 f"]]:
    """Cosines and sines of the rotary embedding, float32, f = half a head's width (BFL
    math.rope)."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequency = np.float32(theta ** -(np.arange(0, dim, 2) / dim))
        angles.append(ids[..., axis, None].astype(jnp.float32) * frequency)
    angle = jnp.concatenate(angles, axis=-1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Float[Array, "b n h d"], pe: tuple[Array, Array]) -> Float[Array, "b n h d"]:
    """Rotate interleaved pairs of the last axis, in float32 (BFL math.apply_rope)."""
    cos, sin = pe
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([cos * a - sin * b, sin * a + cos * b], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def heads(
    linear: Linear, x: Float[Array, "b n d"], count: int
) -> tuple[Float[Array, "b n h c"], Float[Array, "b n h c"], Float[Array, "b n h c"]]:
    """Queries, keys and values of every head, from a linear that gives them side by side."""
    kernel = cast(linear.kernel[...], x.dtype)
    shape = 3, kernel.shape[-1] // 3
    kernel = kernel.reshape(x.shape[-1], *shape)
    kernel = jax.tree.map(lambda part: constrain(part, None, None, "inner"), kernel)
    qkv = dot(x, kernel)
    if linear.bias is not None:
        qkv = qkv + broadcast(linear.bias[...].reshape(shape), qkv)
    qkv = constrain(qkv, "batch", None, None, "inner")
    q, k, v = (qkv[:, :, i].reshape(*x.shape[:2], count, -1) for i in range(3))
    return q, k, v


def attend(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b n h c"],
    v: Float[Array, "b n h c"],
    pe: tuple[Array, Array],
) -> Float[Array, "b n d"]:
    """Attention with rotary positions, heads joined again; every device has heads of its own."""
    q, k, axes = apply_rope(q, pe), apply_rope(k, pe), ("batch", None, "inner")
    x = on_own_part(attention, (q, k, v), (axes, axes, axes), axes)
    return x.reshape(*x.shape[:2], -1)


class SelfAttention(nnx.Module):
    """The projections of one stream of a double block."""

    def __init__(self, dim: int, num_heads: int, *, rngs: nnx.Rngs):
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.norm = QKNorm(dim // num_heads)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.num_heads = num_heads

    def project(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b n h c"]]:
        """Normalised queries and keys, and values."""
        q, k, v = heads(self.qkv, x, self.num_heads)
        return [self.norm.query_norm(q), self.norm.key_norm(k), v]
