"""Lockstep against both models run apart, block by block, without scan and without remat."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import ConfigError, StackConfig
from d2m_jax.distillation.lockstep import check_aligned, lockstep
from d2m_jax.distillation.losses import feature_weights, mean_square, routing, routing_means
from d2m_jax.models.flux import join, model_of
from tests.models import toy

GROUPS = (StackConfig(1), StackConfig(2, 2, 2))
TEACHER = replace(toy.DENSE, single=GROUPS)
STUDENT = replace(
    toy.SPARSE,
    single=(StackConfig(1, ffn="moe"), StackConfig(2, 2, 1, ffn="moe")),
)


def total(velocities, layers, report):
    """All losses at once."""
    output = mean_square(*velocities)
    weights = feature_weights(output, layers["feature"], jnp.sqrt(layers["square"]))
    means = routing_means(report)
    experts, blocks, _ = routing(means, jax.lax.stop_gradient(means))
    return output + (weights * layers["feature"]).sum() + 0.1 * experts + 0.1 * blocks


def in_lockstep(teacher, student, *, student_config=STUDENT, remat=True):
    models = model_of(TEACHER, teacher), model_of(student_config, student)
    starts = [model.embed(*toy.inputs()) for model in models]
    return lockstep(*models, *starts, remat=remat)


def apart(config, params):
    """One model, a Python loop over groups: its velocity, the streams after each, its report."""
    model = model_of(config, params)
    streams, context = model.embed(*toy.inputs())
    features, report = [], {"double": [], "single": []}
    for kind in report:
        streams = join(streams) if kind == "single" else streams
        for stack in getattr(model, kind):
            graphs, parameters = stack.split()
            groups = []
            for i in range(stack.config.groups):
                mine = jax.tree.map(lambda a, i=i: a[i], parameters)
                streams, of_group = stack.run_group(graphs, mine, streams, context)
                features.append(jnp.concatenate(streams, axis=1))
                groups.append(of_group)
            report[kind].append(jax.tree.map(lambda *a: jnp.stack(a), *groups))
    return model.final(streams, context), features, report


def plain(teacher, student, student_config=STUDENT):
    """The same losses from features that are kept."""
    t_velocity, t_features, _ = apart(TEACHER, teacher)
    s_velocity, s_features, report = apart(student_config, student)
    layers = {
        "feature": jnp.stack(
            [jnp.square(t - s).mean() for t, s in zip(t_features, s_features, strict=True)]
        ),
        "square": jnp.stack([jnp.square(t).mean() for t in t_features]),
    }
    return (t_velocity, s_velocity), layers, report


@pytest.fixture(scope="module")
def params():
    return toy.params(TEACHER, 1), toy.params(STUDENT, 2)


@pytest.fixture(scope="module")
def expected(params):
    """Values and gradients of the plain way."""

    def loss(teacher, student):
        velocities, layers, report = plain(teacher, student)
        return total(velocities, layers, report), (velocities, layers)

    (value, rest), gradient = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))(*params)
    return value, rest, gradient


@pytest.mark.parametrize("remat", [True, False])
def test_lockstep_is_both_models_apart(remat, params, expected):
    def loss(teacher, student):
        *velocities, layers, report = in_lockstep(teacher, student, remat=remat)
        return total(velocities, layers, report), (tuple(velocities), layers)

    (value, rest), (of_teacher, of_student) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(*params)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    assert rest[1]["feature"].shape == (4,)  # one double, one single, two groups of two
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), rest, expected[1]
    )
    # the teacher learns nothing, the student as much as without scan and remat
    for path, a in jax.tree_util.tree_leaves_with_path(of_teacher):
        assert not a.any(), jax.tree_util.keystr(path)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(of_student), jax.tree.leaves(expected[2]), strict=True
    ):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3)
        assert error < 1e-4, jax.tree_util.keystr(path)
    assert all(a.any() for a in jax.tree.leaves(of_student))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(params):
    teacher = params[0]

    def loss(student):
        *velocities, layers, _ = in_lockstep(teacher, student, student_config=TEACHER)
        return mean_square(*velocities) + layers["feature"].sum(), layers

    (value, layers), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(teacher)
    assert value < 1e-8 and (layers["square"] > 0.01).all()
    assert max(float(jnp.abs(a).max()) for a in jax.tree.leaves(gradient)) < 1e-3


def test_blocks_that_stand_for_others_meet_the_last_of_them(params):
    """A student of three single blocks in one stack: the first is compared with the teacher's
    first, each of the others with two."""
    shallow, teacher = replace(toy.DENSE, single=(StackConfig(3),)), params[0]

    def loss(student, of):
        velocities, layers, report = of(teacher, student, student_config=shallow)
        return total(velocities, layers, report), layers

    def scanned(*arguments, **named):
        *velocities, layers, report = in_lockstep(*arguments, **named)
        return velocities, layers, report

    both = [
        jax.jit(jax.value_and_grad(partial(loss, of=of), has_aux=True))(toy.params(shallow, 3))
        for of in (scanned, plain)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *both)
    (_, layers), gradient = both[0]
    assert layers["feature"].shape == (4,) and all(a.any() for a in jax.tree.leaves(gradient))


def test_features_can_be_left_out(params):
    models = model_of(TEACHER, params[0]), model_of(STUDENT, params[1])
    starts = [model.embed(*toy.inputs()) for model in models]
    layers = jax.eval_shape(lambda: lockstep(*models, *starts, features=False)[2])
    assert layers == {}


def test_bodies_must_align():
    check_aligned(TEACHER, STUDENT)
    with pytest.raises(ConfigError) as error:
        check_aligned(TEACHER, replace(STUDENT, single=(StackConfig(5),)))
    message = str(error.value)
    assert "single" in message and "[1, 2]" in message and "[5]" in message
    assert "\n" not in message
