"""Errors of the velocity at fixed times, on examples that stay the same: what runs, and other
people's, can be compared by.

Both conventions of the FLUX.1 benchmark of MLPerf Training are measured: t = k/8 and t = (k + ½)/8,
k = 0 … 7. Example i has k = i mod 8, or what its batch states (`eighth`); times are not shifted.
Means are taken per time, and the mean is that of the eight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d2m_jax.config import ModelConfig, StageConfig
from d2m_jax.distillation.stages import noisy
from d2m_jax.models.flux import model_of

TIMES = 8
OFFSETS = {"eighths": 0.0, "half_eighths": 0.5}  # of k, by convention


@dataclass(frozen=True)
class FixedTimes:
    """What is measured of a model that trains."""

    kinds: tuple[str, ...]  # of errors: "flow" and, with a teacher, "distillation"
    # (batch, key, number of its first example, offset) → batch with noise and times
    draw: Callable[[dict[str, Array], Array, Array, Array], dict[str, Array]]
    # (params, constants, that batch) → by kind the sums of errors by time, and their `count`
    sums: Callable[[dict, Any, dict[str, Array]], dict[str, Array]]


def fixed_times(config: ModelConfig, stage: StageConfig, teacher: ModelConfig | None) -> FixedTimes:
    """Of a stage's model: mean squared errors of the velocity against noise − data (`flow`), and
    against that of the teacher, whose parameters are the constants."""
    kinds = ("flow",) if teacher is None else ("flow", "distillation")
    sums = partial(error_sums, config, stage, teacher)
    return FixedTimes(kinds, partial(drawn, config), sums)


def drawn(
    config: ModelConfig,
    batch: dict[str, Array],
    key: Array,
    first: Int[Array, ""],
    offset: Float[Array, ""],
) -> dict[str, Array]:
    """An encoded batch with noise, the fixed times and the model's own guidance; `first` is the
    number of its first example."""
    count, rows, columns, channels = batch["latents"].shape
    eighth = batch.get("eighth", (first + jnp.arange(count)) % TIMES)
    found = {name: value for name, value in batch.items() if name != "noisy"}
    found |= {
        "eighth": eighth,
        "noise": jax.random.normal(key, (count, rows * columns, channels)),
        "time": (eighth + offset) / TIMES,
        "guidance": jnp.full(count, config.guidance),
    }
    return found


def error_sums(
    config: ModelConfig,
    stage: StageConfig,
    teacher: ModelConfig | None,
    params: dict,
    constants: Any,
    batch: dict[str, Array],
) -> dict[str, Float[Array, " 8"]]:
    """Sums over the examples of a batch of `drawn`, by time, and how many each time has."""
    dtype = jnp.dtype(stage.dtype)
    inputs, target = noisy(config, batch)
    model = model_of(config.transformer, params, dtype)
    velocity, _ = model.run(*model.embed(*inputs, top_k=stage.top_k))
    errors = {"flow": _per_example(velocity, target)}
    if teacher is not None:
        other = model_of(teacher.transformer, constants, dtype)
        wanted, _ = other.run(*other.embed(*inputs))
        errors["distillation"] = _per_example(velocity, wanted)
    at = jax.nn.one_hot(batch["eighth"], TIMES)
    exact = jax.lax.Precision.HIGHEST
    sums = {name: jnp.matmul(error, at, precision=exact) for name, error in errors.items()}
    return sums | {"count": at.sum(0)}


def _per_example(a: Float[Array, "b n c"], b: Float[Array, "b n c"]) -> Float[Array, " b"]:
    return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean((1, 2))


def metrics(convention: str, sums: dict[str, Float[np.ndarray, " 8"]]) -> dict[str, Any]:
    """Metrics of the sums of all batches: `validation_flow_at_eighths`, a list by time, and its
    mean, `validation_flow_eighths`."""
    count, found = sums["count"], {}
    for name in sums.keys() - {"count"}:
        means = sums[name][count > 0] / count[count > 0]
        found[f"validation_{name}_{convention}"] = float(means.mean())
        if (count > 0).all():
            found[f"validation_{name}_at_{convention}"] = means.tolist()
    return dict(sorted(found.items()))
