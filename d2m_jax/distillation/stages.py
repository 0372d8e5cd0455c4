"""A stage's loss for the training loop: from scratch, or distilled from a teacher."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.config import ModelConfig, StageConfig, Timesteps, check
from d2m_jax.distillation.lockstep import check_aligned, lockstep
from d2m_jax.distillation.losses import mean_square, nothing_routed, routing_means, total
from d2m_jax.distillation.objective import Means, Objective
from d2m_jax.keys import inner_key
from d2m_jax.models.flux import Flux, model_of
from d2m_jax.models.reports import Context, Streams

NO_LENGTHS = (
    "StageConfig.count_padding = False: expected data that tell the length of their texts,"
    " found none (a cache made before, or of others: make it again)"
)


def flow_loss(
    config: ModelConfig,
    stage: StageConfig,
    timesteps: Timesteps = "uniform",
    guidance: tuple[float, float] | None = None,
) -> Objective:
    """Flow matching from scratch: E ‖v(x_t, t) − (noise − data)‖²."""
    dtype = jnp.dtype(stage.dtype)

    def means(params: dict, constants: Any, batch: dict[str, Array]) -> Means:
        model = model_of(config.transformer, params, dtype)
        inputs, target = noisy(config, batch)
        velocity, _ = model.run(*_embed(model, inputs, stage, batch), remat=stage.remat)
        return {"output": mean_square(velocity, target)}

    draw = partial(_draw, config, stage, timesteps, guidance)
    start = {"output": np.float32(0)}
    return Objective(draw, means, lambda means, whole: (means["output"], {}), start)


def distill_loss(
    teacher: ModelConfig,
    student: ModelConfig,
    stage: StageConfig,
    timesteps: Timesteps = "uniform",
    guidance: tuple[float, float] | None = None,
) -> Objective:
    """Output distillation, block or group features, balance of experts and of blocks
    (docs/method.md).

    The loop's constants are the teacher's parameters. Raises ConfigError where the two bodies do
    not align.
    """
    check_aligned(teacher.transformer, student.transformer)
    dtype, weight = jnp.dtype(stage.dtype), stage.loss

    def means(params: dict, constants: Any, batch: dict[str, Array]) -> Means:
        teacher_model = model_of(teacher.transformer, constants, dtype)
        student_model = model_of(student.transformer, params, dtype)
        inputs, _ = noisy(student, batch)
        t_velocity, s_velocity, layers, report = lockstep(
            teacher_model,
            student_model,
            teacher_model.embed(*inputs),
            _embed(student_model, inputs, stage, batch),
            features=weight.feature > 0,
            remat=stage.remat,
        )
        output = mean_square(t_velocity, s_velocity)
        return {"output": output, "routing": routing_means(report)} | layers

    transformer = student.transformer
    top_k = transformer.moe.top_k if stage.top_k is None else stage.top_k
    routed = nothing_routed(transformer, max(stage.random_top_k, default=top_k))
    start = {"output": np.float32(0), "routing": routed}
    if weight.feature > 0:
        layers = sum(stack.groups for stack in transformer.stacks)
        start |= {"feature": np.zeros(layers, np.float32), "square": np.zeros(layers, np.float32)}
    draw = partial(_draw, student, stage, timesteps, guidance)
    return Objective(draw, means, partial(total, weight), start)


def noisy_inputs(
    config: ModelConfig,
    timesteps: Timesteps,
    batch: dict[str, Array],
    key: Array,
    guidance: tuple[float, float] | None = None,
) -> tuple[tuple, Float[Array, "b n c"]]:
    """An encoded batch (data/protocol.py, Batches) at random times: the arguments of Flux.embed,
    and the velocity that is true there."""
    return noisy(config, with_noise(config, timesteps, guidance, batch, key))


@cache
def noisy_of(
    config: ModelConfig, timesteps: Timesteps, guidance: tuple[float, float] | None = None
) -> Callable[[dict, Array], tuple[tuple, Array]]:
    """`noisy_inputs` of a batch and a key; one object for equal arguments, so that what is compiled
    with it is compiled once."""
    return partial(noisy_inputs, config, timesteps, guidance=guidance)


def with_noise(
    config: ModelConfig,
    timesteps: Timesteps,
    guidance: tuple[float, float] | None,
    batch: dict[str, Array],
    key: Array,
) -> dict[str, Array]:
    """The batch with a `noise` and a `time` for every sample, and its `guidance` where the model
    reads one: uniform in a range, or the config's.

    A batch with points of a teacher's path, `noisy` at its `time` with its `guidance`, keeps them.
    """
    data = _tokens(batch["latents"])
    noise_key, time_key = jax.random.split(key)
    drawn = {}
    if "noisy" not in batch:
        t = times(timesteps, time_key, data.shape[0])
        drawn["noise"] = jax.random.normal(noise_key, data.shape)
        drawn["time"] = flow.shift(t, config.shift_at(data.shape[1]))
    if config.transformer.guidance_embed and "guidance" not in batch:
        least, most = guidance or (config.guidance, config.guidance)
        share = jax.random.uniform(inner_key(key, "guidance"), data.shape[:1])
        drawn["guidance"] = least + (most - least) * share
    return batch | drawn


def noisy(config: ModelConfig, batch: dict[str, Array]) -> tuple[tuple, Float[Array, "b n c"]]:
    """What `with_noise` gave, as the arguments of Flux.embed, and the velocity that is true there:
    on a teacher's path the one that leads straight to the data."""
    data, txt, t = _tokens(batch["latents"]), batch["txt"], batch["time"]
    if "noisy" in batch:
        x = _tokens(batch["noisy"])
        target = (x - data) / jnp.maximum(t, 1e-6)[:, None, None]
    else:
        x, target = flow.mix(data, batch["noise"], t), flow.velocity(data, batch["noise"])
    ids = flow.image_ids(*batch["latents"].shape[1:3]), flow.text_ids(txt.shape[1])
    guidance = batch["guidance"] if config.transformer.guidance_embed else None
    return (x, ids[0], txt, ids[1], t, batch["y"], guidance), target


