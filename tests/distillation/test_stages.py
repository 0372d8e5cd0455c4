"""A stage's loss: what enters it, and that its parts add up."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import flow
from d2m_jax.config import (
    ConfigError,
    LossConfig,
    ModelConfig,
    PixelsConfig,
    StackConfig,
    StageConfig,
    WordsConfig,
)
from d2m_jax.distillation import stages
from d2m_jax.encoders import Encoders
from d2m_jax.models.flux import model_of
from tests.models import toy
from tests.models.oracle import operations
from tests.seed import generator

BODY = replace(toy.DENSE, in_channels=12, context_in_dim=16, vec_in_dim=16)
TEACHER = ModelConfig(
    transformer=BODY,
    text=WordsConfig(dim=16, length=3, vocabulary=("red", "blue", "anchor")),
    image=PixelsConfig(height=6, width=8, patch=2),
)
STUDENT = replace(
    TEACHER,
    transformer=replace(
        toy.SPARSE, in_channels=12, context_in_dim=16, vec_in_dim=16, moe=toy.SPARSE.moe
    ),
)


def batch(count=4):
    rng = generator()
    return Encoders(TEACHER).encode(
        {
            "image": jnp.asarray(rng.integers(0, 256, (count, 6, 8, 3)), jnp.uint8),
            "text": jnp.asarray(rng.integers(0, 4, (count, 3)), jnp.int32),
        }
    )


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_times(timesteps):
    t = np.asarray(stages.times(timesteps, jax.random.key(0), 1000))
    assert t.shape == (1000,) and t.min() > 0 and t.max() < 1
    other = np.asarray(stages.times(timesteps, jax.random.key(1), 1000))
    assert not np.array_equal(t, other)
    if timesteps == "uniform":  # one in each thousandth, in any order
        np.testing.assert_array_equal(np.sort((t * 1000).astype(int)), np.arange(1000))
        assert np.abs(np.corrcoef(t, np.arange(1000))[0, 1]) < 0.2
    else:
        assert np.mean(t) == pytest.approx(0.5, abs=0.03)
        assert np.std(np.log(t / (1 - t))) == pytest.approx(1, abs=0.1)


def test_noisy_inputs_lie_on_the_path_to_their_target():
    inputs, target = stages.noisy_inputs(TEACHER, "uniform", batch(), jax.random.key(0))
    x, img_ids, txt, txt_ids, t, _, guidance = inputs
    assert img_ids.shape == (1, 12, 3) and txt_ids.shape == (1, 3, 3) and txt.shape == (4, 3, 16)
    # x_t − t·v is the image itself
    data = batch()["latents"].reshape(4, 12, 12)
    np.testing.assert_allclose(x - t[:, None, None] * target, data, atol=1e-5)
    assert data.min() >= -1 - 1e-6 and data.max() <= 1 + 1e-6
    np.testing.assert_array_equal(guidance, [TEACHER.guidance] * 4)
    again, _ = stages.noisy_inputs(TEACHER, "uniform", batch(), jax.random.key(0))
    np.testing.assert_array_equal(again[0], x)
    shifted = replace(TEACHER, shift=3.0)
    later = stages.noisy_inputs(shifted, "uniform", batch(), jax.random.key(0))[0][4]
    np.testing.assert_allclose(later, flow.shift(t, 3.0), rtol=1e-6)
    without = replace(TEACHER, transformer=replace(BODY, guidance_embed=False))
    assert stages.noisy_inputs(without, "uniform", batch(), jax.random.key(0))[0][6] is None


def test_the_grid_is_the_batch_s():
    """Images of another size than the model's, and place by place the same as encoded."""
    image = generator().integers(0, 256, (2, 4, 10, 3)).astype(np.uint8)
    encoded = Encoders(TEACHER).encode({"image": image, "text": np.zeros((2, 3), np.int32)})
    assert encoded["latents"].shape == (2, 2, 5, 12)
    np.testing.assert_allclose(
        encoded["latents"][1, 1, 3].reshape(3, 2, 2).transpose(1, 2, 0),
        image[1, 2:4, 6:8] / 127.5 - 1,
        atol=1e-6,
    )
    inputs, target = stages.noisy_inputs(TEACHER, "uniform", encoded, jax.random.key(0))
    assert inputs[0].shape == target.shape == (2, 10, 12)
    np.testing.assert_array_equal(inputs[1], flow.image_ids(2, 5))
    assert Encoders(TEACHER).encode(encoded) is encoded


