"""Rectified flow: path, schedule, packing, positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from d2m_jax import flow
from d2m_jax.config import ModelConfig
from tests.seed import generator


def test_path_runs_from_data_to_noise_at_the_velocity():
    rng = generator()
    data, noise = (jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32) for _ in range(2))
    t = jnp.asarray([0.0, 0.25, 1.0])
    x = flow.mix(data, noise, t)
    np.testing.assert_array_equal(x[0], data[0])
    np.testing.assert_array_equal(x[2], noise[2])
    np.testing.assert_allclose(x[1], 0.75 * data[1] + 0.25 * noise[1], rtol=1e-6)
    later = flow.mix(data, noise, t + 0.5)
    np.testing.assert_allclose((later - x) / 0.5, flow.velocity(data, noise), atol=1e-5)


def test_unshifted_schedule_is_even():
    np.testing.assert_allclose(flow.schedule(4, 1.0), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15)])
def test_shift_by_length_is_that_of_flux_dev(tokens, mu):
    times = flow.schedule(28, ModelConfig(shift=None).shift_at(tokens))
    assert times.dtype == np.float32 and times.shape == (29,)
    assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
    # at σ = 1/2 the shifted time is the logistic of mu
    np.testing.assert_allclose(times[14], 1 / (1 + np.exp(-mu)), rtol=1e-6)
    sigma = np.linspace(1, 0, 29)[1:-1]
    shifted = np.exp(mu) / (np.exp(mu) + (1 / sigma - 1))
    np.testing.assert_allclose(times[1:-1], shifted, rtol=1e-6)


def test_shift_by_a_factor():
    t = np.linspace(0, 1, 11)
    shifted = flow.shift(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    # signal to noise (1 − t) / t falls by the factor
    np.testing.assert_allclose(1 / shifted[1:] - 1, (1 / t[1:] - 1) / 3, atol=1e-12)
    np.testing.assert_array_equal(flow.shift(t, 1.0), t)
    np.testing.assert_allclose(flow.schedule(10, 3.0), shifted[::-1], rtol=1e-6)


def test_pack_has_bfl_layout_and_unpack_undoes_it():
    image = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    tokens = np.asarray(flow.pack(jnp.asarray(image)))
    channels_first = rearrange(image, "b h w c -> b c h w")
    bfl = rearrange(channels_first, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)
    np.testing.assert_array_equal(tokens, bfl)
    # by hand: token (row 1, column 2), channel 1, lower left pixel
    assert tokens[0, 1 * 3 + 2, 1 * 4 + 1 * 2 + 0] == image[0, 3, 4, 1]
    np.testing.assert_array_equal(flow.unpack(jnp.asarray(tokens), 4, 6), image)


def test_pack_with_a_larger_patch():
    image = jnp.asarray(generator().normal(size=(1, 8, 12, 3)), jnp.float32)
    assert flow.pack(image, 4).shape == (1, 6, 48)
    np.testing.assert_array_equal(flow.unpack(flow.pack(image, 4), 8, 12, 4), image)


def test_positions():
    ids = flow.image_ids(2, 3)
    assert ids.dtype == jnp.float32
    rows_columns = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    np.testing.assert_array_equal(ids[0], rows_columns)
    np.testing.assert_array_equal(flow.text_ids(2), np.zeros((1, 2, 3)))
