"""Tokens through the experts that they chose, in tiles, against a loop: forward and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2m_jax.kernels import tiles
from tests.seed import generator

TOKENS, K, EXPERTS, D, F = 150, 2, 4, 6, 5
LOADS = {
    "even": [1, 1, 1, 1, 0],
    "skewed": [8, 4, 2, 1, 0],
    "idle experts": [1, 0, 1, 0, 0],
    "crowded": [0, 1, 20, 1, 0],
    "mostly another device's": [1, 1, 1, 1, 8],
    "all another device's": [0, 0, 0, 0, 1],
}


def expert(x, weight, kernel, bias):
    return jnp.tanh(x @ kernel + bias) * weight[:, None]


def plain(x, chosen, weight, params):
    """One expert after the other on all tokens, masked."""
    total = 0
    for i, own in enumerate(zip(*params, strict=True)):
        for choice in range(chosen.shape[1]):
            mine = jnp.where(chosen[:, choice] == i, weight[:, choice], 0)
            total = total + expert(x, mine, *own)
    return total


def draw(tokens=TOKENS, dtype=jnp.float32):
    """x, weight, params and the output's gradient."""
    rng = generator()
    shapes = (tokens, D), (tokens, K), (EXPERTS, D, F), (EXPERTS, F), (tokens, F)
    x, weight, kernel, bias, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return x, weight, (kernel, bias), dy


def choices(load, tokens=TOKENS):
    """Two experts per token, which may be the same; EXPERTS is one that is not here."""
    p = np.asarray(load) / np.sum(load)
    # the same for every TOY_SEED: how many are left over is what they are for
    return jnp.asarray(np.random.default_rng(1).choice(EXPERTS + 1, (tokens, K), p=p), jnp.int32)


@partial(jax.jit, static_argnums=0)
def with_gradients(function, chosen, x, weight, params, dy):
    y, back = jax.vjp(lambda x, w, p: function(x, chosen, w, p), x, weight, params)
    return y, back(dy)


tiled = partial(tiles.chosen_experts, expert)


def compare(chosen, tokens=TOKENS):
    found, expected = (with_gradients(f, chosen, *draw(tokens)) for f in (tiled, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # float32 sums of up to 300 products in another order
        np.testing.assert_allclose(a, b, atol=5e-5)
    y, (dx, dweight, _) = found
    elsewhere = np.asarray(chosen) == EXPERTS  # to the bit: another device's choice adds nothing
    np.testing.assert_array_equal(np.asarray(dweight)[elsewhere], 0)
    for a in (y, dx):
        np.testing.assert_array_equal(np.asarray(a)[elsewhere.all(1)], 0)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_tiles_are_the_loop(load):
    compare(choices(load))


def test_crowded_experts_need_more_than_the_batch():
    """Else the tests above would not see the tiles of what is left."""
    places = {name: tiles.place(choices(load), EXPERTS, EXPERTS) for name, load in LOADS.items()}
    left = {name: int(at.end[-1]) for name, at in places.items()}
    assert left["even"] == 0 and left["crowded"] > sum(tiles.TILES) and left["skewed"] > 0


def test_any_choices():
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, EXPERTS), min_size=2 * TOKENS, max_size=2 * TOKENS))
    def check(chosen):
        compare(jnp.asarray(chosen, jnp.int32).reshape(TOKENS, K))

    check()


@pytest.mark.parametrize("tokens", [1, 31, 129])
def test_any_number_of_tokens(tokens):
    compare(choices([0, 1, 0, 0, 0], tokens), tokens)


def test_every_choice_has_one_place():
    chosen = choices(LOADS["skewed"])
    places = tiles.place(chosen, EXPERTS, EXPERTS)
    rows = len(places.choice)
    in_batch = np.asarray(places.row).reshape(-1) < rows
    left = np.asarray(places.left)
    np.testing.assert_array_equal(np.sort(left[left < chosen.size]), np.flatnonzero(~in_batch))
    of_row = np.asarray(places.choice)[np.asarray(places.row).reshape(-1)[in_batch]]
    np.testing.assert_array_equal(of_row, np.flatnonzero(in_batch))
    assert (np.asarray(places.choice) == chosen.size).sum() == rows - in_batch.sum()


def test_the_batch_is_for_this_device_s_share():
    """Of twelve experts three: a quarter of all choices, not all of them."""
    chosen = choices([1, 1, 1, 1, 8])
    whole, share = (len(tiles.place(chosen, EXPERTS, n).choice) for n in (EXPERTS, 3 * EXPERTS))
    assert chosen.size <= whole and chosen.size / 3 <= share < whole / 2


def test_gradient_of_half_precision_weights_is_summed_in_float32(monkeypatch):
    """Many tiles of one expert: sums of eights in bfloat16 would stop at 2048."""
    monkeypatch.setattr(tiles, "TILES", (8,))
    x, chosen = jnp.ones((6000, 1), jnp.bfloat16), jnp.zeros((6000, 1), jnp.int32)
    weight = jnp.ones((6000, 1))

    def product(x, weight, w):
        return x @ w * weight[:, None].astype(x.dtype)

    @jax.jit
    @jax.grad
    def gradient(w):
        y = tiles.chosen_experts(product, x, chosen, weight, (w,))
        return y.astype(jnp.float32).sum()

    w = jnp.ones((8, 1, 1), jnp.bfloat16)  # a batch for an eighth of the tokens
    assert gradient(w).dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient(w)[0].astype(jnp.float32), 6000, rtol=4e-3)
    np.testing.assert_array_equal(gradient(w)[1:], 0)


def test_under_vmap_it_is_a_loop():
    """As in a Mixture of Blocks, whose samples run side by side with blocks of their own."""
    chosen = jnp.stack([choices(LOADS["skewed"]), choices(LOADS["even"])])
    inputs = jax.tree.map(lambda a: jnp.stack([a, a + 1]), draw())
    compute = partial(with_gradients, tiled)
    together = jax.vmap(compute)(chosen, *inputs)
    for i in range(2):
        alone = compute(chosen[i], *jax.tree.map(lambda a, i=i: a[i], inputs))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, atol=5e-5)