def test_points_of_a_path_are_taken_as_they_are():
    made = batch()
    made |= {"noisy": made["latents"] + 1, "time": jnp.array([0.25, 0.5, 0.75, 1.0])}
    made |= {"guidance": jnp.array([1.0, 2.0, 3.0, 4.0])}
    inputs, target = stages.noisy_inputs(TEACHER, "uniform", made, jax.random.key(0))
    np.testing.assert_array_equal(inputs[0], made["noisy"].reshape(4, 12, 12))
    np.testing.assert_array_equal(inputs[4], made["time"])
    np.testing.assert_array_equal(inputs[6], made["guidance"])
    for i, t in enumerate(made["time"]):  # straight to the data, which lie 1 lower
        np.testing.assert_allclose(target[i], np.full((12, 12), 1 / t), rtol=1e-5)


def test_flow_loss_is_the_error_of_the_velocity():
    loss = stages.flow_loss(TEACHER, StageConfig())
    params, key = toy.params(BODY), jax.random.key(3)
    value, metrics = jax.jit(loss)(params, None, batch(), key)
    inputs, target = stages.noisy_inputs(TEACHER, "uniform", batch(), key)
    velocity = jax.jit(lambda p, *a: model_of(BODY, p)(*a))(params, *inputs)
    assert value == pytest.approx(float(jnp.square(velocity - target).mean()), rel=1e-4)
    np.testing.assert_allclose(target, flow.velocity(*_ends(key)), atol=1e-6)
    assert metrics == {}


def test_guidance_is_drawn_from_its_range():
    def guidance(range_, config=TEACHER, key=0):
        found = stages.with_noise(config, "uniform", range_, batch(64), jax.random.key(key))
        return np.asarray(found["guidance"])

    found = guidance((1.0, 5.0))
    assert found.min() < 1.5 and found.max() > 4.5 and (found >= 1).all() and (found <= 5).all()
    assert np.abs(np.corrcoef(found, np.arange(64))[0, 1]) < 0.4
    assert not np.array_equal(found, guidance((1.0, 5.0), key=1))
    np.testing.assert_array_equal(guidance(None), [TEACHER.guidance] * 64)
    # noise and times are the same as without a range
    key = jax.random.key(0)
    some, others = (stages.with_noise(TEACHER, "uniform", r, batch(4), key) for r in (None, (0, 9)))
    np.testing.assert_array_equal(some["noise"], others["noise"])
    np.testing.assert_array_equal(some["time"], others["time"])


def _ends(key):
    data = batch()["latents"].reshape(4, 12, 12)
    return data, jax.random.normal(jax.random.split(key)[0], data.shape)


def test_distill_loss_is_the_sum_of_its_parts():
    teacher, student = toy.params(BODY, 1), toy.params(STUDENT.transformer, 2)
    key = jax.random.key(0)

    def value(**weights):
        loss = stages.distill_loss(TEACHER, STUDENT, StageConfig(loss=LossConfig(**weights)))
        return jax.jit(loss)(student, teacher, batch(), key)

    whole, metrics = value(output=2.0, feature=0.5, balance=0.3, block_balance=0.0)
    # Σ_l w_l · feature_l = L_distill · Σ_l mean(norm) / norm_l, from the formula of w_l
    norm = np.sqrt(_features(teacher, key))
    feature = float(metrics["output"]) * (norm.mean() / norm).sum()
    expected = 2.0 * metrics["output"] + 0.5 * feature + 0.3 * metrics["balance"]
    assert whole == pytest.approx(float(expected), rel=1e-4)
    assert metrics["feature"].shape == (3,) and metrics["balance"] > 0.5
    assert {"double.0.img_mlp/entropy", "single.0.mlp/dead_experts"} <= set(metrics)

    output, metrics = value(output=1.0, feature=0.0, balance=0.0, block_balance=0.0)
    assert output == pytest.approx(float(metrics["output"]), rel=1e-6)
    assert "feature" not in metrics


