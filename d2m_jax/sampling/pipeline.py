"""From prompts to images."""

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from d2m_jax import flow, hosts
from d2m_jax.config import (
    AutoencoderConfig,
    ConfigError,
    ModelConfig,
    PixelsConfig,
    PromptsConfig,
    WordsConfig,
    check,
)
from d2m_jax.encoders import Encoders
from d2m_jax.grid import Images, check_finite
from d2m_jax.kernels.quantized import QArray, check_kind, quantized
from d2m_jax.models.cut import Cut
from d2m_jax.models.flux import abstract, model_of
from d2m_jax.models.parameters import stacked, unstacked
from d2m_jax.models.size import summary
from d2m_jax.models.words import Words
from d2m_jax.progress import bar
from d2m_jax.sampling.denoise import Text, denoise
from d2m_jax.sampling.noise import noise_of
from d2m_jax.sampling.options import (
    captions_of,
    check_options,
    example,
    refuse_unknown,
    several,
)
from d2m_jax.sampling.pace import Pace
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
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import hub
from d2m_jax.weights.torch_files import torch_import
from d2m_jax.weights.torch_files.diffusers_folder import (
    FOLDERS,
    is_pipeline,
    model_config,
    pipeline_folder,
    with_encoders,
)

BATCH_TOKENS = 2048  # image tokens of a batch where no size is asked for
# Times are filled up to a multiple, so that one program serves all numbers of steps up to it. Of
# steps that are not taken only the modulations are computed: at FLUX.1's size, all 31 together
# 0.003 of the FLOPs of one step.
STEPS = 32
SHOWN = 80  # characters of what was cut off a prompt


