"""CLIP's vision tower, and both towers with their projections (transformers' modeling_clip.py)."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from d2m_jax.config import CLIPModelConfig, CLIPVisionConfig
from d2m_jax.models import parameters
from d2m_jax.models.clip import CLIPText, LayerNorm, run, stack
from d2m_jax.models.layers import Linear32


class Patches(nnx.Module):
    """A linear map of every patch, without bias: a convolution whose stride is its size."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        side, init = config.patch_size, nnx.initializers.lecun_normal()
        shape = side, side, 3, config.hidden_size
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        kernel = self.kernel[...].astype(x.dtype)
        side = kernel.shape[0]
        batch, rows, columns = x.shape[0], x.shape[1] // side, x.shape[2] // side
        x = x.reshape(batch, rows, side, columns, side, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, rows * columns, -1) @ kernel.reshape(-1, kernel.shape[-1])


class CLIPVision(nnx.Module):
    """The tower; `dtype` is that of the products' inputs, the stream is float32."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.dtype, dim = dtype, config.hidden_size
        self.class_embedding = nnx.Param(jnp.zeros(dim))
        self.patch_embedding = Patches(config, rngs=rngs)
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = nnx.Embed(positions, dim, rngs=rngs)
        self.pre_layrnorm = LayerNorm(dim, rngs=rngs)
        self.layers = stack(config, False, rngs)
        self.post_layernorm = LayerNorm(dim, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The state of the class token, float32, of images that are normalised and have the size
        of config."""
        patches = self.patch_embedding(images.astype(self.dtype)).astype(jnp.float32)
        token = self.class_embedding[...].astype(jnp.float32)
        token = jnp.broadcast_to(token, (len(images), 1, len(token)))
        x = jnp.concatenate([token, patches], axis=1)
        x = x + self.position_embedding.embedding[...].astype(jnp.float32)
        x = run(self.layers, self.pre_layrnorm(x), self.dtype)
        return self.post_layernorm(x[:, 0])


class CLIP(nnx.Module):
    """Features of texts and of images in one space, each of norm 1, float32."""

    def __init__(self, config: CLIPModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.text = CLIPText(config.text, rngs=rngs, dtype=dtype)
        self.vision = CLIPVision(config.vision, rngs=rngs, dtype=dtype)
        wide = partial(Linear32, outputs=config.projection_dim, bias=False, rngs=rngs)
        self.text_projection = wide(config.text.hidden_size)
        self.visual_projection = wide(config.vision.hidden_size)

    def texts(self, ids: Int[Array, "b l"]) -> Float[Array, "b p"]:
        """Of token ids."""
        return _unit(self.text_projection(self.text(ids)))

    def images(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p"]:
        """Of normalised images."""
        return _unit(self.visual_projection(self.vision(images)))


def _unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# (config) → shapes of parameters; (config, params, dtype) → the model
initialise = partial(parameters.initialise, CLIP)
abstract = partial(parameters.abstract, CLIP)
model_of = partial(parameters.model_of, CLIP)
