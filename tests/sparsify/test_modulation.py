import numpy as np

from d2m_jax.sparsify.modulation import low_rank
from tests.seed import generator


def test_full_rank_is_the_original(small, calibration):
    config, params, error = low_rank(small.config, small.params, calibration.cond, 32)
    assert config.modulation_rank == 32 and error < 1e-6
    dense = small.velocity(small.config, small.params)
    np.testing.assert_allclose(small.velocity(config, params), dense, atol=1e-4)


def test_a_basis_of_the_right_size_loses_nothing(small):
    """Inputs of rank 3 around a mean: rank 3 is exact only if the bias takes up the mean."""
    rng = generator()
    cond = 1 + rng.standard_normal((50, 3)) @ rng.standard_normal((3, 32))
    errors = [
        low_rank(small.config, small.params, cond.astype(np.float32), r)[2] for r in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > 0.01 and errors[2] < 1e-5

    _, params, _ = low_rank(small.config, small.params, cond.astype(np.float32), 3)
    old = small.params["single"][0]["block"]["modulation"]["lin"]
    new = params["single"][0]["block"]["modulation"]["lin"]
    assert new["kernel"].shape == (4, 1, 3, 96)
    before = cond @ old["kernel"][2, 0] + old["bias"][2, 0]
    after = cond @ params["modulation_basis"]["kernel"] @ new["kernel"][2, 0] + new["bias"][2, 0]
    np.testing.assert_allclose(after, before, atol=1e-4)
