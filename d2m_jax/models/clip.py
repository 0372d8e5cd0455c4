"""CLIP's text encoder (transformers' modeling_clip.py), which turns token ids into FLUX.1's `y`;
its layers are the vision tower's too (clip_vision.py)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from d2m_jax.config import CLIPConfig, CLIPVisionConfig
from d2m_jax.models import parameters
from d2m_jax.models.layers import Linear

Sizes = CLIPConfig | CLIPVisionConfig  # of either tower's layers

# flax's faster variance loses digits where the mean is large
LayerNorm = partial(nnx.LayerNorm, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False)


class Attention(nnx.Module):
    """Attention of every token to all, or where `causal` to itself and those before it."""

    def __init__(self, config: Sizes, causal: bool, *, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.q_proj = Linear(dim, dim, rngs=rngs)
        self.k_proj = Linear(dim, dim, rngs=rngs)
        self.v_proj = Linear(dim, dim, rngs=rngs)
        self.out_proj = Linear(dim, dim, rngs=rngs)
        self.num_heads, self.causal = config.num_attention_heads, causal

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        q, k, v = (
            linear(x).reshape(*x.shape[:2], self.num_heads, -1)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal, implementation="xla")
        return self.out_proj(y.reshape(x.shape))


class MLP(nnx.Module):
    """Linear, quick GELU (x · sigmoid(1.702 x)), Linear."""

    def __init__(self, config: Sizes, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = self.fc1(x)
        return self.fc2(x * jax.nn.sigmoid(1.702 * x))


class Layer(nnx.Module):
    """Attention and MLP beside a stream that stays float32."""

    def __init__(self, config: Sizes, causal: bool, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, rngs=rngs)
        self.self_attn = Attention(config, causal, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"], dtype: DTypeLike) -> Float[Array, "b l d"]:
        x = x + self.self_attn(self.layer_norm1(x).astype(dtype))
        return x + self.mlp(self.layer_norm2(x).astype(dtype))


def stack(config: Sizes, causal: bool, rngs: nnx.Rngs) -> Layer:
    """All layers as one, their parameters with the leading axis (num_hidden_layers,)."""
    keys = rngs.split(config.num_hidden_layers)
    return nnx.vmap(lambda rngs: Layer(config, causal, rngs=rngs))(keys)


def run(layers: Layer, x: Float[Array, "b l d"], dtype: DTypeLike) -> Float[Array, "b l d"]:
    """The stream after all layers."""
    graph, params = nnx.split(layers)

    def body(x: Float[Array, "b l d"], params: PyTree):
        return nnx.merge(graph, params)(x, dtype), None

    return jax.lax.scan(body, x, params)[0]


class CLIPText(nnx.Module):
    """The encoder, its layers as one stack: their parameters have the leading axis
    (num_hidden_layers,). `dtype` is that of the products' inputs; the stream is float32."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config, self.dtype, dim = config, dtype, config.hidden_size
        self.token_embedding = nnx.Embed(config.vocab_size, dim, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, dim, rngs=rngs)
        self.layers = stack(config, True, rngs)
        self.final_layer_norm = LayerNorm(dim, rngs=rngs)

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b d"]:
        """The pooled vector in float32: the last state of the first end-of-text token.

        Raises ValueError where there are more tokens than positions.
        """
        length, positions = ids.shape[1], self.config.max_position_embeddings
        if length > positions:
            raise ValueError(f"ids: {length} tokens, expected at most {positions}")
        x = self.token_embedding(ids).astype(jnp.float32)
        x = x + self.position_embedding(jnp.arange(length)).astype(jnp.float32)
        x = run(self.layers, x, self.dtype)
        # Configs that say 2 (FLUX.1's does) are older than transformers' field; theirs is the
        # largest id, as it was in CLIP's own code.
        end = ids if self.config.eos_token_id == 2 else ids == self.config.eos_token_id
        return self.final_layer_norm(x[jnp.arange(len(x)), jnp.argmax(end, axis=-1)])


# (config, seed) → fresh parameters; (config) → their shapes; (config, params, dtype) → the model
initialise = partial(parameters.initialise, CLIPText)
abstract = partial(parameters.abstract, CLIPText)
model_of = partial(parameters.model_of, CLIPText)
