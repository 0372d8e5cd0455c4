"""Against scipy's own tests."""

import numpy as np
import pytest
from scipy import stats

from d2m_jax.reproduce.statistics import difference, mean, ratio
from tests.seed import generator


def test_intervals_and_paired_tests():
    rng = generator()
    a, b = rng.random(5) + 1, rng.random(5) + 1.5
    found = mean(a.tolist())
    low, high = stats.t.interval(0.95, 4, a.mean(), stats.sem(a))
    assert (found.low, found.high) == pytest.approx((low, high))
    paired = difference(a.tolist(), b.tolist())
    assert paired.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired.mean == pytest.approx(a.mean() - b.mean())
    times = ratio(a.tolist(), b.tolist())
    expected = stats.ttest_rel(np.log(a), np.log(b))
    assert times.p == pytest.approx(expected.pvalue)
    assert times.mean == pytest.approx(stats.gmean(a) / stats.gmean(b))
    bounds = expected.confidence_interval(0.95)
    assert (times.low, times.high) == pytest.approx((np.exp(bounds.low), np.exp(bounds.high)))


def test_one_seed_has_no_interval():
    assert mean([2.0]).half is None and mean([2.0]).low == 2.0
    assert (ratio([2.0], [4.0]).mean, ratio([2.0], [4.0]).low) == (0.5, None)
    assert mean([3.0, 3.0]).half == 0 and mean([3.0, 3.0]).p == 0 and mean([0.0, 0.0]).p == 1
