from dataclasses import replace

import jax
import numpy as np
import pytest

from d2m_jax.config import ConfigError, GroupsConfig, StackConfig
from d2m_jax.models.flux import initialise
from d2m_jax.sparsification.groups import align, regroup, shapes


def test_all_blocks_active_is_the_dense_body(small):
    groups = GroupsConfig(
        double_blocks=2, double_active=2, keep_single=1, single_blocks=3, single_active=3
    )
    config, params = regroup(small.config, small.params, groups, seed=0)
    assert config.double == (StackConfig(1, 2, 2),)
    assert config.single == (StackConfig(1), StackConfig(1, 3, 3))
    dense = small.velocity(small.config, small.params)
    np.testing.assert_allclose(small.velocity(config, params), dense, atol=1e-5)


def test_groups_keep_every_block_and_get_fresh_routers(small):
    groups = GroupsConfig(keep_double=1, keep_single=0, single_blocks=2, single_active=1)
    config, params = regroup(small.config, small.params, groups, seed=3)
    # keep_double with groups of one block leaves one stack
    assert shapes(config) == {"double": [(2, 1)], "single": [(2, 2)]}
    assert params["double"][0]["block"] is small.params["double"][0]["block"]
    for new, old in zip(
        jax.tree.leaves(params["single"][0]["block"]),
        jax.tree.leaves(small.params["single"][0]["block"]),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old.reshape(new.shape))
    assert config.mob_choice == "any"
    assert regroup(small.config, small.params, replace(groups, choice="adjacent"), seed=3)[
        0
    ] == replace(config, mob_choice="adjacent")
    wanted = jax.eval_shape(lambda: initialise(config, 0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)

    router = params["single"][0]["router"]["vec"]["kernel"]
    again = regroup(small.config, small.params, groups, seed=3)[1]["single"][0]["router"]
    other = regroup(small.config, small.params, groups, seed=4)[1]["single"][0]["router"]
    np.testing.assert_array_equal(router, again["vec"]["kernel"])
    assert np.abs(router - other["vec"]["kernel"]).max() > 1e-3
    assert np.abs(router[0] - router[1]).max() > 1e-3, "groups share a router"
    assert np.isfinite(small.velocity(config, params)).all()


def test_teacher_meets_its_student_exactly(small):
    """Stacks that cut across the old ones and join them, there and back."""
    cut = {"double": [(1, 1), (1, 1)], "single": [(1, 1), (1, 3)]}
    config, params = align(small.config, small.params, cut)
    assert shapes(config) == cut and not any(stack.mixes for stack in config.stacks)
    dense = small.velocity(small.config, small.params)
    np.testing.assert_allclose(small.velocity(config, params), dense, atol=1e-5)
    config, params = align(config, params, {"double": [(1, 2)], "single": [(2, 2)]})
    np.testing.assert_allclose(small.velocity(config, params), dense, atol=1e-5)
    config, params = align(config, params, shapes(small.config))
    assert config == small.config
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize(
    "groups, field",
    [
        (GroupsConfig(keep_double=3), "keep_double = 3: expected 0 to 2"),
        (GroupsConfig(keep_single=1), "single_blocks = 2: expected a divisor of 3"),
        (GroupsConfig(single_blocks=0), "single_blocks = 0"),
        (GroupsConfig(single_active=3), "single_active = 3: expected 1 to single_blocks = 2"),
    ],
)
def test_groups_that_do_not_fit(small, groups, field):
    with pytest.raises(ConfigError, match=field) as error:
        regroup(small.config, small.params, groups, seed=0)
    assert "\n" not in str(error.value)


def test_groups_do_not_mix_dense_and_moe(small):
    config, params = align(
        small.config, small.params, {"double": [(2, 1)], "single": [(1, 1), (3, 1)]}
    )
    config = replace(config, single=(config.single[0], replace(config.single[1], ffn="moe")))
    with pytest.raises(ConfigError, match="single blocks 0 to 1 .* different FFNs"):
        regroup(config, params, GroupsConfig(), seed=0)


def test_align_refuses_what_it_cannot_keep(small):
    with pytest.raises(ConfigError, match="has 4 single blocks, expected 3"):
        align(small.config, small.params, {"double": [(2, 1)], "single": [(3, 1)]})
    config, params = regroup(small.config, small.params, GroupsConfig(), seed=0)
    with pytest.raises(ConfigError, match="blocks all run"):
        align(config, params, shapes(small.config))
