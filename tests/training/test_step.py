"""A step of a distillation: in parts it is what it is at once, whatever the losses are."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from d2m_jax import hosts
from d2m_jax.config import LossConfig, MeshConfig, OptimizerConfig, StackConfig, StageConfig
from d2m_jax.distillation.stages import distill_loss
from d2m_jax.sharding import make_mesh, put_parameters
from d2m_jax.training.step import Step
from tests.distillation import test_stages as small
from tests.models import toy

# All losses, each heavy enough to show: experts, blocks of groups, features.
SINGLE = {"single": (StackConfig(1, blocks=2, active=1, ffn="moe"),)}
TEACHER = replace(
    small.TEACHER, transformer=replace(small.BODY, single=(StackConfig(1, blocks=2, active=2),))
)
STUDENT = replace(small.STUDENT, transformer=replace(small.STUDENT.transformer, **SINGLE))
LOSS = LossConfig(output=1.0, feature=1.0, balance=0.5, block_balance=0.5)
STEPS = 3


@functools.cache
def train(accumulate, loss=LOSS, judge=True, **fields):
    """State and metrics after a few steps on batches of 8, and of an evaluation where asked to.

    Experts are computed in the plain way: another one is no part of this.
    """
    optimizer = OptimizerConfig(warmup=0, accumulate=accumulate, clip=0.0)
    stage = StageConfig(
        steps=10, batch_size=8, loss=loss, optimizer=optimizer, remat=False, **fields
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trees = toy.params(STUDENT.transformer, 2), toy.params(TEACHER.transformer, 1)
    params, constants = put_parameters(mesh, trees)
    objective = distill_loss(TEACHER, STUDENT, stage)
    step = Step(stage, objective, params, constants, mesh)
    state, found = step.start(params), []
    with jax.set_mesh(mesh), toy.computed_by("reference"):
        program, key = step.train(), jax.random.key(3)
        for _ in range(STEPS):
            state, metrics = program(
                state, step.frozen, constants, small.batch(8), key, hosts.flags(mesh, 0)
            )
            found.append(jax.device_get(metrics))
        arguments = state["trainable"], step.frozen, constants, small.batch(8), key
        judged = step.evaluate()(*arguments) if judge else None
    return jax.device_get((state, found, judged))


@pytest.mark.parametrize("fields", [{}, {"random_top_k": (0, 1, 4)}], ids=str)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(fields):
    whole, parts = train(1, **fields), train(4, **fields)
    # Adam's first moments are the gradients; metrics are those of the whole batch.
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(parts), strict=True
    ):
        if "dead_experts" in jax.tree_util.keystr(path):  # counted, whatever rounding says
            continue
        error = np.abs(a - b).max() / max(1e-3, np.abs(a).max())
        assert error < 2e-4, f"{jax.tree_util.keystr(path)}: {error}"
    assert whole[1][-1]["feature"].shape == (2,)
    assert whole[1][-1]["balance"] > 1 and whole[1][-1]["block_balance"] > 0.9


def test_every_loss_moves_the_gradient_from_the_second_step_on():
    """Losses are weighed by what earlier steps saw, so the first knows the output alone."""
    norms = {
        name: [step["gradient_norm"] for step in train(1, replace(LOSS, **{name: 0.0}), False)[1]]
        for name in ("feature", "balance", "block_balance")
    }
    whole = [step["gradient_norm"] for step in train(1)[1]]
    for name, found in norms.items():
        assert found[0] == pytest.approx(whole[0], rel=1e-5), name
        assert abs(found[1] - whole[1]) > 1e-4 * whole[1], name
