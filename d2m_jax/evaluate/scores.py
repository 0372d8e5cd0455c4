"""Shares of prompts that came out right: by category, with confidence, and the table of them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool
from rich.table import Table
from rich.text import Text

from d2m_jax.config import check
from d2m_jax.data.protocol import Prompt


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error; low and high bound the 95 % confidence interval (normal)."""

    mean: float
    standard_error: float

    @property
    def low(self) -> float:
        return self.mean - 1.96 * self.standard_error

    @property
    def high(self) -> float:
        return self.mean + 1.96 * self.standard_error


@dataclass(frozen=True)
class Score:
    """Which prompts came out right; floor judges true images by other captions of the category."""

    prompts: tuple[Prompt, ...]
    correct: Bool[np.ndarray, " n"]
    floor: Bool[np.ndarray, " n"]

    @functools.cached_property
    def overall(self) -> Estimate:
        """The mean over the categories, each of which is a stratum."""
        return _stratified(self.correct, self.prompts)

    @functools.cached_property
    def chance(self) -> Estimate:
        """The overall score of the floor."""
        return _stratified(self.floor, self.prompts)

    @functools.cached_property
    def categories(self) -> dict[str, float]:
        """The share of right prompts in each category."""
        return {
            name: float(self.correct[rows].mean()) for name, rows in strata(self.prompts).items()
        }


Scores = dict[str, Score]  # of "seen" prompts, whose kind trained, and of those "held_out"


def paired_difference(a: Score, b: Score) -> Estimate:
    """By how much a's overall score exceeds b's, over the same prompts."""
    check(a.prompts == b.prompts, "paired_difference: expected two scores over the same prompts")
    return _stratified(a.correct.astype(float) - b.correct, a.prompts)


def strata(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """The rows of each category that occurs."""
    names = np.array([prompt.category for prompt in prompts])
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}


def _stratified(values: np.ndarray, prompts: Sequence[Prompt]) -> Estimate:
    """The mean over categories of their means, and its standard error."""
    parts = [np.asarray(values[rows], float) for rows in strata(prompts).values()]
    variances = [v.var(ddof=1) / len(v) for v in parts]
    return Estimate(
        float(np.mean([v.mean() for v in parts])), float(np.sqrt(sum(variances)) / len(parts))
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
    overall, difference = ["overall"], ["points above the first"]
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
