"""From prompts to images."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.config import MeshConfig, ModelConfig, check
from d2m_jax.models.flux import model_of
from d2m_jax.sampling.denoise import denoise
from d2m_jax.sampling.encoders import Encoders
from d2m_jax.sharding import batch_sharding, batch_shards, make_mesh, replicated
from d2m_jax.weights import model_directory


class Pipeline:
    """A transformer and its encoders; called with prompts it gives images."""

    def __init__(self, config: ModelConfig, params: dict):
        self.config, self.mesh = config, make_mesh(MeshConfig())
        self.params = jax.device_put(params, replicated(self.mesh))
        self.encoders = Encoders(config)

    def __call__(
        self,
        prompts: list[str],
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        latents: Float[Array | np.ndarray, "b n c"] | None = None,
        top_k: int | None = None,
        batch_size: int = 128,
    ) -> Float[np.ndarray, "b H W 3"]:
        """Images in [0, 1], float32. What is None comes from the model's config; `latents` is
        packed noise.

        The noise of prompt i depends on the seed and i alone, and a batch never changes a sample.
        ConfigError for unknown words, sizes that the patch does not divide, latents of another
        shape, top_k outside 0 to n.
        """
        height = self.config.image.height if height is None else height
        width = self.config.image.width if width is None else width
        rows, columns = self.encoders.grid(height, width)
        self._check(steps, top_k)
        check(len(prompts) > 0, "prompts: found none, expected at least one")
        ids = self.encoders.ids(list(prompts))
        shape = len(ids), rows * columns, self.config.transformer.in_channels
        latents = noise(seed, *shape) if latents is None else latents
        check(latents.shape == shape, f"latents: found shape {latents.shape}, expected {shape}")
        steps = steps or self.config.sample_steps
        times = jnp.asarray(flow.schedule(steps, rows * columns, self.config.shift))
        guidance = self.config.guidance if guidance is None else guidance
        # The last batch is filled up, so that one compiled program serves all.
        size = min(batch_size, len(ids))
        filled = np.arange(-(-len(ids) // size) * size) % len(ids)
        images = []
        for part in filled.reshape(-1, size):
            inputs = ids[part], np.asarray(latents)[part]
            if size % batch_shards(self.mesh) == 0:
                inputs = jax.device_put(inputs, batch_sharding(self.mesh))
            with jax.set_mesh(self.mesh):
                batch = _sample(
                    self.config, (height, width), top_k, self.params, *inputs, times, guidance
                )
            images.append(np.asarray(batch))
        return np.concatenate(images)[: len(ids)]

    def _check(self, steps: int | None, top_k: int | None) -> None:
        check(steps is None or steps >= 1, f"steps = {steps}: expected at least 1")
        if top_k is not None:
            moe = any(stack.ffn == "moe" for stack in self.config.transformer.stacks)
            check(moe, f"top_k = {top_k}: this model has no MoE layers, expected none")
            experts = self.config.transformer.moe.experts
            expected = f"expected 0 to {experts}, the number of normal experts"
            check(0 <= top_k <= experts, f"top_k = {top_k}: {expected}")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(config: ModelConfig, size, top_k, params, ids, latents, times, guidance):
    encoders = Encoders(config)
    txt, y = encoders.text(ids)
    model = model_of(config.transformer, params)
    x = denoise(model, latents, txt, y, encoders.grid(*size), times, guidance, top_k)
    return encoders.images(x, *size)


def noise(seed: int, count: int, tokens: int, channels: int) -> Float[Array, "b n c"]:
    """Packed noise for `count` prompts, each from its own key."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, (tokens, channels)))(keys)


def load_pipeline(path: str | Path) -> Pipeline:
    """The pipeline of a model directory. ConfigError where it is missing or damaged."""
    return Pipeline(*model_directory.load(path))
