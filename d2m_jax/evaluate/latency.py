"""How long a forward takes, two models side by side on whatever else the machine does."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from d2m_jax.evaluate.noisy import Inputs, Program, first

ROUNDS = 25
SECONDS, FEWEST = 20.0, 5  # after which no further round begins, but for the fewest


def milliseconds(models: Sequence[tuple[Program, dict]], inputs: Inputs, batch: int) -> list[float]:
    """Milliseconds per image of one forward over the first `batch` of the inputs.

    The median of ROUNDS in which the models take turns, or of as many as SECONDS hold.
    """
    placed = [(program, *first(params, inputs, batch)) for program, params in models]
    for program, *arguments in placed:  # compiles
        jax.block_until_ready(program(*arguments))
    seconds = [[] for _ in placed]
    begun = time.perf_counter()
    for done in range(ROUNDS):
        if done >= FEWEST and time.perf_counter() - begun > SECONDS:
            break
        for taken, (program, *arguments) in zip(seconds, placed, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            taken.append(time.perf_counter() - start)
    return [1000 / batch * float(np.median(taken)) for taken in seconds]
