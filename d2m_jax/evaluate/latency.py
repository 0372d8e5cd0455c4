"""How long a forward takes, two models side by side on whatever else the machine does."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from d2m_jax.evaluate.noisy import Inputs, Program, first

ROUNDS = 25


def milliseconds(models: Sequence[tuple[Program, dict]], inputs: Inputs, batch: int) -> list[float]:
    """Milliseconds per image of one forward over the first `batch` of the inputs.

    The median of ROUNDS in which the models take turns.
    """
    placed = [(program, *first(params, inputs, batch)) for program, params in models]
    for program, *arguments in placed:  # compiles
        jax.block_until_ready(program(*arguments))
    seconds = [[] for _ in placed]
    for _ in range(ROUNDS):
        for taken, (program, *arguments) in zip(seconds, placed, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            taken.append(time.perf_counter() - start)
    return [1000 / batch * float(np.median(taken)) for taken in seconds]
