"""T5 v1.1's encoder (transformers' modeling_t5.py), which turns token ids into FLUX.1's `txt`."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from d2m_jax.config import T5Config
from d2m_jax.models import parameters
from d2m_jax.models.layers import Linear, RMSNorm
from d2m_jax.sharding import constrain


class SelfAttention(nnx.Module):
    """Norm and attention over all tokens; the scale of the logits is in T5's weights."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        dim, inner = config.d_model, config.num_heads * config.d_kv
        self.layer_norm = RMSNorm(dim)
        self.q = Linear(dim, inner, bias=False, rngs=rngs)
        self.k = Linear(dim, inner, bias=False, rngs=rngs)
        self.v = Linear(dim, inner, bias=False, rngs=rngs)
        self.o = Linear(inner, dim, bias=False, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "1 h l l"], dtype: DTypeLike
    ) -> Array:
        x = self.layer_norm(x).astype(dtype)
        q, k, v = (
            linear(x).reshape(*x.shape[:2], self.num_heads, -1)
            for linear in (self.q, self.k, self.v)
        )
        x = jax.nn.dot_product_attention(q, k, v, bias, scale=1.0, implementation="xla")
        return self.o(x.reshape(*x.shape[:2], -1))


class DenseReluDense(nnx.Module):
    """Norm and the FFN with a gate, GELU (tanh form); the name is of the first T5."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.layer_norm = RMSNorm(config.d_model)
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False, rngs=rngs)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"], dtype: DTypeLike) -> Float[Array, "b l d"]:
        x = self.layer_norm(x).astype(dtype)
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class Block(nnx.Module):
    """Attention and FFN beside a stream that stays float32."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.SelfAttention = SelfAttention(config, rngs=rngs)
        self.DenseReluDense = DenseReluDense(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "1 h l l"], dtype: DTypeLike
    ) -> Float[Array, "b l d"]:
        x = x + self.SelfAttention(x, bias, dtype)
        return x + self.DenseReluDense(x, dtype)


class T5Encoder(nnx.Module):
    """The encoder, its blocks as one stack: their parameters have the leading axis (num_layers,).

    `dtype` is that of the products' inputs. The stream between blocks is float32 (T5's grows to
    where bfloat16 would swallow what a block adds), so nothing overflows and nothing is clamped.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config, self.dtype = config, dtype
        self.shared = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets, config.num_heads, rngs=rngs
        )
        self.block = nnx.vmap(lambda rngs: Block(config, rngs=rngs))(rngs.split(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model)

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Features in float32. No attention mask: FLUX.1 was trained with padding attended to."""
        bias = self.position_bias(ids.shape[1])
        graph, params = nnx.split(self.block)

        def body(x: Float[Array, "b l d"], params: PyTree):
            # Each device has its own captions, and a block's parameters while it computes it: left
            # cut, activations would be exchanged, which of many captions are far more.
            params = jax.tree.map(constrain, params)
            return nnx.merge(graph, params)(x, bias, self.dtype), None

        x = constrain(self.shared(ids).astype(jnp.float32), "batch", None, None)
        return self.final_layer_norm(jax.lax.scan(body, x, params)[0])

    def position_bias(self, length: int) -> Float[Array, "1 h l l"]:
        """What every block adds to its attention logits, float32."""
        buckets = position_buckets(np.arange(1 - length, length), self.config)
        by_distance = self.relative_attention_bias(jnp.asarray(buckets)).astype(jnp.float32)
        position = jnp.arange(length)
        distance = position[None, :] - position[:, None]  # key − query
        return by_distance[distance + length - 1].transpose(2, 0, 1)[None]


def position_buckets(distance: Int[np.ndarray, " n"], config: T5Config) -> Int[np.ndarray, " n"]:
    """The bucket of each distance key − query: half for each sign, and of those half for one
    distance each and half for ranges that grow, up to the maximum distance.

    On the host in float32, as transformers: an accelerator's logarithm may miss a boundary.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    ratio = np.maximum(size, exact).astype(np.float32) / exact
    scale = math.log(config.relative_attention_max_distance / exact)
    far = exact + (np.log(ratio) / scale * (half - exact)).astype(distance.dtype)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, np.minimum(far, half - 1))


# (config, seed) → fresh parameters; (config) → their shapes; (config, params, dtype) → the model
initialise = partial(parameters.initialise, T5Encoder)
abstract = partial(parameters.abstract, T5Encoder)
model_of = partial(parameters.model_of, T5Encoder)
