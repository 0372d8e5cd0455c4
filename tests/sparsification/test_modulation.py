import numpy as np

from d2m_jax.sparsification.modulation import low_rank
from tests.seed import generator


def test_full_rank_is_the_original(small, calibration):
    config, params, _, error = low_rank(small.config, small.params, calibration.cond, 32)
    assert config.modulation_rank == 32 and error < 1e-6
    dense = small.velocity(small.config, small.params)
    np.testing.assert_allclose(small.velocity(config, params), dense, atol=1e-4)


def test_a_basis_of_the_right_size_loses_nothing(small):
    """Inputs of rank 3 around a mean: rank 3 is exact only if the bias takes up the mean."""
    rng = generator()
    cond = 1 + rng.standard_normal((50, 3)) @ rng.standard_normal((3, 32))
    errors = [
        low_rank(small.config, small.params, cond.astype(np.float32), r)[3] for r in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > 0.01 and errors[2] < 1e-5

    _, params, *_ = low_rank(small.config, small.params, cond.astype(np.float32), 3)
    old = small.params["single"][0]["block"]["modulation"]["lin"]
    new = params["single"][0]["block"]["modulation"]["lin"]
    assert new["kernel"].shape == (4, 1, 3, 96)
    before = cond @ old["kernel"][2, 0] + old["bias"][2, 0]
    after = cond @ params["modulation_basis"]["kernel"] @ new["kernel"][2, 0] + new["bias"][2, 0]
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_the_basis_loses_least_of_the_outputs(small):
    """As much as the best matrices of the rank do, which singular values tell."""
    rng = generator(1)
    cond = (1 + rng.standard_normal((64, 32)) / np.arange(1, 33)).astype(np.float32)
    kernels, biases = [], []
    for kind, stream in (("double", "img_mod"), ("double", "txt_mod"), ("single", "modulation")):
        lin = small.params[kind][0]["block"][stream]["lin"]
        kernels += list(lin["kernel"][:, 0].astype(np.float64))
        biases += list(lin["bias"][:, 0])
    kernel, bias = np.concatenate(kernels, 1), np.concatenate(biases)
    centred = cond - cond.mean(0, dtype=np.float64)
    values = np.linalg.svd(centred @ kernel, compute_uv=False)
    whole = np.linalg.norm(cond @ kernel + bias)
    for rank in (2, 5, 12):
        error = low_rank(small.config, small.params, cond, rank)[3]
        best = np.linalg.norm(values[rank:]) / whole
        assert 0.999 * best < error < 1.02 * best, rank
