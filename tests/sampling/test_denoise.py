"""The denoising loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import flow
from d2m_jax.models.flux import Flux
from d2m_jax.models.reports import FFNReport, GroupReport
from d2m_jax.sampling.denoise import denoise
from tests.seed import generator


class Recorder(Flux, pytree=False):
    """Stands for a model: a velocity of its own, and it shows what it was given."""

    def __init__(self, velocity, adds=False):
        self.velocity, self.adds, self.seen, self.ks = velocity, adds, {}, set()

    def embed(self, img, img_ids, txt, txt_ids, timesteps, y, guidance, top_k, keep_routed):
        self.seen.update(img_ids=img_ids, txt_ids=txt_ids, guidance=guidance)
        self.ks.add(top_k)
        assert timesteps.shape == (img.shape[0],)
        return img, (timesteps[:, None, None], txt, top_k)

    def run(self, img, context, modulations, routed=None):
        """Its only MoE layer adds 1 more than the time, or what it added before."""
        added = context[0] + 1 + img * 0 if routed is None else routed["single"][0].routed["mlp"]
        velocity = self.velocity(img, *context)
        if self.adds:
            velocity = velocity + added
        return velocity, {"double": [], "single": [GroupReport({"mlp": FFNReport(routed=added)})]}

    def condition(self, timesteps, y, guidance):
        return y, y

    def modulations(self, cond):
        return {"double": [], "single": []}


NOISE = jnp.asarray(generator().normal(size=(2, 6, 3)), jnp.float32)
TEXT = jnp.zeros((2, 4, 5)), jnp.zeros((2, 7))


def sample(model, times, **options):
    return denoise(model, NOISE, TEXT, (2, 3), jnp.asarray(times), 3.5, **options)


def test_steps_follow_the_true_velocity_to_the_data():
    """With v = noise − data every schedule ends at the data."""
    data = jnp.full(NOISE.shape, 0.3)
    model = Recorder(lambda x, t, txt, k: NOISE - data)
    for times in ([1.0, 0.0], flow.schedule(5, 3.2)):
        np.testing.assert_allclose(sample(model, times), data, atol=1e-6)


def test_steps_are_euler_s():
    times = np.float32([1.0, 0.7, 0.4, 0.0])
    result = sample(Recorder(lambda x, t, txt, k: x * t), times)
    expected = np.asarray(NOISE)
    for t, t_next in itertools.pairwise(times):
        expected = expected + (t_next - t) * expected * t
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_what_the_model_gets():
    model = Recorder(lambda x, t, txt, k: x)
    sample(model, [1.0, 0.0], top_k=(3,))
    assert model.seen["img_ids"].shape == (1, 6, 3) and model.seen["txt_ids"].shape == (1, 4, 3)
    assert model.seen["guidance"].shape == (2,) and model.ks == {3}
    model = Recorder(lambda x, t, txt, k: x)
    sample(model, [1.0, 0.0])
    assert model.ks == {None}


def test_experts_per_token_follow_the_schedule():
    """Steps are shared out in order: of five steps two have the first number, two the second …"""
    model = Recorder(lambda x, t, txt, k: jnp.full_like(x, k))
    times = np.float32([1.0, 0.9, 0.7, 0.4, 0.3, 0.0])
    result = sample(model, times, top_k=(4, 1, 2))
    moved = np.dot(np.diff(times), [4, 4, 1, 1, 2])
    np.testing.assert_allclose(result, NOISE + moved, rtol=1e-5)
    assert model.ks == {4, 1, 2}


def test_true_guidance_goes_away_from_the_negative_text():
    model = Recorder(lambda x, t, txt, k: x * 0 + txt.mean((1, 2))[:, None, None])
    negative = jnp.full((2, 4, 5), 0.2), TEXT[1]
    result = sample(model, [1.0, 0.5, 0.0], negative=negative, true_cfg=3.0)
    # v = 0.2 + 3 · (0 − 0.2)
    np.testing.assert_allclose(result, NOISE + 0.4, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": (4, 1, 2)}, {"top_k": (3, 1), "reuse": 2}])
def test_times_that_fill_up_change_nothing(options):
    """Not even where they are NaN: steps beyond those asked for are not taken."""
    times = np.float32([1.0, 0.9, 0.7, 0.4, 0.3, 0.0])
    model = Recorder(lambda x, t, txt, k: x * (k or 1) + t, adds=True)
    filled = np.append(times, np.full(3, np.nan, np.float32))
    taken = jax.jit(lambda steps: sample(model, filled, steps=steps, **options))(5)
    # float32 in another order
    np.testing.assert_allclose(taken, sample(model, times, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reuse", "at"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4]), (9, [0] * 5)]
)
def test_what_experts_added_serves_several_steps(reuse, at):
    """`at`: the step at which each of five steps' additions were computed."""
    times = np.float32([1.0, 0.9, 0.7, 0.4, 0.3, 0.0])
    model = Recorder(lambda x, t, txt, k: x * 0, adds=True)
    moved = np.dot(np.diff(times), times[at] + 1)
    np.testing.assert_allclose(sample(model, times, reuse=reuse), NOISE + moved, rtol=1e-5)
