"""The benchmark of whole models: prompts of their data, images, and scores where the data has a
judge."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Array, Float

from d2m_jax.config import ConfigError, ModelConfig
from d2m_jax.data.icons import Icons
from d2m_jax.data.protocol import Data, Prompt
from d2m_jax.data.source import open_data
from d2m_jax.evaluate import oracle
from d2m_jax.evaluate.scores import Score, Scores
from d2m_jax.sampling.pipeline import Pipeline, load_pipeline

# Which of the images in [0, 1], one per prompt, are what the prompt asks for.
Judge = Callable[[Float[Array | np.ndarray, "n h w 3"], Sequence[Prompt]], Score]


def judge_of(data: Data) -> Judge | None:
    """Who says what images of this data's prompts are worth; None where nobody can."""
    if not isinstance(data, Icons):
        return None
    lexicon = data.lexicon
    # The prompts of this data are scenes.
    return lambda images, prompts: oracle.score(
        images, cast(Sequence[oracle.Scene], prompts), lexicon
    )


def evaluate(
    path: Path | str, prompts: int, seed: int = 0, quantize: str | None = None, **options: Any
) -> Scores:
    """Score a model directory on so many prompts of either kind; a seed fixes the noise, `options`
    are those of Pipeline."""
    pipe = load_pipeline(path, quantize=quantize)
    return scores_of(pipe, data_of(path, pipe.config), prompts, seed, **options)


def data_of(path: Path | str, config: ModelConfig) -> Data:
    """The embedded task that a model was made for. ConfigError for a model of anything else."""
    try:
        return open_data(oracle.task_of(config), config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def scores_of(pipe: Pipeline, data: Data, prompts: int, seed: int = 0, **options: Any) -> Scores:
    """The same for a pipeline at hand and the data that it was made for."""
    scores, judge = {}, judge_of(data)
    assert judge is not None  # which data it is was asked before
    for kind in ("seen", "held_out"):
        asked = data.prompts(prompts, held_out=kind == "held_out")
        images = pipe([prompt.caption for prompt in asked], seed=seed, **options)
        scores[kind] = judge(images, asked)
    return scores
