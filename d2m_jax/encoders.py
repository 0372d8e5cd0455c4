"""What surrounds a transformer, as its config names it: captions and images in, images out."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Shaped, UInt8

from d2m_jax import flow
from d2m_jax.config import (
    AutoencoderConfig,
    ModelConfig,
    PixelsConfig,
    PromptsConfig,
    WordsConfig,
)
from d2m_jax.models import autoencoder, clip, t5
from d2m_jax.models.words import Words
from d2m_jax.named_arrays import names, restructure
from d2m_jax.sharding import (
    batch_shards,
    constrain,
    from_parts,
    in_parts,
    local_mesh,
    over_all_devices,
)
from d2m_jax.tokenizers import Tokenizers
from d2m_jax.weights.torch_files.diffusers_folder import check_encoder, load_encoder, parts
from d2m_jax.weights.torch_files.torch_import import dtype_of

# That a device encodes or decodes at once, but at least an image: activations of 2 GiB for
# FLUX.1's.
PIXELS = 2**20


class Encoders:
    """The text encoders and the image side of one model, with their parameters.

    Words and pixels have none. T5, CLIP and the autoencoder come from the folder that
    `config.encoders` names, are shared out over `mesh` (None: this process's devices) and compute
    in `dtype` (None: bfloat16, on a CPU float32). `tokenizer.ids(captions)` gives what `text`
    reads; it holds no parameters, so that a data pipeline can carry it. ConfigError where the
    folder is missing or does not fit the config: at once, or without `load` when they are needed.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        load: bool = True,
    ):
        usual = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.config, self.dtype = config, dtype_of(usual if dtype is None else dtype)
        self._mesh = mesh or local_mesh()
        self._loaded: dict[str, dict] = {}
        if load:
            self._of(*parts(config))
        if isinstance(config.text, WordsConfig):
            self.tokenizer = Words(config.text)
        else:
            self.tokenizer = Tokenizers(config.encoders or "", config.text)

    @property
    def size(self) -> int:
        """Bytes of the parameters that are loaded, on all devices together."""
        return sum(array.nbytes for array in jax.tree.leaves(self._loaded))

    def release(self) -> None:
        """Free their memory; they are loaded again when they are needed."""
        self._loaded.clear()

    def check(self, captions: Sequence[str]) -> None:
        """Raise ConfigError for what would keep a model from drawing these captions, found without
        loading anything: an image size that tokens do not divide, words that it does not know,
        tokenizers and encoders that are not there or do not fit."""
        self.config.grid()
        if captions:
            self.tokenizer.ids(list(captions))
        for part in parts(self.config):
            if part not in self._loaded:
                check_encoder(self.config, part)

    def _of(self, *needed: str) -> dict[str, dict]:
        """Parameters by part, of those needed that the model has."""
        mine = [part for part in parts(self.config) if part in needed]
        for part in mine:
            if part not in self._loaded:
                place = partial(over_all_devices, self._mesh)
                self._loaded[part] = load_encoder(self.config, part, place)
        return {part: self._loaded[part] for part in mine}

    def _run(
        self, program: Callable[..., Any], needed: tuple[str, ...], given: PyTree, *options: Any
    ) -> Any:
        params = self._of(*needed)
        with jax.set_mesh(self._mesh):
            return program(self.config, self.dtype, *options, params, given)

    def text(self, ids: PyTree) -> tuple[Float[Array, "b l e"], Float[Array, "b v"]]:
        """Token features and pooled vector."""
        return self._run(encoding_captions, ("t5", "clip"), ids)

    def latents(
        self, image: UInt8[Array | np.ndarray, "b H W 3"]
    ) -> Float[Array, "b rows columns k"]:
        """Packed tokens of images, where they lie: their pixels in [−1, 1], or the autoencoder's
        mean latents."""
        return self._run(encoding_images, ("autoencoder",), image)

    def moments(
        self, image: UInt8[Array | np.ndarray, "b H W 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the autoencoder's latents, as it gives them."""
        return self._run(_moments, ("autoencoder",), image)

    def encode(self, batch: dict[str, Any]) -> dict[str, Array]:
        """A raw batch as an encoded one (data/protocol.py, Batches), which is returned as it is."""
        if "latents" in batch:
            return batch
        txt, y = self.text(batch["text"])
        found = {"latents": self.latents(batch["image"]), "txt": txt, "y": y}
        return found | {"text_length": _lengths(self.tokenizer.padding, batch["text"])}

    def images(
        self, latents: Float[Array, "b n c"], height: int, width: int, tile: int | None = None
    ) -> Float[Array, "b H W 3"]:
        """Images in [0, 1] of packed tokens; in tiles of `tile` latents a side, where there is an
        autoencoder, for less memory."""
        return self._run(decoding, ("autoencoder",), latents, (height, width), tile)


def abstract(config: ModelConfig, mesh: Mesh, stored: DTypeLike = jnp.bfloat16) -> dict[str, dict]:
    """What Encoders hold by part once all are loaded: shapes and places, in the type that FLUX.1's
    files have."""
    text, image, found = config.text, config.image, {}
    if isinstance(text, PromptsConfig):
        found = {"t5": t5.abstract(text.t5), "clip": clip.abstract(text.clip)}
    if isinstance(image, AutoencoderConfig):
        found["autoencoder"] = autoencoder.abstract(image)

    def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = over_all_devices(mesh, name, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, stored, sharding=sharding)

    placed = {name: place(name, leaf) for name, leaf in names(found).items()}
    return restructure(found, placed)


@partial(jax.jit, static_argnums=(0, 1))
def encoding_captions(config: ModelConfig, dtype: DTypeLike, params: dict[str, dict], ids: PyTree):
    """Encoders.text as a program."""
    if isinstance(config.text, WordsConfig):
        return Words(config.text)(ids)
    txt = t5.model_of(config.text.t5, params["t5"], dtype)(ids["t5"])
    y = clip.model_of(config.text.clip, params["clip"], dtype)(ids["clip"])
    return txt, y


@partial(jax.jit, static_argnums=0)
def _lengths(padding: int, ids: PyTree) -> Int[Array, " b"]:
    """How many text tokens are no padding."""
    ids = ids["t5"] if isinstance(ids, dict) else ids
    return (ids != padding).sum(1)


@partial(jax.jit, static_argnums=(0, 1))
def encoding_images(
    config: ModelConfig, dtype: DTypeLike, params: dict[str, dict], image: UInt8[Array, "b H W 3"]
):
    """Encoders.latents as a program."""
    size = image.shape[1:3]
    if isinstance(config.image, PixelsConfig):
        tokens = flow.pack(_pixels(image), config.image.patch)
    else:
        model = _autoencoder(config.image, dtype, params)
        tokens = flow.pack(_in_turns(lambda image: model.encode(_pixels(image)), image, size))
    return tokens.reshape(len(image), *config.grid(*size), -1)


@partial(jax.jit, static_argnums=(0, 1))
def _moments(
    config: ModelConfig, dtype: DTypeLike, params: dict[str, dict], image: UInt8[Array, "b H W 3"]
):
    assert isinstance(config.image, AutoencoderConfig)  # who has pixels has no moments
    model = _autoencoder(config.image, dtype, params)
    return _in_turns(lambda image: model.moments(_pixels(image)), image, image.shape[1:3])


def _in_turns(
    function: Callable[[Array], PyTree], batch: Shaped[Array, "b ..."], size: tuple[int, ...]
) -> PyTree:
    """function(batch) of a batch that may be a training's, PIXELS on every device at a time; `size`
    is that of its images, in pixels."""
    mesh, count = jax.sharding.get_abstract_mesh(), len(batch)
    shards = 1 if mesh.empty else batch_shards(mesh)
    own = count // shards if count % shards == 0 else count
    most = max(1, PIXELS // math.prod(size))
    parts = next(parts for parts in range(1, own + 1) if own % parts == 0 and own // parts <= most)
    if parts == 1:
        return function(batch)
    return from_parts(jax.lax.map(function, in_parts(batch, parts)))


def _pixels(image: UInt8[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
    """In [−1, 1], each device its own images."""
    return constrain(image.astype(jnp.float32) / 127.5 - 1, "batch", None, None, None)


def _autoencoder(
    config: AutoencoderConfig, dtype: DTypeLike, params: dict[str, dict]
) -> autoencoder.Autoencoder:
    """The model, whole on every device: left cut over all of them, its convolutions would be cut by
    channels, and every device would hold the activations of all images."""
    return autoencoder.model_of(config, jax.tree.map(constrain, params["autoencoder"]), dtype)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def decoding(
    config: ModelConfig,
    dtype: DTypeLike,
    size: tuple[int, int],
    tile: int | None,
    params: dict[str, dict],
    latents: Float[Array, "b n c"],
):
    """Encoders.images as a program."""
    latents = constrain(latents, "batch", None, None)
    if isinstance(config.image, PixelsConfig):
        pixels = flow.unpack(latents, *size, config.image.patch)
    else:
        model = _autoencoder(config.image, dtype, params)
        shrink = config.image.stride // 2
        latents = flow.unpack(latents, *(side // shrink for side in size))
        decode = model.decode if tile is None else partial(model.decode_tiled, tile=tile)
        pixels = _in_turns(decode, latents, size)
    # Infinity would become black or white: as NaN it is seen.
    pixels = jnp.where(jnp.isfinite(pixels), pixels, jnp.nan)
    return jnp.clip(pixels / 2 + 0.5, 0, 1)