def test_experts_are_drawn_for_each_sample():
    loss = stages.flow_loss(TEACHER, StageConfig(random_top_k=(0, 1, 6)))
    drawn = np.asarray(loss.draw(batch(300), jax.random.key(0))["top_k"])
    assert np.bincount(drawn, minlength=7)[[0, 1, 6]].min() > 70
    assert set(drawn.tolist()) == {0, 1, 6}
    fixed = stages.flow_loss(TEACHER, StageConfig(top_k=3))
    assert "top_k" not in fixed.draw(batch(4), jax.random.key(0))
    # k drawn from one number is that number
    teacher, student = toy.params(BODY, 1), toy.params(STUDENT.transformer, 2)
    values = []
    for fields in ({"random_top_k": (3,)}, {"top_k": 3}, {"random_top_k": (0, 6)}):
        loss = stages.distill_loss(TEACHER, STUDENT, StageConfig(**fields))
        values.append(float(jax.jit(loss)(student, teacher, batch(), jax.random.key(0))[0]))
    assert values[0] == pytest.approx(values[1], rel=1e-5) != pytest.approx(values[2], rel=1e-2)


def test_padding_is_left_out_of_balance_and_features():
    """Against reports and streams without it: of experts, of an MoB's too, and of block features;
    nothing else changes."""
    groups = (StackConfig(1, blocks=2, active=1, ffn="moe"),)
    student = replace(STUDENT, transformer=replace(STUDENT.transformer, single=groups))
    teacher_config = replace(BODY, single=(StackConfig(1, blocks=2, active=2),))
    teacher = replace(TEACHER, transformer=teacher_config)
    given = toy.params(teacher.transformer, 1), batch() | {"text_length": jnp.array([0, 1, 2, 3])}
    params = toy.params(student.transformer)
    found = {}
    for counts in (True, False):
        stage = StageConfig(count_padding=counts)
        loss = stages.distill_loss(teacher, student, stage)

        def means(params, constants, batch, loss=loss):
            return loss.means(params, constants, loss.draw(batch, jax.random.key(0)))

        found[counts] = jax.jit(means)(params, *given)
        drawn = loss.draw(given[1], jax.random.key(0))
    np.testing.assert_allclose(found[False]["output"], found[True]["output"], rtol=1e-6)

    # By hand, sample by sample, of what the FFNs of the double block read and give.
    inputs, _ = stages.noisy(student, drawn)

    @jax.jit
    def streams(params, constants):
        every = tuple(jnp.tile(jnp.arange(n), (4, 1)) for n in (12, 3))
        models = model_of(student.transformer, params), model_of(teacher.transformer, constants)
        reports, ends = [], []
        for model in models:
            start, context = model.embed(*inputs, tokens=every)
            end, report = model.double[0](start, context)
            reports.append(report)
            ends.append(end)
        return reports[0], ends

    report, ((img, txt), (t_img, t_txt)) = streams(params, given[0])
    lengths = given[1]["text_length"].tolist()
    squares = [
        np.concatenate(
            [np.square(t_img[i] - img[i]), np.square(t_txt[i] - txt[i])[: lengths[i]]]
        ).mean()
        for i in range(4)
    ]
    np.testing.assert_allclose(found[False]["feature"][0], np.mean(squares), rtol=1e-4)
    gate = jax.tree.map(lambda a: a[0, 0], params["double"][0]["block"]["txt_mlp"]["gate"])
    x = np.asarray(report.ffns["txt_mlp"].inputs)[0, 0]
    logits = np.asarray(jax.nn.softmax(x @ gate["kernel"] + gate["bias"]))
    probability = [logits[i, : lengths[i]].sum(0) / max(1, lengths[i]) for i in range(4)]
    got = found[False]["routing"]["double.0.txt_mlp"]["probability"][0, 0]
    np.testing.assert_allclose(got, np.mean(probability, axis=0), rtol=1e-4, atol=1e-6)
    # Images have none, and what of blocks is chosen is another matter.
    for name, one in found[True]["routing"].items():
        same = jax.tree.map(lambda a, b: np.allclose(a, b), one, found[False]["routing"][name])
        changed = not all(jax.tree.leaves(same))
        assert changed == (not name.endswith((".img_mlp", ".blocks"))), name


