"""How long a forward takes, all models side by side on whatever else the machine does."""

import time
from collections.abc import Mapping

import jax
import numpy as np

from d2m_jax.config import ModelConfig
from d2m_jax.evaluate.held_out import Inputs, forward, place

ROUNDS = 25


def milliseconds(
    models: Mapping[ModelConfig, dict], inputs: Inputs, batch: int
) -> dict[ModelConfig, float]:
    """Milliseconds per image of one forward over a batch.

    The median of ROUNDS in which the models take turns; on all devices where the batch can be
    cut over them, else on one.
    """
    first = {name: array[:batch] for name, array in inputs.items()}
    placed = {config: place(params, first) for config, params in models.items()}
    for config, arguments in placed.items():  # compiles
        jax.block_until_ready(forward(config, *arguments))
    seconds = {config: [] for config in models}
    for _ in range(ROUNDS):
        for config, arguments in placed.items():
            start = time.perf_counter()
            jax.block_until_ready(forward(config, *arguments))
            seconds[config].append(time.perf_counter() - start)
    return {config: 1000 / batch * float(np.median(taken)) for config, taken in seconds.items()}
