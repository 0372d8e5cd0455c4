"""What leaving out a block costs, and routers fitted to it: against blocks run by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import flow
from d2m_jax.config import (
    ConfigError,
    FluxConfig,
    GroupsConfig,
    ModelConfig,
    SparsifyConfig,
    StackConfig,
)
from d2m_jax.keys import named_key
from d2m_jax.models.flux import abstract, join, model_of
from d2m_jax.models.mob import BlockRouter, layer_pool
from d2m_jax.sparsification import left_out, make_student
from d2m_jax.sparsification.groups import align, grouped, one_by_one, regroup
from d2m_jax.sparsification.left_out import leave_out
from d2m_jax.sparsification.routers import (
    blocks_in_groups,
    fit_router,
    fit_routers,
    groups_of,
    with_routers,
)
from tests.seed import generator

KEY = jax.random.key(7)
GROUPS = GroupsConfig(keep_double=2, keep_single=1, keep_last_single=1, single_blocks=2)


def by_hand(small, gone):
    """The velocity without that block, and the pooled streams before every block."""
    inputs, _ = small.noisy(small.batches(1)[0], jax.random.fold_in(KEY, 0))
    model, pooled = model_of(small.config, jax.tree.map(jnp.asarray, small.params)), {}
    streams, context = model.embed(*inputs)
    for kind in ("double", "single"):
        streams = join(streams) if kind == "single" else streams
        (stack,) = getattr(model, kind)
        graphs, parameters = stack.split()
        for i in range(stack.config.depth):
            pooled[kind, i] = layer_pool(streams, context.text_tokens)
            if (kind, i) != gone:
                mine = jax.tree.map(lambda a, i=i: a[i], parameters)
                streams, _ = stack.run_group(graphs, mine, streams, context)
    return model.final(streams, context), pooled


def measured(small, config=None, params=None, **options):
    config, params = config or small.config, small.params if params is None else params
    return leave_out(config, params, small.batches(4), small.noisy, KEY, **{"count": 1} | options)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_costs_are_those_of_running_without_the_block(small, micro_batch):
    found = measured(small, micro_batch=micro_batch)
    assert list(found.costs) == [("double", 0), ("double", 1), *(("single", i) for i in range(4))]
    full, pooled = by_hand(small, None)
    for block in found.costs:
        without = jnp.square(by_hand(small, block)[0] - full).mean((1, 2))
        np.testing.assert_allclose(found.costs[block], without, rtol=1e-3)  # sums in float32
        np.testing.assert_allclose(found.pooled[block], pooled[block], atol=1e-4)
    assert found.vec.shape == (8, small.config.hidden_size)


def test_costs_do_not_depend_on_stacks(small):
    stacks = {"double": [(1, 1), (1, 1)], "single": [(1, 1), (1, 3)]}
    config, params = align(small.config, small.params, stacks)
    apart, there = measured(small, config, params), measured(small)
    for block in there.costs:
        np.testing.assert_allclose(apart.costs[block], there.costs[block], rtol=1e-3)
    some = measured(small, blocks=(("single", 2), ("double", 1)))
    assert list(some.costs) == [("single", 2), ("double", 1)]
    np.testing.assert_allclose(some.costs["single", 2], there.costs["single", 2], rtol=1e-3)
    with pytest.raises(ConfigError, match="expected 9 batches to measure them on, found 4"):
        measured(small, count=9)


def test_a_router_is_the_ridge_regression(small):
    """Against the same least squares by an independent solver, with the penalty as rows."""
    rng = generator()
    pooled, vec = rng.standard_normal((40, 6)), rng.standard_normal((40, 3))
    costs = np.exp(rng.standard_normal((40, 2)) + pooled[:, :2])
    router = fit_router(pooled, vec, costs, alpha=0.3)

    read = np.concatenate([0.3 * pooled, 0.7 * vec], axis=1)
    wanted = np.log(costs) - np.log(costs).mean(1, keepdims=True)
    x, y = read - read.mean(0), wanted - wanted.mean(0)
    penalty = np.sqrt((x * x).sum() / len(x)) * np.eye(9)
    rows, values = np.concatenate([x, penalty]), np.concatenate([y, np.zeros((9, 2))])
    solved = np.linalg.lstsq(rows, values, rcond=None)[0]
    logits = x @ solved + wanted.mean(0)

    found = 0.3 * (pooled @ router["features"]["kernel"] + router["features"]["bias"])
    found += 0.7 * vec @ router["vec"]["kernel"]
    np.testing.assert_allclose(found, logits, atol=1e-5)
    for alpha in (0.0, 1.0):  # of which a part of the router is not read
        router = fit_router(pooled, vec, costs, alpha)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(router))


def test_routers_choose_the_block_that_is_missed(small):
    """One of a group's blocks is damped, in the second group the first: the other one runs."""
    params = jax.tree.map(np.array, small.params)
    for block in (1, 2):
        for leaf in params["single"][0]["block"]["modulation"]["lin"].values():
            leaf[block] *= 0.01
    groups = GroupsConfig(keep_double=2, single_blocks=2)
    config, grouped_params = regroup(small.config, params, groups, seed=0)
    assert list(groups_of(config)) == [
        ("single", 0, 0, (("single", 0), ("single", 1))),
        ("single", 0, 1, (("single", 2), ("single", 3))),
    ]
    found = measured(small, params=params, count=4, blocks=blocks_in_groups(config))
    fitted = with_routers(grouped_params, fit_routers(config, found))
    like = jax.tree.map(np.shape, grouped_params)
    assert jax.tree.map(np.shape, fitted) == like
    inputs, _ = small.noisy(small.batches(4)[3], jax.random.key(1))
    model = model_of(config, jax.tree.map(jnp.asarray, fitted))
    _, report = model.run(*model.embed(*inputs))
    used = report["single"][0].choice.used
    np.testing.assert_array_equal(used[0], np.tile([1.0, 0.0], (8, 1)))
    np.testing.assert_array_equal(used[1], np.tile([0.0, 1.0], (8, 1)))


