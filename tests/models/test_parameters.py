import jax
import numpy as np
import pytest

from d2m_jax.models.flux import Flux
from d2m_jax.models.parameters import initialise, model_of
from tests.models.toy import SPARSE


def test_models_that_are_gone_hold_no_arrays(no_look_for_cycles):
    """A device would be full of them: Python looks for cycles seldom."""
    before = {id(array) for array in jax.live_arrays()}
    params = initialise(Flux, SPARSE, 7)
    model = model_of(Flux, SPARSE, params)
    np.testing.assert_array_equal(model.img_in.kernel[...], params["img_in"]["kernel"])
    assert repr(model).startswith("Flux: ")
    held = {id(array) for array in jax.live_arrays()}
    assert {id(array) for array in jax.tree.leaves(params)} <= held
    del model, params
    assert {id(array) for array in jax.live_arrays()} <= before


def test_parameters_must_be_those_of_the_model():
    params = initialise(Flux, SPARSE, 7)
    with pytest.raises(KeyError, match="img_in"):
        model_of(Flux, SPARSE, {name: part for name, part in params.items() if name != "img_in"})
    with pytest.raises(ValueError, match="parameters, expected"):
        model_of(Flux, SPARSE, params | {"more": params["img_in"]["kernel"]})
