"""Errors at fixed times: against the model called by hand, and through the program of a stage."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import MeshConfig, OptimizerConfig, StageConfig
from d2m_jax.distillation.fixed_times import OFFSETS, fixed_times, metrics
from d2m_jax.distillation.stages import distill_loss
from d2m_jax.models.flux import model_of
from d2m_jax.sharding import make_mesh, put_whole
from d2m_jax.training.step import Step
from tests.distillation.test_stages import STUDENT, TEACHER, batch
from tests.models import toy

KEY = jax.random.key(7)


@partial(jax.jit, static_argnums=0)
def velocity(config, params, *inputs):
    return model_of(config, params)(*inputs)


def by_hand(config, params, made, noise, times):
    """The velocity, one example at a time; on the straight line from data to noise."""
    model, found = partial(velocity, config.transformer, params), []
    for i, t in enumerate(times):
        data = made["latents"][i : i + 1].reshape(1, 12, 12)
        x = (1 - t) * data + t * noise[i : i + 1]
        rows, columns = np.mgrid[:3, :4]
        ids = np.stack([0 * rows, rows, columns], -1).reshape(1, 12, 3).astype(np.float32)
        text = made["txt"][i : i + 1], np.zeros((1, 3, 3), np.float32)
        at = np.float32([t]), made["y"][i : i + 1], np.float32([config.guidance])
        found.append(
            model(x, jnp.asarray(ids), text[0], jnp.asarray(text[1]), *map(jnp.asarray, at))
        )
    return np.concatenate(found)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_errors_by_time(accumulate):
    teacher, student = toy.params(TEACHER.transformer, 1), toy.params(STUDENT.transformer, 2)
    stage = StageConfig(optimizer=OptimizerConfig(accumulate=accumulate))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step = Step(stage, distill_loss(TEACHER, STUDENT, stage), student, teacher, mesh)
    fixed = fixed_times(STUDENT, stage, TEACHER)
    measure = step.at_fixed_times(fixed)
    state, made = step.start(student), [batch(8), batch(8)]
    made[1] = {name: a[::-1] for name, a in made[1].items()}
    for name, offset in OFFSETS.items():
        total, flow, distillation = None, np.zeros(8), np.zeros(8)
        for number, one in enumerate(made):
            first = put_whole(mesh, np.int32(8 * number))
            arguments = one, KEY, first, np.float32(offset)
            sums = measure(state["trainable"], step.frozen, teacher, *arguments)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            noise = jax.random.normal(KEY, (8, 12, 12))
            times = (np.arange(8) + offset) / 8
            mine = by_hand(STUDENT, student, one, noise, times)
            target = noise - one["latents"].reshape(8, 12, 12)
            flow += np.square(mine - target).mean((1, 2)) / 2
            wanted = by_hand(TEACHER, teacher, one, noise, times)
            distillation += np.square(mine - wanted).mean((1, 2)) / 2
        found = metrics(name, jax.device_get(total))
        for kind, expected in (("flow", flow), ("distillation", distillation)):
            np.testing.assert_allclose(found[f"validation_{kind}_at_{name}"], expected, rtol=1e-3)
            mean = found[f"validation_{kind}_{name}"]
            assert mean == pytest.approx(expected.mean(), rel=1e-3)
        assert len(found) == 4


def test_a_batch_may_state_its_times():
    fixed = fixed_times(TEACHER, StageConfig(), None)
    assert fixed.kinds == ("flow",)
    made = batch() | {"eighth": jnp.array([5, 5, 0, 1])}
    drawn = fixed.draw(made, KEY, jnp.int32(3), jnp.float32(0.5))
    np.testing.assert_allclose(drawn["time"], np.array([5.5, 5.5, 0.5, 1.5]) / 8)
    sums = jax.jit(fixed.sums)(toy.params(TEACHER.transformer, 1), (), drawn)
    np.testing.assert_array_equal(sums["count"], [1, 1, 0, 0, 0, 2, 0, 0])
    found = metrics("half_eighths", jax.device_get(sums))
    assert set(found) == {"validation_flow_half_eighths"}  # no list, for five times have none
    means = np.asarray(sums["flow"])[[0, 1, 5]] / [1, 1, 2]
    assert found["validation_flow_half_eighths"] == pytest.approx(means.mean(), rel=1e-6)
    # The points of a path are not asked: the time is a fixed one.
    on_path = fixed.draw(
        made | {"noisy": made["latents"], "guidance": jnp.ones(4)},
        KEY,
        jnp.int32(0),
        jnp.float32(0),
    )
    assert "noisy" not in on_path and set(np.asarray(on_path["guidance"])) == {TEACHER.guidance}


def test_the_times_follow_from_the_numbers_of_examples():
    fixed = fixed_times(TEACHER, StageConfig(), TEACHER)
    drawn = fixed.draw(batch(), KEY, jnp.int32(6), jnp.float32(0.0))
    np.testing.assert_allclose(drawn["time"], np.array([6, 7, 0, 1]) / 8)
    config = replace(TEACHER, shift=3.0)  # is not asked
    again = fixed_times(config, StageConfig(), None).draw(
        batch(), KEY, jnp.int32(6), jnp.float32(0)
    )
    np.testing.assert_array_equal(again["time"], drawn["time"])
