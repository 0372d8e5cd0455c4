import jax
import numpy as np
import pytest

from d2m_jax.sparsification import sensitivity
from tests.seed import generator


def ffn(rng, width=6, dim=5):
    def draw(*shape):
        return rng.standard_normal((1, 1, *shape), np.float32)

    return {
        "in_layer": {"kernel": draw(dim, width), "bias": draw(width)},
        "out_layer": {"kernel": draw(width, dim)},
    }


def scores(layer, x, s, *sizes):
    """Of tokens that come in parts of these sizes."""
    total = sensitivity.no_tokens(layer)
    for part in np.split(np.arange(x.shape[2]), np.cumsum(sizes)[:-1]):
        found = sensitivity.sums(layer, x[:, :, None, part], s[:, :, None, part])
        total = sensitivity.merged(total, found)
    return sensitivity.scores(jax.tree.map(np.asarray, total))[0, 0]


@pytest.mark.parametrize("sizes", [(20,), (7, 7, 6), (1,) * 20])
def test_score_is_the_variance_that_a_neuron_brings(sizes):
    rng = generator()
    layer, x = ffn(rng), rng.standard_normal((1, 1, 20, 5), np.float32)
    layer["in_layer"]["bias"][..., 1] = 300  # nearly all of it mean: 300 ± 2
    s = rng.random((1, 1, 20, 5), np.float32) ** 4
    found = scores(layer, x, s, *sizes)
    kernel, bias = layer["in_layer"]["kernel"][0, 0], layer["in_layer"]["bias"][0, 0]
    h = np.asarray(jax.nn.gelu(x[0, 0] @ kernel + bias, approximate=True), np.float64)
    out = layer["out_layer"]["kernel"][0, 0]
    expected = [
        np.mean(
            [(h[t, j] - h[:, j].mean()) ** 2 * (s[0, 0, t] * out[j] ** 2).sum() for t in range(20)]
        )
        for j in range(6)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_neuron_that_is_always_on_is_worth_nothing():
    rng = generator()
    layer, x = ffn(rng), rng.standard_normal((1, 1, 50, 5), np.float32)
    layer["in_layer"]["kernel"][..., 2] = 0
    layer["in_layer"]["bias"][..., 2] = 9
    found = scores(layer, x, np.ones_like(x), 25, 25)
    assert found[2] < 1e-6 < np.delete(found, 2).min()