def _tokens(grid: Float[Array, "b rows columns k"]) -> Float[Array, "b n k"]:
    return grid.reshape(grid.shape[0], -1, grid.shape[-1])


def _draw(
    config: ModelConfig,
    stage: StageConfig,
    timesteps: Timesteps,
    guidance: tuple[float, float] | None,
    batch: dict[str, Array],
    key: Array,
) -> dict[str, Array]:
    """All that is random in a stage's batch."""
    batch = with_noise(config, timesteps, guidance, batch, key)
    if stage.random_top_k:
        choices, count = jnp.asarray(stage.random_top_k), batch["time"].shape
        batch["top_k"] = jax.random.choice(inner_key(key, "top_k"), choices, count)
    return batch


def _embed(
    model: Flux, inputs: tuple, stage: StageConfig, batch: dict[str, Array]
) -> tuple[Streams, Context]:
    """The start of a model that trains, with the experts per token that the stage asks for.
    ConfigError for batches that do not say what is padding where the stage must know."""
    asked: dict[str, Any] = {"top_k": stage.top_k}
    if stage.random_top_k:
        asked = {"top_k": max(stage.random_top_k), "top_k_each": batch["top_k"]}
    if not stage.count_padding:
        check("text_length" in batch, NO_LENGTHS)
        asked["text_lengths"] = batch["text_length"]
    return model.embed(*inputs, **asked)


def times(timesteps: Timesteps, key: Array, count: int) -> Float[Array, " b"]:
    """Times in (0, 1), not yet shifted: uniform, evenly spread over the batch, or the logistic of a
    normal."""
    if timesteps == "logit_normal":
        return jax.nn.sigmoid(jax.random.normal(key, (count,)))
    start, order = jax.random.split(key)
    spread = (jnp.arange(count) + jax.random.uniform(start)) / count
    return jax.random.permutation(order, spread)