def test_batches_that_do_not_tell_padding_are_refused():
    stage = StageConfig(count_padding=False)
    loss = stages.distill_loss(TEACHER, STUDENT, stage)
    made = {n: a for n, a in batch().items() if n != "text_length"}
    shapes = toy.shapes(STUDENT.transformer), toy.shapes(BODY)
    drawn = loss.draw(made, jax.random.key(0))
    with pytest.raises(ConfigError, match=r"StageConfig.count_padding = False: expected data that"):
        jax.eval_shape(loss.means, *shapes, drawn)


def test_encoded_batches_tell_what_is_padding():
    text = jnp.array([[1, 2, 0], [0, 0, 0], [3, 1, 2]], jnp.int32)
    image = jnp.zeros((3, 6, 8, 3), jnp.uint8)
    found = Encoders(TEACHER).encode({"image": image, "text": text})
    np.testing.assert_array_equal(found["text_length"], [2, 0, 3])


def _features(teacher, key):
    """Mean squares of the teacher's streams after each group."""
    inputs, _ = stages.noisy_inputs(TEACHER, "uniform", batch(), key)

    @jax.jit
    def squares(teacher):
        model = model_of(BODY, teacher)
        streams, context = model.embed(*inputs)
        (img, txt), _ = model.double[0](streams, context)
        ends = [jnp.concatenate([txt, img], axis=1)]
        graphs, parameters = model.single[0].split()
        for i in range(2):
            mine = jax.tree.map(lambda a, i=i: a[i], parameters)
            ends.append(model.single[0].run_group(graphs, mine, (ends[-1],), context)[0][0])
        return jnp.stack([jnp.square(end).mean() for end in ends])

    return np.asarray(squares(teacher))


def operations_of_a_step(router_input):
    """Of one that computes in bfloat16, forward and backward, with all kinds of parts."""
    moe = replace(STUDENT.transformer.moe, router_input=router_input)
    mixed = replace(
        STUDENT.transformer,
        moe=moe,
        modulation_rank=3,
        single=(StackConfig(1, blocks=2, active=1, ffn="moe"),),
    )
    teacher = replace(BODY, single=(StackConfig(1, blocks=2, active=2),))
    teacher, student = (replace(TEACHER, transformer=t) for t in (teacher, mixed))
    loss = stages.distill_loss(teacher, student, StageConfig(dtype="bfloat16"))
    trees = toy.shapes(mixed), toy.shapes(teacher.transformer)
    jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(*trees, batch(), jax.random.key(0))
    return operations(jaxpr.jaxpr)


@pytest.mark.parametrize("way", ["reference", "tiled"])
def test_gradients_are_summed_in_float32(way):
    """Those of what is one value for many tokens or neurons: biases, modulations, the scale of the
    experts, weights of experts and of blocks. In bfloat16 a sum of ones stands still at 256."""
    with toy.computed_by(way):
        found = operations_of_a_step("modulated")
    sums = [eqn for eqn in found if eqn.primitive.name == "reduce_sum"]
    assert len(sums) > 50
    for eqn in sums:
        (of,), (to,) = eqn.invars, eqn.outvars
        assert of.aval.dtype != jnp.bfloat16 or of.aval.size == to.aval.size, eqn


@pytest.mark.parametrize("router_input", ["modulated", "unmodulated"])
def test_what_is_float32_says_so_to_the_hardware(router_input):
    """Every product of float32 arrays: gates, block routers, embedders, the modulations' basis."""
    found = [
        eqn.params["precision"]
        for eqn in operations_of_a_step(router_input)
        if eqn.primitive.name == "dot_general"
        and all(v.aval.dtype == jnp.float32 for v in eqn.invars)
    ]
    assert len(found) > 20
    assert {str(precision) for precision in found} == {"(Precision.HIGHEST, Precision.HIGHEST)"}, (
        found
    )


def test_distill_refuses_bodies_that_do_not_align():
    deeper = replace(STUDENT, transformer=replace(STUDENT.transformer, single=(StackConfig(3),)))
    with pytest.raises(ConfigError, match="lockstep: teacher's single stacks"):
        stages.distill_loss(TEACHER, deeper, StageConfig())
