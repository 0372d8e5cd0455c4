"""From prompts to images."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.config import ModelConfig, PromptsConfig, check
from d2m_jax.kernels.quantized import check_kind, quantized
from d2m_jax.models.flux import abstract, model_of
from d2m_jax.models.parameters import unstacked
from d2m_jax.sampling.denoise import denoise
from d2m_jax.sampling.encoders import Encoders
from d2m_jax.sharding import (
    batch_shards,
    check_mesh,
    local_mesh,
    own_rows,
    parameter_sharding,
    put_batch,
    put_parameters,
    whole,
)
from d2m_jax.weights import model_directory, torch_import
from d2m_jax.weights.encoders import model_config, pipeline_folder

BATCH_TOKENS = 2048  # image tokens of a batch where no size is asked for


class Pipeline:
    """A transformer and its encoders; called with prompts it gives images.

    Activations are in `dtype` (None: bfloat16, on a CPU float32). Encoders that are loaded already
    can be handed in. `mesh` says where it runs (None: this process's devices, each with images of
    its own). `quantize`, "int8" or "fp8", makes the large matrices of blocks that: half of bf16.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        dtype=None,
        encoders: Encoders | None = None,
        mesh: Mesh | None = None,
        quantize: str | None = None,
    ):
        self.config, self.mesh = config, mesh or local_mesh()
        check_mesh(self.mesh, config.transformer)
        self.params = put_parameters(self.mesh, params)
        if quantize is not None:
            self.params = quantized(self.params, quantize)
        self.encoders = encoders or Encoders(config, dtype, self.mesh)

    def __call__(
        self,
        prompts: list[str],
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        latents: Float[Array | np.ndarray, "b n c"] | None = None,
        top_k: int | Sequence[int] | None = None,
        reuse: int = 1,
        max_sequence_length: int | None = None,
        negative_prompts: list[str] | None = None,
        true_cfg: float = 1.0,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Float[np.ndarray, "b H W 3"]:
        """Images in [0, 1], float32. What is None comes from the model's config; `latents` is
        packed noise.

        `top_k` as a sequence serves equal shares of the steps; normal experts are computed in every
        `reuse`-th step, and what they added then is added again in those between. Negative prompts,
        one per prompt, count where true_cfg > 1: it multiplies the distance from them. `tile`, in
        latents, makes an autoencoder decode in tiles of that side. The noise of prompt i depends on
        the seed and i alone, and a batch never changes a sample. ConfigError for unknown words,
        sizes that tokens do not divide, latents of another shape, top_k outside 0 to n, reuse
        without MoE layers.
        """
        config, encoders = self.config, self.encoders
        height = config.image.height if height is None else height
        width = config.image.width if width is None else width
        grid = rows, columns = config.grid(height, width)
        top_k = tuple(top_k) if isinstance(top_k, Sequence) else (top_k,)
        steps = config.sample_steps if steps is None else steps
        self._check(steps, top_k, reuse)
        check(len(prompts) > 0, "prompts: found none, expected at least one")
        lists = [list(prompts)]
        if negative_prompts is not None and true_cfg > 1:
            found, expected = len(negative_prompts), len(prompts)
            check(
                found == expected, f"negative_prompts: found {found}, expected {expected}, as many"
            )
            lists.append(list(negative_prompts))
        ids = [self._ids(captions, max_sequence_length) for captions in lists]
        shape = len(prompts), rows * columns, config.transformer.in_channels
        latents = noise(seed, *shape) if latents is None else latents
        check(latents.shape == shape, f"latents: found shape {latents.shape}, expected {shape}")
        times = flow.schedule(steps, rows * columns, config.shift)
        guidance = config.guidance if guidance is None else guidance
        # The last batch is filled up, so that one compiled program serves all, and every batch so
        # far that each device has samples.
        size = min(batch_size or max(1, BATCH_TOKENS // (rows * columns)), len(prompts))
        shards = batch_shards(self.mesh)
        size = -(-size // shards) * shards
        filled = np.arange(-(-len(prompts) // size) * size) % len(prompts)
        everything, images = (ids, np.asarray(latents)), []
        for part in filled.reshape(-1, size):
            part = part[own_rows(self.mesh, size)]
            inputs = put_batch(self.mesh, jax.tree.map(lambda a, part=part: a[part], everything))
            with jax.set_mesh(self.mesh):
                texts = [encoders.text(ids) for ids in inputs[0]]
                arguments = config, encoders.dtype, grid, top_k, self.params, inputs[1], texts
                x = _denoise(*arguments, times, guidance, true_cfg, reuse)
                images.append(whole(encoders.images(x, height, width, tile)))
        return np.concatenate(images)[: len(prompts)]

    def _ids(self, captions: list[str], length: int | None):
        if length is None:
            return self.encoders.tokenizer.ids(captions)
        prompts = isinstance(self.config.text, PromptsConfig)
        check(prompts, f"max_sequence_length = {length}: this model has no T5, expected none")
        check(length >= 1, f"max_sequence_length = {length}: expected at least 1")
        return self.encoders.tokenizer.ids(captions, length)

    def _check(self, steps: int, top_k: tuple[int | None, ...], reuse: int) -> None:
        check(steps >= 1, f"steps = {steps}: expected at least 1")
        expected = f"expected 1 to {steps} numbers, one per step at most"
        check(1 <= len(top_k) <= steps, f"top_k: found {len(top_k)}, {expected}")
        moe = any(stack.ffn == "moe" for stack in self.config.transformer.stacks)
        experts = self.config.transformer.moe.experts
        check(reuse >= 1, f"reuse = {reuse}: expected at least 1")
        check(moe or reuse == 1, f"reuse = {reuse}: this model has no MoE layers, expected 1")
        for k in top_k:
            if k is not None:
                check(moe, f"top_k = {k}: this model has no MoE layers, expected none")
                expected = f"expected 0 to {experts}, the number of normal experts"
                check(0 <= k <= experts, f"top_k = {k}: {expected}")


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 10))
def _denoise(
    config: ModelConfig,
    dtype,
    grid,
    top_k,
    params,
    latents,
    texts,
    times,
    guidance,
    true_cfg,
    reuse,
):
    model = model_of(config.transformer, params, dtype)
    negative = texts[1] if len(texts) > 1 else None
    options = top_k, negative, true_cfg, reuse
    return denoise(model, latents, texts[0], grid, times, guidance, *options)


def noise(seed: int, count: int, tokens: int, channels: int) -> Float[Array, "b n c"]:
    """Packed noise for `count` prompts, each from its own key."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, (tokens, channels)))(keys)


def load_pipeline(
    path: str | Path,
    dtype=None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    unrolled: bool | None = None,
) -> Pipeline:
    """The pipeline of a model directory, an export for torch, or a diffusers FluxPipeline (its
    folder, or the name of its Hugging Face repository).

    `dtype`, `mesh` and `quantize` as in Pipeline; parameters as stored. `unrolled`: a program that
    has no loop over blocks takes longer to compile, and saves copies of weights: on a GPU of all
    of them in every step, in a Mixture of Blocks everywhere (None: for these two). ConfigError for
    whatever else is there.
    """
    check_kind(quantize)
    mesh = mesh or local_mesh()
    place = partial(parameter_sharding, mesh)
    if model_directory.is_model_directory(path):
        config, params = model_directory.load(path, dtype=None, sharding=place)
    else:
        folder = pipeline_folder(path)
        source = torch_import.open_source(folder)
        config = source.model or model_config(source.config, folder)
        params = torch_import.load(source.parameters(), abstract(source.config), place)
    if quantize is not None:
        params = quantized(params, quantize, release=True)
    pipe = Pipeline(config, params, dtype, mesh=mesh)
    if unrolled is None:
        mixes = any(stack.mixes for stack in config.transformer.stacks)
        unrolled = mixes or jax.default_backend() == "gpu"
    if unrolled:
        pipe.params = unstacked(pipe.params, release=True)
    return pipe
