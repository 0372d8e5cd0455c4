import jax
import numpy as np

from d2m_jax.sparsify import sensitivity
from tests.seed import generator


def ffn(rng, width=6, dim=5):
    def draw(*shape):
        return rng.standard_normal((1, 1, *shape), np.float32)

    return {
        "in_layer": {"kernel": draw(dim, width), "bias": draw(width)},
        "out_layer": {"kernel": draw(width, dim)},
    }


def test_score_is_the_variance_that_a_neuron_brings(monkeypatch):
    monkeypatch.setattr(sensitivity, "CHUNK", 7)
    rng = generator()
    layer, x = ffn(rng), rng.standard_normal((1, 1, 20, 5), np.float32)
    s = rng.random((1, 1, 20, 5), np.float32) ** 4
    found = sensitivity.scores(layer, x, s)[0, 0]
    kernel, bias = layer["in_layer"]["kernel"][0, 0], layer["in_layer"]["bias"][0, 0]
    h = np.asarray(jax.nn.gelu(x[0, 0] @ kernel + bias, approximate=True))
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
    found = sensitivity.scores(layer, x, np.ones_like(x))[0, 0]
    assert found[2] < 1e-6 < np.delete(found, 2).min()
