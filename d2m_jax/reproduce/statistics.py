"""Means over seeds with their 95 % intervals (Student's t), and paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; `half` is half its 95 % interval, None of one seed alone."""

    mean: float
    half: float | None
    p: float | None = None  # that it is 0 (of a ratio: 1), two-sided

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def mean(values: Sequence[float]) -> Interval:
    """Of one number per seed."""
    n = len(values)
    if n < 2:
        return Interval(float(np.mean(values)), None)
    error = float(np.std(values, ddof=1)) / n**0.5
    found = float(np.mean(values))
    if error == 0:
        return Interval(found, 0.0, 1.0 if found == 0 else 0.0)
    p = 2 * float(stats.t.sf(abs(found) / error, n - 1))
    return Interval(found, float(stats.t.ppf(0.975, n - 1)) * error, p)


def difference(mine: Sequence[float], others: Sequence[float]) -> Interval:
    """By how much mine are larger, seed by seed: the paired t-test."""
    return mean([a - b for a, b in zip(mine, others, strict=True)])


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over seeds; low and high bound its 95 % interval, None of one seed."""

    mean: float
    low: float | None
    high: float | None
    p: float | None  # that it is 1


def ratio(mine: Sequence[float], others: Sequence[float]) -> Ratio:
    """How many times as large mine are, seed by seed: the paired t-test of the logarithms."""
    logs = difference(np.log(mine).tolist(), np.log(others).tolist())
    middle = float(np.exp(logs.mean))
    if logs.half is None:
        return Ratio(middle, None, None, None)
    return Ratio(middle, float(np.exp(logs.low)), float(np.exp(logs.high)), logs.p)
