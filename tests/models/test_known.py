"""What blocks are given instead of computing it: modulations, and an earlier step's experts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import StackConfig
from d2m_jax.models import flux, parameters
from tests.models import toy
from tests.models.oracle import operations

SPARSE = replace(toy.SPARSE, modulation_rank=8)
BLOCKS = replace(
    SPARSE,
    double=(StackConfig(1, blocks=2, ffn="moe"),),
    single=(StackConfig(2, blocks=3, active=2, ffn="moe"), StackConfig(1)),
)
INPUTS = toy.inputs()
TIMES = jnp.stack([INPUTS[4], 0.5 * INPUTS[4]])  # an earlier step and a later one


def velocity(config):
    """Of (params, step, known …): the velocity and what a later step can use again."""

    def call(params, step, *known):
        model = flux.model_of(config, params)
        inputs = *INPUTS[:4], TIMES[step], *INPUTS[5:]
        v, report = model.run(*model.embed(*inputs, keep_routed=True), *known)
        return v, flux.known_of(report)

    return jax.jit(call, static_argnums=1)


@pytest.fixture(scope="module", params=[SPARSE, BLOCKS], ids=["MoE", "MoB"])
def model(request):
    return velocity(request.param), toy.params(request.param), request.param


def others(params, name):
    """Parameters with other numbers wherever `name` is in the path."""

    def change(path, a):
        found = f"'{name}'" in jax.tree_util.keystr(path)
        return a[..., ::-1] * 3 + 1 if found else a

    return jax.tree_util.tree_map_with_path(change, params)


def test_modulations_of_all_steps_at_once_change_nothing(model):
    """Another order of summation: float32 rounding, through five blocks."""
    call, params, config = model

    def conditions(params):
        model = flux.model_of(config, params)
        of = jax.vmap(lambda t: model.condition(t, INPUTS[5], INPUTS[6])[1])
        return model.modulations(of(TIMES))

    known = jax.jit(conditions)(params)
    for step in (0, 1):
        mine = jax.tree.map(lambda a, step=step: a[step], known)
        v, expected = call(params, step, mine)[0], call(params, step)[0]
        np.testing.assert_allclose(v, expected, atol=1e-4)
    # They are what is used: the layers that would compute them no longer matter.
    changed = others(others(params, "modulation"), "img_mod")
    np.testing.assert_allclose(call(changed, 1, mine)[0], expected, atol=1e-4)
    assert np.abs(call(changed, 1)[0] - expected).max() > 0.01


def test_routed_outputs_of_the_same_step_change_nothing(model):
    call, params, _ = model
    expected, routed = call(params, 0)
    again, kept = call(params, 0, routed)
    np.testing.assert_allclose(again, expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, kept, routed)


def test_a_later_step_adds_what_experts_added_before_without_computing_it(model):
    """Neither experts, gates nor routers of blocks have a say in it."""
    call, params, _ = model
    routed = call(params, 0)[1]
    fresh, reused = call(params, 1)[0], call(params, 1, routed)[0]
    assert np.abs(reused - fresh).max() > 1e-3
    changed = others(others(others(params, "experts"), "gate"), "router")
    np.testing.assert_array_equal(call(changed, 1, routed)[0], reused)
    assert np.abs(call(changed, 1)[0] - fresh).max() > 1e-3
    # nothing is added where nothing is known to have been added
    nothing = jax.tree.map(jnp.zeros_like, routed)
    assert np.abs(call(params, 1, nothing)[0] - reused).max() > 1e-3


def test_blocks_apart_are_those_of_the_stack(model):
    """The loop written out, a Mixture of Blocks as branches: another order of rounding at most."""
    call, params, _ = model
    expected, routed = call(params, 0)
    apart = parameters.unstacked(params)
    attention = apart["single"][0]["block"]["qkv"]["kernel"]
    assert len(attention) == 2 and attention[0][0].ndim == 2
    v, kept = call(apart, 0)
    np.testing.assert_allclose(v, expected, atol=1e-4)
    assert jax.tree.structure(kept) == jax.tree.structure(routed)
    np.testing.assert_allclose(call(apart, 1, routed)[0], call(params, 1, routed)[0], atol=1e-4)


def test_a_program_over_blocks_apart_takes_no_weights_out_of_a_stack():
    config = replace(SPARSE, single=(StackConfig(1, blocks=3, active=1, ffn="moe"),))
    kernel = (config.hidden_size, 3 * config.hidden_size)  # of qkv: no other array has its shape

    def program(params):
        return jax.make_jaxpr(velocity(config), static_argnums=1)(params, 0).jaxpr

    def stacks(jaxpr):
        inputs = [v.aval.shape for e in operations(jaxpr) for v in e.invars]
        return [shape for shape in inputs if shape[-2:] == kernel and len(shape) > 2]

    params = toy.params(config)
    assert stacks(program(params))
    assert not stacks(program(parameters.unstacked(params)))
