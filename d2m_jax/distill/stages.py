"""A stage's loss as a function of (params, constants, batch, key), for the training loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.config import ModelConfig, StageConfig, Timesteps
from d2m_jax.distill.lockstep import check_aligned, lockstep
from d2m_jax.distill.losses import feature_weights, mean_square, routing
from d2m_jax.keys import inner_key
from d2m_jax.models.flux import model_of

Loss = Callable[[dict, Any, dict, Array], tuple[Float[Array, ""], dict[str, Array]]]


def flow_loss(config: ModelConfig, stage: StageConfig, timesteps: Timesteps = "uniform") -> Loss:
    """Flow matching from scratch: E ‖v(x_t, t) − (noise − data)‖²."""
    dtype = jnp.dtype(stage.dtype)

    def loss(params: dict, constants: Any, batch: dict[str, Array], key: Array):
        model = model_of(config.transformer, params, dtype)
        inputs, target = noisy_inputs(config, timesteps, batch, key)
        streams, context = model.embed(*inputs, **drawn_experts(stage, inputs[0].shape[0], key))
        velocity, _ = model.run(streams, context, remat=stage.remat)
        return mean_square(velocity, target), {}

    return loss


def distill_loss(
    teacher: ModelConfig,
    student: ModelConfig,
    stage: StageConfig,
    timesteps: Timesteps = "uniform",
) -> Loss:
    """Output distillation, block or group features, balance of experts and of blocks
    (docs/method.md).

    The loop's constants are the teacher's parameters. Raises ConfigError where the two bodies do
    not align.
    """
    check_aligned(teacher.transformer, student.transformer)
    dtype, weight = jnp.dtype(stage.dtype), stage.loss

    def loss(params: dict, constants: Any, batch: dict[str, Array], key: Array):
        teacher_model = model_of(teacher.transformer, constants, dtype)
        student_model = model_of(student.transformer, params, dtype)
        inputs, _ = noisy_inputs(student, timesteps, batch, key)
        t_velocity, s_velocity, layers, report = lockstep(
            teacher_model,
            student_model,
            teacher_model.embed(*inputs),
            student_model.embed(*inputs, **drawn_experts(stage, inputs[0].shape[0], key)),
            features=weight.feature > 0,
            remat=stage.remat,
        )
        output = mean_square(t_velocity, s_velocity)
        total, metrics = weight.output * output, {"output": output}
        if weight.feature:
            weights = feature_weights(output, layers["feature"], layers["norm"])
            total += weight.feature * (weights * layers["feature"]).sum()
            metrics["feature"] = layers["feature"] / jnp.square(layers["norm"])
        experts, blocks, health = routing(report)
        total += weight.balance * experts + weight.block_balance * blocks
        return total, metrics | {"balance": experts, "block_balance": blocks} | health

    return loss


def noisy_inputs(
    config: ModelConfig, timesteps: Timesteps, batch: dict[str, Array], key: Array
) -> tuple[tuple, Float[Array, "b n c"]]:
    """An encoded batch (data/protocol.py, Batches) at random times: the arguments of Flux.embed,
    and the velocity that is true there.

    Where the batch has points of a teacher's path, `noisy` at its `time` with its `guidance`, these
    are taken instead: the velocity is the one that leads from there straight to the data.
    """
    grid, txt, y = batch["latents"].shape[1:3], batch["txt"], batch["y"]
    data = _tokens(batch["latents"])
    noise_key, time_key = jax.random.split(key)
    if "noisy" in batch:
        x, t = _tokens(batch["noisy"]), batch["time"]
        target = (x - data) / jnp.maximum(t, 1e-6)[:, None, None]
    else:
        noise = jax.random.normal(noise_key, data.shape)
        t = times(timesteps, time_key, data.shape[0])
        t = flow.shift(t, config.shift, data.shape[1])
        x, target = flow.mix(data, noise, t), flow.velocity(data, noise)
    guidance = jnp.full(t.shape, config.guidance) if config.transformer.guidance_embed else None
    if guidance is not None:
        guidance = batch.get("guidance", guidance)
    return (x, flow.image_ids(*grid), txt, flow.text_ids(txt.shape[1]), t, y, guidance), target


def _tokens(grid: Float[Array, "b rows columns k"]) -> Float[Array, "b n k"]:
    return grid.reshape(grid.shape[0], -1, grid.shape[-1])


def drawn_experts(stage: StageConfig, count: int, key: Array) -> dict[str, Any]:
    """How many experts run, for Flux.embed: as the stage says, or drawn for each sample."""
    if not stage.random_top_k:
        return {"top_k": stage.top_k}
    drawn = jax.random.choice(inner_key(key, "top_k"), jnp.asarray(stage.random_top_k), (count,))
    return {"top_k": max(stage.random_top_k), "top_k_each": drawn}


def times(timesteps: Timesteps, key: Array, count: int) -> Float[Array, " b"]:
    """Times in (0, 1), not yet shifted: uniform, evenly spread over the batch, or the logistic of a
    normal."""
    if timesteps == "logit_normal":
        return jax.nn.sigmoid(jax.random.normal(key, (count,)))
    start, order = jax.random.split(key)
    spread = (jnp.arange(count) + jax.random.uniform(start)) / count
    return jax.random.permutation(order, spread)
