"""The fingerprint: one number for the same arrays wherever they lie, another for any others."""

import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import named_arrays
from d2m_jax.named_arrays import CHUNK, Fingerprint, fingerprint, finite


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def of_parts(array, cuts):
    total = Fingerprint()
    total.begin("a", array.dtype, array.shape)
    for part in np.split(array.reshape(-1), cuts):
        total.add(part)
    return total.hex()


def test_it_stays_what_it_is():
    """Another number here makes every checkpoint and model directory look damaged."""
    arrays = {"a": np.arange(70_000, dtype=np.float32), "b": np.ones((2, 3), jnp.bfloat16)}
    assert fingerprint(arrays) == "e9921d90"


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int32, np.uint8, bool])
def test_the_same_number_on_devices_and_in_blocks(dtype, monkeypatch):
    array = random((3, 70, CHUNK // 100), dtype)  # more than two chunks, cut in odd places
    expected = fingerprint({"a": array})
    assert of_parts(array, [1, 1000, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 5]) == expected
    assert fingerprint({"a": jnp.asarray(array)}) == expected
    monkeypatch.setattr(named_arrays, "_elsewhere", lambda array: True)
    assert fingerprint({"a": jnp.asarray(array)}) == expected


def test_every_flipped_bit_shows():
    array = random((4, 5))
    found = {fingerprint({"a": array})}
    for bit in range(32 * array.size):
        flipped = array.copy()
        flipped.view(np.uint32).reshape(-1)[bit // 32] ^= np.uint32(1 << bit % 32)
        if np.isfinite(flipped).all():
            found.add(fingerprint({"a": flipped}))
    assert len(found) > 32 * array.size - 5 * array.size  # few flips make an infinity


def test_elements_in_other_places_show():
    """Rows swapped, at every distance, and signs changed in pairs: what cancels in weaker sums."""
    array = random((256, 1024))
    expected = fingerprint({"a": array})
    for distance in (1, 2, 64, 128, 255):
        swapped = array.copy()
        swapped[[0, distance]] = swapped[[distance, 0]]
        assert fingerprint({"a": swapped}) != expected
    sums = {fingerprint({"a": array.reshape(1024, 256)}), fingerprint({"b": array}), expected}
    assert len(sums) == 3
    few = random((64,))
    pairs = {fingerprint({"a": few})}
    for i in range(64):
        for j in range(i):
            signs = np.ones(64, np.float32)
            signs[[i, j]] = -1
            pairs.add(fingerprint({"a": few * signs}))
    # 2,017 numbers of 32 bits: two alike are a chance of 5e-4.
    assert len(pairs) == 1 + 64 * 63 // 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("device", [False, True])
def test_what_is_not_finite_is_named(bad, dtype, device, monkeypatch):
    array = random((300, 400), dtype)
    array[299, 399] = bad
    monkeypatch.setattr(named_arrays, "_elsewhere", lambda array: device)
    tree = {"a": jnp.ones(3), "b": [jnp.ones(2), jnp.asarray(array)], "c": jnp.asarray(array)}
    with pytest.raises(FloatingPointError, match="b.1 is not finite"):
        fingerprint(tree)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_finite(dtype):
    for shape in ((), (0, 3), (3, 2, CHUNK // 3)):
        array = random(shape, dtype)
        assert finite(array) and finite(array.T)
        for bad in (np.nan, np.inf, -np.inf):
            for place in {0, array.size // 2, array.size - 1} if array.size else ():
                array = random(shape, dtype)
                array[np.unravel_index(place, shape)] = bad
                assert not finite(array) and not finite(array.T)
    largest = jnp.finfo(dtype).max
    assert finite(np.asarray([largest, -largest, 0, -0.0], dtype))


def test_nothing_is_an_array_too():
    one, other = fingerprint({"a": np.zeros((0, 3))}), fingerprint({"a": np.float64(1)})
    assert len({one, other, fingerprint({})}) == 3