def test_costs_of_flux(small):
    """Shapes at full size: 44 of 57 blocks in groups, 4,608 tokens, a sample at a time."""
    flux, groups = FluxConfig(), GroupsConfig(5, 0, 2, 1, 8, 0, 2, 1)
    blocks = blocks_in_groups(grouped(flux, groups))
    batch = {"image": (4096, 64), "words": (512, 4096), "y": (768,)}
    batch = {name: jax.ShapeDtypeStruct((4, *shape), jnp.float32) for name, shape in batch.items()}

    def noisy(batch, key):
        t, ids = jnp.zeros(4), flow.image_ids(64, 64)
        return (batch["image"], ids, batch["words"], flow.text_ids(512), t, batch["y"], t), None

    apart = one_by_one(flux)
    asked = abstract(apart), batch, jax.eval_shape(lambda: jax.random.key(0))
    found = jax.eval_shape(lambda *a: left_out.measure(*a, apart, noisy, blocks, 4), *asked)
    assert [a.shape for a in found] == [(4, 44), (4, 57, 6144), (4, 3072), (4,)]


def test_groups_in_the_middle(small):
    config, params = regroup(small.config, small.params, GROUPS, seed=0)
    assert config.single == (StackConfig(1), StackConfig(1, 2, 1), StackConfig(1))
    assert blocks_in_groups(config) == (("single", 1), ("single", 2))
    for stack, mine in ((0, [0]), (1, [1, 2]), (2, [3])):
        new = params["single"][stack]["block"]["qkv"]["kernel"]
        old = small.params["single"][0]["block"]["qkv"]["kernel"][mine]
        np.testing.assert_array_equal(new, old.reshape(new.shape))
    assert isinstance(model_of(config, params).single[1].router, BlockRouter)
    with pytest.raises(ConfigError, match="keep_last_single = 4: expected 0 to 3"):
        regroup(small.config, small.params, replace(GROUPS, keep_last_single=4), seed=0)
    with pytest.raises(ConfigError, match="expected a divisor of 1"):
        regroup(small.config, small.params, replace(GROUPS, keep_last_single=2), seed=0)


def test_blocks_that_cost_most_stay(small):
    sparsify = SparsifyConfig(method="none", depth_single=2, depth_choice="cost", batches=2)
    teacher = ModelConfig(transformer=small.config)
    made = make_student(teacher, small.params, sparsify, small.batches(4), small.noisy, 0)
    costs = leave_out(
        small.config, small.params, small.batches(4), small.noisy, named_key(0, "depth"), count=2
    ).means["single"]
    assert made[2]["single.blocks"][:2].tolist() == sorted(np.argsort(-costs)[:2].tolist())
