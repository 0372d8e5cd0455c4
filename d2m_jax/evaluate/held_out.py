"""One forward on noisy held-out examples that are the same for all models: its velocities."""

import contextlib
import zlib
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.config import ModelConfig, RunConfig
from d2m_jax.data.protocol import Split
from d2m_jax.data.source import open_data
from d2m_jax.distill.stages import noisy_inputs
from d2m_jax.models.flux import model_of
from d2m_jax.sampling.encoders import Encoders
from d2m_jax.sharding import batch_sharding, batch_shards, local_mesh, replicated

BATCH = 32  # examples of one forward
# What a report calls examples → the split of the data: pairs of glyph and colour that train, and
# such that never do.
SPLITS: dict[str, Split] = {
    "seen": "validation",
    "held_out": "held_out",
}

Inputs = dict[str, Array]  # img, txt, timesteps, y of a batch


def noisy_batches(config: RunConfig, encoders: Encoders, pairs: str) -> list[Inputs]:
    """As many examples of SPLITS[pairs] as training evaluates on, noise and times fixed."""
    stage = next(iter(config.stages.values()))
    count = max(1, config.held_out_batches * stage.batch_size // BATCH)
    key = jax.random.fold_in(
        jax.random.key(config.seed), np.uint32(zlib.crc32(f"report/{pairs}".encode()))
    )
    model = encoders.config
    data = open_data(config.data, model.image)
    batches = data.batches(encoders.tokenizer, BATCH, config.seed, SPLITS[pairs])
    return [
        _noisy(model, encoders.encode(batch), jax.random.fold_in(key, np.uint32(i)))
        for i, batch in enumerate(islice(batches, count))
    ]


@partial(jax.jit, static_argnums=0)
def _noisy(config: ModelConfig, batch: dict[str, Array], key: Array) -> Inputs:
    inputs, _ = noisy_inputs(config, "uniform", batch, key)
    img, _, txt, _, timesteps, y, _ = inputs
    return {"img": img, "txt": txt, "timesteps": timesteps, "y": y}


def forward(config: ModelConfig, params: dict, inputs: Inputs) -> Float[Array, "b n c"]:
    """The velocity of one batch, on the devices that `place` chose."""
    with _mesh_of(inputs):
        return _forward(config, params, inputs)


def compile_forward(config: ModelConfig, params: dict, inputs: Inputs) -> None:
    """Compile the forward of a batch where `place` puts it; `forward` finds it in JAX's cache."""
    params, inputs = place(params, inputs)
    with _mesh_of(inputs):
        _forward.lower(config, params, inputs).compile()


def _mesh_of(inputs: Inputs) -> contextlib.AbstractContextManager:
    mesh = getattr(inputs["img"].sharding, "mesh", None)
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()


@partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: dict, inputs: Inputs) -> Float[Array, "b n c"]:
    timesteps, img_ids = inputs["timesteps"], flow.image_ids(*config.grid())
    txt_ids = flow.text_ids(inputs["txt"].shape[1])
    guided = config.transformer.guidance_embed
    guidance = jnp.full(timesteps.shape, config.guidance) if guided else None
    model = model_of(config.transformer, params)
    img, txt, y = inputs["img"], inputs["txt"], inputs["y"]
    return model(img, img_ids, txt, txt_ids, timesteps, y, guidance)


def place(params: dict, inputs: Inputs) -> tuple[dict, Inputs]:
    """Both on the devices: a batch cut over all of them, or on one where it cannot be cut."""
    mesh = local_mesh()
    if len(inputs["timesteps"]) % batch_shards(mesh):
        return jax.device_put((params, inputs), jax.devices()[0])
    return jax.device_put(params, replicated(mesh)), jax.device_put(inputs, batch_sharding(mesh))


def velocities(
    config: ModelConfig, params: dict, batches: list[Inputs]
) -> Float[np.ndarray, "b n c"]:
    """What a model answers to all of the batches."""
    return np.concatenate(
        [np.asarray(forward(config, *place(params, inputs))) for inputs in batches]
    )
