"""The tiled grouped matmul against the reference and against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2m_jax.kernels import grouped_matmul

GROUPS, TILE, ROWS, D, F = 4, 4, 40, 6, 5  # of ROWS rows
TILES = grouped_matmul.tiles(ROWS - GROUPS * TILE, GROUPS, TILE)
SIZES = {
    "even": (8, 8, 8, 8),
    "skewed": (28, 4, 4, 4),
    "empty groups": (0, 24, 0, 12),
    "empty ends": (0, 16, 16, 0),
    "one has everything": (0, 0, 40, 0),
    "the last has everything": (0, 0, 0, 40),
    "nothing": (0, 0, 0, 0),
}


def loop(x, w, sizes):
    """Row by row, in NumPy; rows past the last group are left out."""
    group = np.repeat(np.arange(GROUPS), sizes)
    return np.stack([x[i] @ w[g] for i, g in enumerate(group)] or [np.zeros(F)])


def draw():
    rng = np.random.default_rng(0)
    shapes = (ROWS, D), (GROUPS, D, F), (ROWS, F)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.fixture(scope="module", params=["gathered", "in place"])
def functions(request):
    """Forward, and gradients with respect to x and w, of tiled and of reference."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in place":
            patch.setattr(grouped_matmul, "GATHER_BYTES", 0)

        def compile(gmm):
            def forward_and_gradient(x, w, dy, sizes):
                # rows past the last group are never read, so they have no gradient
                dy = dy * (jnp.arange(ROWS) < sizes.sum())[:, None]
                y, back = jax.vjp(lambda x, w: gmm(x, w, sizes), x, w)
                return y, *back(dy)

            lowered = jax.jit(forward_and_gradient).lower(*draw(), jnp.zeros(GROUPS, jnp.int32))
            return lowered.compile()

        def tiled(x, w, sizes):
            return grouped_matmul.tiled(x, w, sizes, TILE)

        yield compile(tiled), compile(grouped_matmul.reference)


def compare(functions, sizes):
    x, w, dy = draw()
    used = sum(sizes)
    tiled, reference = (f(x, w, dy, jnp.asarray(sizes, jnp.int32)) for f in functions)
    for fast, plain in zip(tiled[1:], reference[1:], strict=True):
        np.testing.assert_allclose(fast, plain, atol=1e-5)
    np.testing.assert_allclose(tiled[0][:used], reference[0][:used], atol=1e-5)
    if used:
        np.testing.assert_allclose(
            tiled[0][:used], loop(np.asarray(x), np.asarray(w), sizes), atol=1e-5
        )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_tiled_is_the_reference_and_the_loop(functions, sizes):
    compare(functions, sizes)


def test_any_split(functions):
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, ROWS // TILE), min_size=GROUPS, max_size=GROUPS))
    def check(tiles):
        total = np.cumsum([0, *tiles]).clip(max=ROWS // TILE)
        compare(functions, tuple(int(n) for n in np.diff(total) * TILE))

    check()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 9))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_tiles_hold_any_split(sizes, tile):
    padded = sum(-(-size // tile) for size in sizes)
    assert padded <= grouped_matmul.tiles(sum(sizes), len(sizes), tile)


def test_tile_groups_counts_and_ends_in_the_last_group():
    groups = grouped_matmul.tile_groups(jnp.asarray([8, 0, 4, 0]), 5, 4)
    np.testing.assert_array_equal(groups, [0, 0, 2, 3, 3])


@pytest.mark.parametrize("limit", [grouped_matmul.GATHER_BYTES, 0])
def test_gradient_of_half_precision_weights_is_summed_in_float32(limit, monkeypatch):
    """Many tiles of one group: bfloat16 sums would stop at 256."""
    monkeypatch.setattr(grouped_matmul, "GATHER_BYTES", limit)
    x, w = jnp.ones((600, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)

    @jax.jit
    @jax.grad
    def gradient(w):
        sizes = jnp.asarray([600], jnp.int32)
        return grouped_matmul.tiled(x, w, sizes, 1).astype(jnp.float32).sum()

    assert gradient(w).dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient(w).astype(jnp.float32), 600, rtol=4e-3)