class Pipeline:
    """A transformer and its encoders; called with prompts it gives images.

    Activations are in `dtype` (None: bfloat16, on a CPU float32). Encoders that are loaded already
    can be handed in. `mesh` says where it runs (None: this process's devices, each with images of
    its own). `quantize`, "int8" or "fp8", makes the large matrices of blocks that: half of bf16.
    `unrolled`: a program that has no loop over blocks (load_pipeline says when). With `release` the
    parameters given are used up, so that no more than one of their arrays is there twice. `cut` is
    where a student lies in the dense model (models/cut.py), which its model directory remembers.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        dtype: DTypeLike | None = None,
        encoders: Encoders | None = None,
        mesh: Mesh | None = None,
        quantize: str | None = None,
        unrolled: bool = False,
        release: bool = False,
        cut: Cut | None = None,
    ):
        self.config, self.mesh, self.cut = config, mesh or local_mesh(), cut or {}
        check_mesh(self.mesh, config.transformer)
        self.params = put_parameters(self.mesh, params)
        if quantize is not None:
            self.params = quantized(self.params, quantize, release)
        if unrolled:
            self.params = unstacked(self.params, release)
        self.encoders = encoders or Encoders(config, dtype, self.mesh)

    def __repr__(self) -> str:
        text, image = self.config.text, self.config.image
        words = f"{len(text.vocabulary)} words" if isinstance(text, WordsConfig) else "T5 and CLIP"
        made = "pixels" if isinstance(image, PixelsConfig) else "autoencoder"
        size = f"{image.height} × {image.width}, {self.config.sample_steps} steps"
        return (
            f"Pipeline: {summary(self.config.transformer, self.params)}\n"
            f"  computes in {self.encoders.dtype}; text: {words}; images: {made}, {size}"
        )

    def __call__(
        self,
        prompts: str | Iterable[str] = (),
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        latents: Float[Array | np.ndarray, "b n c"] | None = None,
        top_k: int | Iterable[int] | None = None,
        reuse: int = 1,
        max_sequence_length: int | None = None,
        negative_prompts: str | Iterable[str] | None = None,
        true_cfg: float = 1.0,
        batch_size: int | None = None,
        tile: int | None = None,
        progress: bool = False,
        tell: bool = True,
        **unknown: Any,
    ) -> Images:
        """Images in [0, 1], float32 [b, H, W, 3], b = 1 for one string. What is None comes from the
        model's config; `latents` is packed noise.

        `top_k` as a sequence serves equal shares of the steps; normal experts are computed in every
        `reuse`-th step, and what they added then is added again in those between. Negative prompts,
        one for all or one per prompt, count where true_cfg > 1: it multiplies the distance from
        them. `tile`, in latents, makes an autoencoder decode in tiles of that side. `progress` is
        told on stderr. The noise of prompt i depends on the seed and i alone, and a batch never
        changes a sample. What is cut off a prompt, or ignored by this model, is told in a line on
        stderr, unless `tell` is False. ConfigError for unknown words or options, sizes that tokens
        do not divide, latents of another shape, top_k outside 0 to n, reuse without MoE layers,
        whatever check_options finds, and images of NaN.
        """
        config = self.config
        top_k = several(top_k)
        steps = config.sample_steps if steps is None else steps
        options = {"height": height, "width": width, "steps": steps, "guidance": guidance}
        options |= {"seed": seed, "top_k": top_k, "reuse": reuse, "true_cfg": true_cfg}
        options |= {"batch_size": batch_size, "tile": tile}
        named = "prompts", "latents", "negative_prompts", "max_sequence_length"
        refuse_unknown(unknown, (*options, *named, "progress", "tell"))
        check_options(**options, max_sequence_length=max_sequence_length)
        self._check(top_k, reuse, max_sequence_length, tile)
        steps, seed = int(steps), int(seed)
        height = config.image.height if height is None else height
        width = config.image.width if width is None else width
        grid = rows, columns = config.grid(height, width)
        captions = captions_of(prompts)
        count, tokens = len(captions), rows * columns
        shape = count, tokens, config.transformer.in_channels
        latents = latents if latents is None else _checked(latents, shape)
        lists = {"prompts": captions}
        if negative_prompts is not None:
            negative = captions_of(negative_prompts, "negative_prompts")
            negative = negative * count if isinstance(negative_prompts, str) else negative
            found = len(negative)
            check(found == count, f"negative_prompts: found {found}, expected {count}, as many")
            if true_cfg > 1:
                lists["negative_prompts"] = negative
        if tell:
            self.tell(lists, guidance, negative_prompts is not None, true_cfg, max_sequence_length)
        ids = [self._ids(texts, max_sequence_length) for texts in lists.values()]
        guidance = float(config.guidance if guidance is None else guidance)
        times = flow.schedule(steps, config.shift_at(tokens))
        times = np.pad(times, (0, -steps % STEPS))
        images, batches = [], _batches(count, self.batch_size(count, tokens, batch_size))
        fixed = config, self.encoders.dtype, grid, top_k, reuse
        call, numbers = partial(denoising, *fixed, self.params), (guidance, float(true_cfg))
        watched = progress and hosts.first()
        shown = bar(len(batches) * steps, "sampling", "steps", "compiling …") if watched else None
        with shown or contextlib.nullcontext() as advance:
            pace = Pace(steps, reuse, tokens, advance)
            for part in batches:
                part = part[own_rows(self.mesh, len(part))]
                start = noise_of(seed, part, *shape[1:]) if latents is None else latents[part]
                inputs = jax.tree.map(lambda a, part=part: a[part], ids), np.asarray(start)
                ids_here, start = put_batch(self.mesh, inputs)
                with jax.set_mesh(self.mesh):
                    texts = [self.encoders.text(ids) for ids in ids_here]
                    x = pace.run(call, start, texts, times, steps, *numbers)
                    images.append(whole(self.encoders.images(x, height, width, tile)))
                check_finite(images[-1], f"; has the model such weights? It ran in {fixed[1]}")
        return np.concatenate(images)[:count].view(Images)

    def whole(self) -> dict:
        """The parameters as training and files have them: in stacks. ConfigError for quantised
        ones, of which there is no way back."""
        leaves = jax.tree.leaves(self.params, is_leaf=lambda a: isinstance(a, QArray))
        plain = not any(isinstance(a, QArray) for a in leaves)
        check(plain, "quantize: is for sampling alone, expected a pipeline that is loaded without")
        return stacked(self.params)

    def save(
        self, path: str | Path, dtype: DTypeLike | None = None, overwrite: bool = False
    ) -> None:
        """Write a model directory, which load_pipeline and every script reads; floats as `dtype`
        (None: as they are). It appears whole or not at all. ConfigError where `path` is taken."""
        stored = None if dtype is None else torch_import.dtype_of(dtype)
        options = {"overwrite": overwrite, "cut": self.cut}
        model_directory.save(path, self.config, self.whole(), stored, **options)

    def batch_size(self, count: int, tokens: int, batch_size: int | None = None) -> int:
        """How many of `count` images of so many tokens go together, at most `batch_size` where it
        is given: one compiled program serves many numbers of prompts."""
        return images_together(self.mesh, count, tokens, batch_size)

    def _ids(self, captions: list[str], length: int | None):
        tokenizer = self.encoders.tokenizer
        if isinstance(tokenizer, Words):
            try:
                return tokenizer.ids(captions)
            except ConfigError as error:
                raise ConfigError(f"{error}{example(tokenizer.config)}") from None
        return tokenizer.ids(captions, length)

    def _check(
        self, top_k: tuple[int | None, ...], reuse: int, length: int | None, tile: int | None
    ) -> None:
        """What is wrong for this model."""
        prompts = isinstance(self.config.text, PromptsConfig)
        message = f"max_sequence_length = {length}: this model has no T5, expected none"
        check(length is None or prompts, message)
        pixels = isinstance(self.config.image, PixelsConfig)
        message = f"tile = {tile}: this model has no autoencoder, expected none"
        check(tile is None or not pixels, message)
        moe = any(stack.ffn == "moe" for stack in self.config.transformer.stacks)
        experts = self.config.transformer.moe.experts
        check(moe or reuse == 1, f"reuse = {reuse}: this model has no MoE layers, expected 1")
        for k in top_k:
            if k is not None:
                check(moe, f"top_k = {k}: this model has no MoE layers, expected none")
                expected = f"expected 0 to {experts}, the number of normal experts"
                check(k <= experts, f"top_k = {k}: {expected}")

    def tell(
        self,
        lists: dict[str, list[str]],
        guidance: float | None = None,
        negative: bool = False,
        true_cfg: float = 1.0,
        length: int | None = None,
    ) -> None:
        """A line each of what is cut off lists of prompts, and of options that change nothing."""
        if guidance is not None and not self.config.transformer.guidance_embed:
            hosts.say(f"guidance = {guidance}: ignored, this model has no guidance embedding")
        if negative and true_cfg <= 1:
            hosts.say(f"negative_prompts: ignored, expected true_cfg above 1, found {true_cfg}")
        if not negative and true_cfg > 1:
            expected = "expected negative_prompts (one may be empty)"
            hosts.say(f"true_cfg = {true_cfg}: ignored, {expected}")
        tokenizer = self.encoders.tokenizer
        if not isinstance(tokenizer, Words):
            for name, captions in lists.items():
                _tell_lost(name, tokenizer.lost(captions, length), tokenizer.config, length)


def images_together(mesh: Mesh, count: int, tokens: int, batch_size: int | None = None) -> int:
    """Pipeline.batch_size on a mesh."""
    # Batches are equal, and filled up: to a power of two, above 8 to a multiple of 8, never
    # above what goes together. Images that fill up take time, another program takes more.
    # FLUX.1's full size goes one by one, and nothing is filled.
    most = batch_size or max(1, BATCH_TOKENS // tokens)
    size = -(-count // -(-count // most))
    size = min(most, 2 ** (size - 1).bit_length(), -(-size // 8) * 8)
    shards = batch_shards(mesh)  # each device has samples
    return -(-size // shards) * shards


def _batches(count: int, size: int) -> Int[np.ndarray, "batches size"]:
    """The numbers of the prompts of each batch; the last is filled up with the first prompts."""
    return np.arange(-(-count // size) * size).reshape(-1, size) % count


def _checked(latents: Any, shape: tuple[int, ...]) -> Float[np.ndarray, "b n c"]:
    found = np.shape(latents)
    check(found == shape, f"latents: found shape {found}, expected {shape}")
    latents = whole(latents).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(latents).all((1, 2)))
    check(len(bad) == 0, f"latents{bad[:1].tolist()}: found NaN or infinity, expected numbers")
    return latents


def _tell_lost(
    name: str, lost: dict[str, dict[int, str]], text: PromptsConfig, length: int | None
) -> None:
    """Of prompts that were cut, one line per encoder, with the first that was lost."""
    length = text.length if length is None else length
    for encoder, rest in lost.items():
        if not rest:
            continue
        clip = encoder == "clip"
        reads = f"CLIP reads {text.clip.max_position_embeddings}" if clip else f"T5 reads {length}"
        i, cut = next(iter(rest.items()))
        cut = cut if len(cut) <= SHOWN else f"{cut[: SHOWN // 2]} … {cut[-SHOWN // 2 :]}"
        more = f" (and of {len(rest) - 1} more)" if len(rest) > 1 else ""
        hint = "; max_sequence_length can be up to 512" if not clip and length < 512 else ""
        hint = "; T5 reads all of it" if clip and i not in lost["t5"] else hint
        hosts.say(f"{name}[{i}] is cut off, {reads} tokens; lost: {cut!r}{more}{hint}")


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def denoising(
    config: ModelConfig,
    dtype: DTypeLike,
    grid: tuple[int, int],
    top_k: tuple[int | None, ...],
    reuse: int,
    params: dict,
    latents: Float[Array, "b n c"],
    span: Any,
    texts: Sequence[Text],
    times: Float[Array, " s"],
    steps: Int[Array, ""],
    guidance: Float[Array, "*b"],
    true_cfg: Float[Array, ""],
):
    """Steps of a span, as one program."""
    model = model_of(config.transformer, params, dtype)
    negative = texts[1] if len(texts) > 1 else None
    options = top_k, negative, true_cfg, reuse, steps, span
    return denoise(model, latents, texts[0], grid, times, guidance, *options)


def denoise_steps(
    pipe: Pipeline,
    x: Float[Array, "b n c"],
    span: tuple[int, int],
    text: Text,
    grid: tuple[int, int],
    times: Float[np.ndarray, " s"],
    guidance: Float[Array | np.ndarray, " b"],
) -> Float[Array, "b n c"]:
    """The steps of a span, from the first number up to the second, of all those between `times`; x
    is what those before left, and lies on the pipeline's mesh, which is set."""
    steps = len(times) - 1
    times = np.pad(times, (0, -steps % STEPS))
    fixed = pipe.config, pipe.encoders.dtype, grid, (None,), 1
    result = denoising(*fixed, pipe.params, x, span, [text], times, steps, guidance, 1.0)
    return jax.device_put(result, x.sharding)  # as before, or the next would be another program


