"""The icons benchmark of whole models: prompts, images, scores, and the table that people read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from d2m_jax.config import ConfigError, IconsConfig, ModelConfig, WordsConfig, check
from d2m_jax.data import icons
from d2m_jax.evaluate.icons import Estimate, Score, paired_difference, score
from d2m_jax.sampling.pipeline import Pipeline, load_pipeline

Scores = dict[str, Score]  # of "seen" combinations of glyph and colour, and of those "held_out"


def evaluate(
    path: Path | str, prompts: int, seed: int = 0, quantize: str | None = None, **options: Any
) -> Scores:
    """Score a model directory on so many prompts of either kind; a seed fixes the noise, `options`
    are those of Pipeline."""
    pipe = load_pipeline(path, quantize=quantize)
    try:
        task = task_of(pipe.config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return scores_of(pipe, task, prompts, seed, **options)


def scores_of(
    pipe: Pipeline, task: IconsConfig, prompts: int, seed: int = 0, **options: Any
) -> Scores:
    """The same for a pipeline at hand."""
    lexicon = icons.lexicon_for(task, pipe.config.image)
    scores = {}
    for kind in ("seen", "held_out"):
        scenes = icons.prompts(task, pipe.config.image, prompts, held_out=kind == "held_out")
        images = pipe([scene.caption for scene in scenes], seed=seed, **options)
        scores[kind] = score(images, scenes, lexicon)
    return scores


def task_of(config: ModelConfig) -> IconsConfig:
    """The task that a model was made for, which its vocabulary, canvas and caption length tell."""
    check(
        isinstance(config.text, WordsConfig),
        "its prompts go through T5 and CLIP, expected a model of the embedded task's words",
    )
    words, image = config.text.vocabulary, config.image
    glyphs = len(words) - len(icons.WORDS)
    for task in ("scenes", "single"):
        candidate = IconsConfig(task=task, glyphs=glyphs)
        long_enough = task == "single" or config.text.length >= icons.LONGEST
        if glyphs > 0 and long_enough and icons.vocabulary(candidate, image) == words:
            return candidate
    raise ConfigError(
        f"its vocabulary of {len(words)} words is not that of a task of data/icons.py on"
        f" {image.height} × {image.width} pixels"
    )


def to_json(scores: Scores) -> dict[str, Any]:
    """Scores in percent, for programs."""
    return {
        kind: {
            "prompts": len(mine.prompts),
            "overall": _percent(mine.overall.mean),
            "confidence_95": [_percent(mine.overall.low), _percent(mine.overall.high)],
            "chance": _percent(mine.chance.mean),
            "categories": {
                name: {"score": _percent(share), "chance": _percent(chance)}
                for name, share, chance in _categories(mine)
            },
        }
        for kind, mine in scores.items()
    }


def table(name: str, scores: Scores, first: Scores | None = None) -> Table:
    """Scores in percent, for people; with `first`, the difference to it over the same prompts."""
    prompts = len(next(iter(scores.values())).prompts)
    result = Table("", title=Text(f"{name}, {prompts} prompts"), title_justify="left")
    overall, difference = ["overall"], ["difference to the first"]
    for kind, mine in scores.items():
        result.add_column(kind.replace("_", " "), justify="right")
        result.add_column("chance", justify="right")
        overall += [_interval(mine.overall), _interval(mine.chance)]
        if first is not None:
            difference += [_interval(paired_difference(mine, first[kind])), ""]
    for row in zip(*map(_categories, scores.values()), strict=True):
        result.add_row(row[0][0], *(str(_percent(value)) for _, *pair in row for value in pair))
    result.add_section()
    result.add_row(*overall)
    if first is not None:
        result.add_row(*difference)
    return result


def _categories(score: Score) -> list[tuple[str, float, float]]:
    """Name, score and chance floor of every category."""
    floor = replace(score, correct=score.floor).categories
    return [(name, share, floor[name]) for name, share in score.categories.items()]


def _interval(estimate: Estimate) -> str:
    return f"{_percent(estimate.mean)} ± {_percent(1.96 * estimate.standard_error)}"


def _percent(share: float) -> float:
    return round(100 * share, 1)
