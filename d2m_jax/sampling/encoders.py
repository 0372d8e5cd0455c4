"""What surrounds a transformer, as its model directory names it: captions in, images out."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from d2m_jax import flow
from d2m_jax.config import ConfigError, ModelConfig
from d2m_jax.models.words import Words


class Encoders:
    """The text encoder and the image side of one model: words and pixels in patches."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.words = Words(config.text)

    def ids(self, captions: list[str]) -> Int[np.ndarray, "b l"]:
        """Token ids of captions; ConfigError names unknown words."""
        return self.words.ids(captions)

    def text(self, ids: Int[Array, "b l"]) -> tuple[Float[Array, "b l e"], Float[Array, "b v"]]:
        """Token features and pooled vector."""
        return self.words(ids)

    def latents(self, image: UInt8[Array, "b H W 3"]) -> Float[Array, "b n c"]:
        """Packed tokens of images, values in [−1, 1]."""
        return flow.pack(image.astype(jnp.float32) / 127.5 - 1, self.config.image.patch)

    def images(
        self, latents: Float[Array, "b n c"], height: int, width: int
    ) -> Float[Array, "b H W 3"]:
        """Images in [0, 1] of packed tokens."""
        pixels = flow.unpack(latents, height, width, self.config.image.patch)
        return jnp.clip(pixels / 2 + 0.5, 0, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image; ConfigError where the patch does not divide
        it."""
        patch = self.config.image.patch
        if height % patch or width % patch or min(height, width) < patch:
            raise ConfigError(f"image size {height} × {width}: expected multiples of {patch}")
        return height // patch, width // patch
