"""Buckets, and which sample is in which batch."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2m_jax.config import ConfigError
from d2m_jax.data.buckets import Part, Schedule, all_of, assign, bucket_sizes


@pytest.mark.parametrize(
    ("resolution", "ratio", "stride"), [(1024, 2.0, 16), (512, 2.5, 16), (32, 1.5, 4), (48, 3, 16)]
)
def test_buckets_have_the_area_and_the_aspect(resolution, ratio, stride):
    found = bucket_sizes(resolution, ratio, stride)
    assert (resolution, resolution) in found and len(set(found)) == len(found) <= 20
    for height, width in found:
        assert height % stride == width % stride == 0 and (width, height) in found
        assert max(height / width, width / height) <= ratio
        # to the nearest multiple of the step, which is a 16th of the side or a token
        assert height * width == pytest.approx(resolution**2, rel=max(1 / 16, stride / resolution))


def test_squares_alone_and_sizes_that_tokens_do_not_divide():
    assert bucket_sizes(1024, 1.0, 16) == ((1024, 1024),)
    with pytest.raises(ConfigError, match="found 1000, expected multiples of 16"):
        bucket_sizes(1000, 2.0, 16)


def test_images_go_to_the_nearest_bucket():
    resolutions = [bucket_sizes(512, 2.0, 16), bucket_sizes(1024, 2.0, 16)]
    buckets = all_of(resolutions)
    sizes = [(3000, 4000), (1023, 1500), (600, 600), (100, 90), (4000, 100), (0, 0), (2000, 1000)]
    found = assign(np.array(sizes, np.int32), resolutions)
    nearest = {i: buckets[b] for i, b in enumerate(found) if b >= 0}
    assert found[5] == -1
    for i, (height, width) in nearest.items():
        wanted = math.log(sizes[i][1] / sizes[i][0])
        alike = [b for b in buckets if (b[0] * b[1] > 700**2) == (height * width > 700**2)]
        least = min(abs(math.log(w / h) - wanted) for h, w in alike)
        assert abs(math.log(width / height) - wanted) == pytest.approx(least, abs=1e-6)
    large = {i for i, (height, width) in nearest.items() if height * width > 700**2}
    assert large == {0, 1, 6}  # the others would be enlarged


@pytest.mark.parametrize("near", [(896, 1024), (960, 1024), (448, 512), (1008, 1024)])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_of_near_resolutions_each_is_one(near, ratio):
    resolutions = [bucket_sizes(resolution, ratio, 16) for resolution in near]
    buckets = all_of(resolutions)
    assert len(set(buckets)) == len(buckets)
    small, large = near
    sides = [(2000, 2000), (large, large), (large - 1, large), (small, small), (100, 100)]
    found = [buckets[i] for i in assign(np.array(sides, np.int32), resolutions)]
    assert found == [(large, large)] * 2 + [(small, small)] * 3


def schedules():
    counts = st.lists(st.integers(0, 13), min_size=1, max_size=4)
    weights = st.sampled_from([1.0, 2.0, 0.5, 0.3])
    parts = st.lists(st.tuples(counts, weights), min_size=1, max_size=2)
    return st.tuples(parts, st.integers(1, 9), st.integers(0, 3))


def made(sources, size, seed):
    """Buckets of parts, numbered through, and the weight of every entry."""
    width = max(len(counts) for counts, _ in sources)
    buckets, weights = [[] for _ in range(width)], []
    for counts, weight in sources:
        for bucket, count in zip(buckets, counts, strict=False):
            if count:
                bucket.append(Part(np.arange(len(weights), len(weights) + count), weight))
                weights += [weight] * count
    return Schedule(buckets, size, seed), weights


@given(schedules())
@settings(max_examples=30, deadline=None)
def test_nothing_is_dropped_or_doubled(drawn):
    schedule, weights = made(*drawn)
    if not weights:
        return
    passes = 10
    rounds = schedule._given(passes)
    seen = Counter()
    for batch in range(int(rounds.sum())):
        rows = schedule(batch)
        assert len(rows.entries) == schedule.size
        of_bucket = np.concatenate([p.entries for p in schedule.buckets[rows.bucket]])
        assert set(rows.entries) <= set(of_bucket)
        seen.update(rows.entries.tolist())
    for bucket, parts in enumerate(schedule.buckets):
        rows = int(rounds[bucket]) * schedule.size
        for part in parts:
            # as often as the weight says, but for the passes that have only begun
            for entry in part.entries:
                whole = rows / max(1, sum(p.weight * len(p.entries) for p in parts))
                assert abs(seen[int(entry)] - part.weight * whole) <= 2 + part.weight
        assert sum(seen[int(e)] for p in parts for e in p.entries) == rows


@given(schedules(), st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_any_process_makes_any_batch(drawn, batch):
    schedule, weights = made(*drawn)
    if not weights:
        return
    whole = schedule(batch)
    other = made(*drawn)[0]  # which has made nothing before
    for rows in (slice(0, schedule.size // 2), slice(schedule.size // 2, None)):
        mine = other(batch, rows)
        assert mine.bucket == whole.bucket
        np.testing.assert_array_equal(mine.entries, whole.entries[rows])
        np.testing.assert_array_equal(
            mine.positions, batch * schedule.size + np.arange(schedule.size)[rows]
        )
        instead = list(schedule.instead(batch))
        assert {r.bucket for r in instead} | {whole.bucket} == {
            bucket for bucket, parts in enumerate(schedule.buckets) if parts
        }
        for one, all_rows in zip(other.instead(batch, rows), instead, strict=True):
            assert one.bucket == all_rows.bucket != whole.bucket
            np.testing.assert_array_equal(one.entries, all_rows.entries[rows])


def test_one_pass_takes_every_sample_once_in_another_order_each_time():
    schedule = Schedule([[Part(np.arange(12))]], 4, 0)
    passes = [
        np.concatenate([schedule(i).entries for i in range(3 * p, 3 * p + 3)]) for p in (0, 1)
    ]
    for one in passes:
        np.testing.assert_array_equal(np.sort(one), np.arange(12))
    assert not np.array_equal(*passes) and not np.array_equal(passes[0], np.arange(12))
    other = Schedule([[Part(np.arange(12))]], 4, 1)
    assert not np.array_equal(other(0).entries, schedule(0).entries)


def test_ten_million_samples_start_at_once():
    entries = np.arange(10_000_000, dtype=np.int32)
    schedule = Schedule([[Part(entries[: 2 * 10**6])], [Part(entries[2 * 10**6 :])]], 64, 0)
    drawn = [schedule(batch) for batch in (0, 1, 10**6, 10**9)]
    buckets = [schedule(batch).bucket for batch in range(1000)]
    assert 150 < buckets.count(0) < 250
    assert all(len(np.unique(rows.entries)) == 64 for rows in drawn)