def load_pipeline(
    path: str | Path,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    unrolled: bool | None = None,
    encoders: str | Path | None = None,
) -> Pipeline:
    """The pipeline of a model directory, an export for torch, or a diffusers FluxPipeline (its
    folder, or the name of its Hugging Face repository).

    `dtype`, `mesh` and `quantize` as in Pipeline; parameters as stored. `unrolled`: a program that
    has no loop over blocks takes longer to compile, and saves copies of weights: on a GPU of all
    of them in every step, in a Mixture of Blocks everywhere (None: for these two). `encoders` is
    the FluxPipeline whose text encoders and autoencoder serve, for whatever else load_model takes:
    a transformer alone. ConfigError for whatever else is there.
    """
    check_kind(quantize)
    path, dtype = hub.place(path), None if dtype is None else torch_import.dtype_of(dtype)
    mesh = mesh or local_mesh()
    place = partial(parameter_sharding, mesh)
    folder = pipeline_folder(path)
    if model_directory.is_model_directory(folder):
        config = _with_encoders(path, model_directory.load_config(folder), encoders)
        params = model_directory.load(folder, dtype=None, sharding=place)[1]
    else:
        source = torch_import.open_source(folder)
        # Of a FluxPipeline that lacks a part, model_config says which.
        part = any((folder / name).is_dir() for name in FOLDERS) and encoders is None
        whole = folder if part or is_pipeline(folder) else None
        config = source.model or model_config(source.config, whole)
        config = _with_encoders(path, config, encoders)
        params = torch_import.load(source.parameters(), abstract(source.config), place)
        source.tell_axes()
    if unrolled is None:
        mixes = any(stack.mixes for stack in config.transformer.stacks)
        unrolled = mixes or jax.default_backend() == "gpu"
    cut = model_directory.load_cut(folder, config.transformer)
    return Pipeline(config, params, dtype, None, mesh, quantize, unrolled, True, cut)


