import numpy as np

from d2m_jax.sparsification.prune import prune
from tests.seed import generator


def test_the_best_neurons_stay():
    rng = generator()
    shapes = {
        "in_layer": {"kernel": (2, 1, 3, 8), "bias": (2, 1, 8)},
        "out_layer": {"kernel": (2, 1, 8, 3), "bias": (2, 1, 3)},
    }
    ffn = {k: {n: rng.standard_normal(s) for n, s in v.items()} for k, v in shapes.items()}
    scores = np.array([[[0, 6, 1, 8, 2, 7, 3, 9.0]], [[5, 0, 5, 0, 5, 0, 5, 0.0]]])
    kept, order = prune(ffn, scores, 4)
    assert order.tolist() == [[[1, 3, 5, 7, 0, 2, 4, 6]], [[0, 2, 4, 6, 1, 3, 5, 7]]]
    for layer, neurons in ((0, [1, 3, 5, 7]), (1, [0, 2, 4, 6])):
        for part, expected in (
            (kept["in_layer"]["kernel"], ffn["in_layer"]["kernel"][layer, 0][:, neurons]),
            (kept["in_layer"]["bias"], ffn["in_layer"]["bias"][layer, 0][neurons]),
            (kept["out_layer"]["kernel"], ffn["out_layer"]["kernel"][layer, 0][neurons]),
            (kept["out_layer"]["bias"], ffn["out_layer"]["bias"][layer, 0]),
        ):
            np.testing.assert_array_equal(part[layer, 0], expected)
