"""Students of fewer blocks, against the teacher's blocks run one by one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import ConfigError, GroupsConfig, ModelConfig, SparsifyConfig, StackConfig
from d2m_jax.keys import named_key
from d2m_jax.models.cut import BLOCKS, check_cut
from d2m_jax.models.flux import initialise, join, model_of
from d2m_jax.sparsification import make_student
from d2m_jax.sparsification.depth import even, meeting, shallower
from d2m_jax.sparsification.groups import grouped, shapes
from tests.sparsification.conftest import CONFIG

SMALL = SparsifyConfig(batches=2, batch_size=8, tokens=64)
DEPTH = replace(SMALL, method="none", depth_double=1, depth_single=2)
EVEN = replace(DEPTH, depth_choice="even")


def make(small, sparsify, params=None):
    params = small.params if params is None else params
    teacher = ModelConfig(transformer=small.config)
    made = make_student(teacher, params, sparsify, small.batches(4), small.noisy, 0)
    return made[0].transformer, *made[1:]


def one_by_one(small, blocks, key, batch=0):
    """The teacher's velocity through these blocks alone, and the mean squares that they add."""
    inputs, _ = small.noisy(small.batches(4)[batch], key)
    model, added = model_of(small.config, jax.tree.map(jnp.asarray, small.params)), {}
    streams, context = model.embed(*inputs)
    for kind in ("double", "single"):
        streams = join(streams) if kind == "single" else streams
        (stack,) = getattr(model, kind)
        graphs, parameters = stack.split()
        added[kind] = []
        for i in blocks[kind]:
            mine = jax.tree.map(lambda a, i=i: a[i], parameters)
            old, (streams, _) = streams, stack.run_group(graphs, mine, streams, context)
            both = (jnp.concatenate(some, axis=1) for some in (old, streams))
            added[kind].append(float(jnp.square(jnp.subtract(*both)).mean()))
    return model.final(streams, context), added


def test_the_student_is_the_teacher_without_those_blocks(small):
    config, params, cut = make(small, EVEN)
    assert (config.double, config.single) == ((StackConfig(1),), (StackConfig(2),))
    assert {name: order.tolist() for name, order in cut.items()} == {
        "double.blocks": [0, 1],
        "single.blocks": [0, 2, 1, 3],
    }
    check_cut("here", config, cut)
    wanted = one_by_one(small, {"double": [0], "single": [0, 2]}, jax.random.key(5))[0]
    np.testing.assert_allclose(small.velocity(config, params), wanted, atol=1e-5)


def test_blocks_that_change_most_stay(small):
    """Gates of one single block are damped, so that it adds the least; the others are measured."""
    params = jax.tree.map(np.array, small.params)
    params["single"][0]["block"]["modulation"]["lin"]["kernel"][1] *= 0.01
    params["single"][0]["block"]["modulation"]["lin"]["bias"][1] *= 0.01
    damped = type(small)(**{**vars(small), "params": params})
    _, _, cut = make(damped, replace(DEPTH, depth_single=3, depth_double=2))
    assert cut["single.blocks"].tolist() == [0, 2, 3, 1]

    everything, sums = {"double": [0, 1], "single": [0, 1, 2, 3]}, np.zeros(4)
    for i in range(2):
        key = jax.random.fold_in(named_key(0, "depth"), i)
        sums += one_by_one(small, everything, key, i)[1]["single"]
    _, _, cut = make(small, DEPTH)
    assert sorted(cut["single.blocks"][:2].tolist()) == sorted(np.argsort(-sums)[:2].tolist())


@pytest.mark.parametrize("method", ["moe", "prune"])
def test_what_is_left_can_be_cut_in_width_too(small, method):
    cheap = replace(EVEN, method=method, dense_single=(1,), gate="random", deal="rank")
    config, params, cut = make(small, cheap)
    assert [s.depth for s in config.single] == [1, 1]
    assert config.single[1] == StackConfig(1)
    wanted = jax.eval_shape(lambda: initialise(config, 0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
    assert np.isfinite(small.velocity(config, params)).all()
    check_cut("here", config, cut)
    assert {"double.0.img_mlp", "double.0.txt_mlp", "single.0.mlp", *BLOCKS.values()} == set(cut)


def test_even_stretches():
    assert even(19, 8).tolist() == [0, 2, 4, 7, 9, 11, 14, 16]
    assert even(38, 10)[-1] == 34 and even(4, 4).tolist() == [0, 1, 2, 3]


def test_a_teacher_meets_a_shallow_student_group_by_group():
    teacher = replace(CONFIG, double=(StackConfig(5),), single=(StackConfig(8),))
    student = replace(CONFIG, double=(StackConfig(3),), single=(StackConfig(4),))
    cut = {
        "double.blocks": np.array([0, 1, 4, 2, 3], np.int32),
        "single.blocks": np.array([1, 2, 4, 6, 0, 3, 5, 7], np.int32),
    }
    met = meeting(teacher, student, cut)
    # Blocks 0, 1 to 3, 4; and 0 and 1, 2 and 3, 4 and 5, 6 and 7.
    assert shapes(met) == {"double": [(1, 1), (1, 3), (1, 1)], "single": [(4, 2)]}
    groups = GroupsConfig(keep_double=3, keep_single=2, single_blocks=2)
    in_groups = grouped(student, groups)
    assert shapes(meeting(teacher, in_groups, cut))["single"] == [(2, 2), (1, 4)]
    # Unknown, it is taken to be even: 0 and 1, 2 and 3, …
    assert shapes(meeting(teacher, student))["double"] == [(1, 1), (2, 2)]
    # A teacher that has lost blocks itself: of 0 to 9 it has the even ones.
    lost = {"double.blocks": np.array([0, 2, 4, 6, 8, 1, 3, 5, 7, 9], np.int32)}
    mine = {"double.blocks": np.array([0, 2, 8, 1, 3, 4, 5, 6, 7, 9], np.int32)}
    assert shapes(meeting(teacher, student, mine, lost))["double"] == [(1, 1), (1, 3), (1, 1)]
    with pytest.raises(ConfigError, match="has 5 double blocks, expected at most 3, the"):
        meeting(student, teacher)


def test_more_blocks_than_there_are(small):
    with pytest.raises(ConfigError, match=r"SparsifyConfig.depth_single = 5: expected 1 to 4, the"):
        shallower(small.config, replace(DEPTH, depth_single=5))
    with pytest.raises(ConfigError, match=r"dense_single = \(2,\): expected indices below 2"):
        make(small, replace(EVEN, method="moe", dense_single=(2,)))