def _with_encoders(
    path: str | Path, config: ModelConfig, encoders: str | Path | None
) -> ModelConfig:
    """The config with the encoders asked for, if any; the schedule stays the transformer's."""
    if isinstance(config.text, WordsConfig) and isinstance(config.image, PixelsConfig):
        check(
            encoders is None,
            f"encoders = {encoders}: {path} reads words and draws pixels by itself, expected none",
        )
        return config
    if encoders is not None:
        config = with_encoders(config, encoders)
    text, image = config.text, config.image
    lacks = "no such folder"
    if config.encoders is None:
        lacks = "a transformer without text encoders, tokenizers and autoencoder"
    check(
        config.encoders is not None and Path(config.encoders).is_dir(),
        f"{config.encoders or path}: {lacks}; name a FluxPipeline that has them with --encoders"
        " FLUXPIPELINE (in Python encoders=…)",
    )
    sizes = []
    if isinstance(text, PromptsConfig):
        sizes.append(("text_encoder_2", text.t5.d_model, "context_in_dim"))
        sizes.append(("text_encoder", text.clip.hidden_size, "vec_in_dim"))
    if isinstance(image, AutoencoderConfig):
        sizes.append(("vae", 4 * image.latent_channels, "in_channels"))
    for part, found, name in sizes:
        expected = getattr(config.transformer, name)
        where = f"{config.encoders}/{part}"
        message = f"{where}: gives {found} channels, expected the transformer's {name}, {expected}"
        check(found == expected, message)
    return config
