"""One forward on noisy examples that are the same for all models: its velocities."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.config import ModelConfig, RunConfig
from d2m_jax.data.protocol import Data, Split
from d2m_jax.distillation.stages import noisy_inputs
from d2m_jax.encoders import Encoders
from d2m_jax.keys import named_key
from d2m_jax.models.flux import model_of
from d2m_jax.progress import bar
from d2m_jax.sharding import batch_sharding, batch_shards, constrain, put_batch

MOST = 32  # examples of one forward
TOKENS = 16_384  # of all its examples, unless the mesh needs more examples
ALL_TOKENS = 2**21  # of all examples: they stay on the devices. Of FLUX.1 at 1024², 455 examples

T = TypeVar("T")
Inputs = dict[str, Array]  # img [b, rows, columns, c], txt, timesteps, y of a batch


def examples(model: ModelConfig, data: Data, devices: int) -> int:
    """How many of the data's largest make one forward, on so many devices that cut a batch: a power
    of two."""
    fit = 2 ** int(math.log2(max(1, TOKENS // _tokens(model, data))))
    return max(devices, min(MOST, fit))


def _tokens(model: ModelConfig, data: Data) -> int:
    """Of the largest of its examples, image and text."""
    return max(math.prod(model.grid(*size)) for size in data.sizes) + model.text.length


def noisy_batches(
    config: RunConfig,
    data: Data,
    encoders: Encoders,
    name: str,
    split: Split,
    size: int,
    mesh: Mesh,
) -> list[Inputs]:
    """As many examples of a split as training evaluates on, within ALL_TOKENS, in batches of
    `size`, which the mesh's parts divide; noise and times follow from seed and name."""
    stage, model = next(iter(config.stages.values())), encoders.config
    wanted = config.held_out_batches * stage.batch_size
    count = max(1, min(wanted, ALL_TOKENS // _tokens(model, data)) // size)
    key = named_key(config.seed, f"report/{name}")
    batches = data.batches(encoders.tokenizer, size, config.seed, split)
    with jax.set_mesh(mesh):
        return [
            _noisy(model, encoders.encode(put_batch(mesh, batch)), jax.random.fold_in(key, i))
            for i, batch in enumerate(islice(batches, count))
        ]


@partial(jax.jit, static_argnums=0)
def _noisy(config: ModelConfig, batch: dict[str, Array], key: Array) -> Inputs:
    inputs, _ = noisy_inputs(config, "uniform", batch, key)
    img, _, txt, _, timesteps, y, _ = inputs
    img = img.reshape(batch["latents"].shape)
    found = {"img": img, "txt": txt, "timesteps": timesteps, "y": y}
    return {name: constrain(a, "batch", *[None] * (a.ndim - 1)) for name, a in found.items()}


@dataclass(frozen=True)
class Program:
    """A model's forward over noisy examples, in the type of its activations."""

    config: ModelConfig
    dtype: str = "float32"

    def __call__(self, params: dict, inputs: Inputs) -> Float[Array, "b n c"]:
        """The velocity; parameters and inputs lie on one mesh."""
        with on_mesh_of(inputs):
            return _forward(self, params, inputs)

    def compile(self, params: dict, inputs: Inputs) -> None:
        """Compile it for these, which may be abstract; a call finds it in JAX's cache."""
        with on_mesh_of(inputs):
            _forward.lower(self, params, inputs).compile()


@contextlib.contextmanager
def on_mesh_of(inputs: Inputs) -> Iterator[None]:
    """The mesh that the inputs are cut over, if any, for what is inside."""
    mesh = _mesh_of(inputs)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def _mesh_of(inputs: Inputs) -> Mesh | None:
    sharding = inputs["img"].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


@partial(jax.jit, static_argnums=0)
def _forward(program: Program, params: dict, inputs: Inputs) -> Float[Array, "b n c"]:
    model = model_of(program.config.transformer, params, jnp.dtype(program.dtype))
    return model(*arguments(program.config, inputs))


def arguments(config: ModelConfig, inputs: Inputs) -> tuple:
    """What Flux.embed is given."""
    timesteps, text = inputs["timesteps"], inputs["txt"].shape[1]
    size, rows, columns, channels = inputs["img"].shape
    guided = config.transformer.guidance_embed
    return (
        inputs["img"].reshape(size, rows * columns, channels),
        flow.image_ids(rows, columns),
        inputs["txt"],
        flow.text_ids(text),
        timesteps,
        inputs["y"],
        jnp.full(timesteps.shape, config.guidance) if guided else None,
    )


def first(tree: T, inputs: Inputs, count: int) -> tuple[T, Inputs]:
    """The first `count` examples, and parameters (or their shapes) where these can meet: on the
    mesh that they are cut over, or on its first device where so few cannot be cut."""
    few = {name: array[:count] for name, array in inputs.items()}
    mesh = _mesh_of(inputs)
    if mesh is not None and count % batch_shards(mesh) == 0:
        return tree, jax.device_put(few, batch_sharding(mesh))
    one = SingleDeviceSharding(jax.devices()[0] if mesh is None else mesh.devices.flat[0])

    def alone(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
        return jax.device_put(leaf, one)

    return jax.tree.map(alone, tree), jax.device_put(few, one)


def fit_alone(mesh: Mesh, needed: int) -> bool:
    """Whether parameters of so many bytes fit where `first` puts a single example: on one device,
    beside their own shares, inputs and activations, if it cannot be cut."""
    if batch_shards(mesh) == 1:
        return True
    room = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit", math.inf)
    return needed <= room / 2


def velocities(
    program: Program, params: dict, batches: list[Inputs], name: str = "errors"
) -> list[Float[np.ndarray, "b n c"]]:
    """What a model answers to each of the batches; `name` is told beside how far it is."""
    found = []
    with bar(len(batches), name, "batches", "compiling …") as advance:
        for inputs in batches:
            found.append(np.asarray(program(params, inputs)))
            advance(1)
    return found


def mean_square(
    some: list[Float[np.ndarray, "b n c"]], others: list[Float[np.ndarray, "b n c"]]
) -> float:
    """Mean squared difference over all samples, tokens and channels."""
    total = sum(
        float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(some, others, strict=True)
    )
    return total / sum(a.size for a in some)
