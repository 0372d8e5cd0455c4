from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import flow
from d2m_jax.config import ConfigError
from d2m_jax.keys import inner_key
from d2m_jax.models.flux import model_of
from d2m_jax.sparsification import importance
from d2m_jax.sparsification.importance import calibrate, magnitude


def test_taylor_is_weight_times_gradient_per_neuron(small, calibration):
    """Against the gradient of all parameters, batch by batch, summed by hand for some neurons."""

    @jax.jit
    def gradient(params, batch, key):
        inputs, target = small.noisy(batch, jax.random.split(key, 3)[0])

        def loss(params):
            return jnp.square(model_of(small.config, params)(*inputs) - target).mean()

        return jax.grad(loss)(params)

    gradients = [
        gradient(small.params, batch, jax.random.fold_in(jax.random.key(0), i))
        for i, batch in enumerate(small.batches(3))
    ]
    for kind, name, block, neuron in (
        ("double", "img_mlp", 0, 3),
        ("double", "txt_mlp", 0, 77),
        ("double", "txt_mlp", 1, 77),  # its output is read by the single blocks' attention
        ("single", "mlp", 3, 127),
    ):
        expected = 0.0
        for g in gradients:
            g, w = (tree[kind][0]["block"][name] for tree in (g, small.params))
            for w, g in (  # noqa: B020
                (
                    w["in_layer"]["kernel"][block, 0, :, neuron],
                    g["in_layer"]["kernel"][block, 0, :, neuron],
                ),
                (w["in_layer"]["bias"][block, 0, neuron], g["in_layer"]["bias"][block, 0, neuron]),
                (
                    w["out_layer"]["kernel"][block, 0, neuron],
                    g["out_layer"]["kernel"][block, 0, neuron],
                ),
            ):
                expected += np.abs(w * g).sum() / 3
        assert expected > 0
        found = calibration.taylor[kind][0][name][block, 0, neuron]
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_inputs_are_what_the_ffns_read(small, calibration):
    """At positions that are other ones in every sample."""
    shapes = jax.tree.map(np.shape, calibration.inputs)
    assert shapes["double"][0] == {"img_mlp": (2, 1, 72, 32), "txt_mlp": (2, 1, 24, 32)}
    assert shapes["single"][0] == {"mlp": (4, 1, 96, 32)}
    weights = jax.tree.map(np.shape, calibration.weights)
    assert weights["double"][0] == {"img_mlp": (2, 1, 72), "txt_mlp": (2, 1, 24)}

    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 2), 3)[0]
    inputs, _ = small.noisy(small.batches(3)[2], key)

    @jax.jit
    def report(params, inputs):
        model = model_of(small.config, params)
        every = tuple(jnp.tile(jnp.arange(n), (8, 1)) for n in (9, 2))
        return model.run(*model.embed(*inputs, tokens=every))[1]

    found = report(small.params, inputs)
    for kind, name in (("double", "img_mlp"), ("single", "mlp")):
        read = np.asarray(found[kind][0].ffns[name].inputs)[-1, 0]  # [batch, tokens, D]
        drawn = calibration.inputs[kind][0][name][-1, 0].reshape(24, -1, 32)[-8:]
        distance = np.abs(drawn[:, :, None] - read[:, None]).max(-1)
        assert (distance.min(-1) < 1e-4).all()
        places = distance.argmin(-1)
        assert all(len(set(row[-3:])) == 3 for row in places.tolist()), "the same token twice"
        assert len(set(places[:, -1].tolist())) > 2, "the same tokens of every sample"


def test_positions_are_other_ones_in_every_sample():
    image, text = importance._positions(jax.random.key(0), (50, 9, 6), (4, 8))
    assert image.shape == (50, 4) and text.shape == (50, 6)
    for drawn in np.asarray(image).tolist() + np.asarray(text).tolist():
        assert len(set(drawn)) == len(drawn)
    # no diagonal of the grid: every place is drawn about equally often
    assert np.bincount(np.asarray(image).ravel(), minlength=9).min() > 10


def test_sensitivity_is_the_squared_gradient_of_a_projection(small):
    """Of the last block, whose output enters the last layer times a gate that is known."""
    batch = jax.tree.map(lambda a: a[:1], small.batches(1)[0])
    key = jax.random.key(4)
    found = calibrate(
        *(small.config, small.params, [batch], small.noisy, key),
        **{"tokens": 12, "count": 1, "want": ("sensitivity", "inputs", "weights")},
    )
    assert found.taylor == {}
    # The last block adds gate · y to its stream, so ∂v/∂y is known: v = last(x + gate · y).
    inputs, _ = small.noisy(batch, jax.random.split(jax.random.fold_in(key, 0), 3)[0])
    model = model_of(small.config, jax.tree.map(jnp.asarray, small.params))
    streams, context = model.embed(*inputs)
    streams, _ = model.double[0](streams, context)
    streams = (jnp.concatenate([streams[1], streams[0]], axis=1),)
    params = small.params["single"][0]["block"]["modulation"]["lin"]
    gate = jax.nn.silu(context.vec) @ params["kernel"][3, 0] + params["bias"][3, 0]
    gate = gate[0, 64:]
    end, _ = model.single[0](streams, context)
    batch_key = jax.random.fold_in(key, 0)
    expected = np.zeros((11, 32))
    velocity, back = jax.vjp(lambda x: model.final((x,), context), end[0])
    for i in range(importance.PROJECTIONS):
        u = jax.random.normal(inner_key(batch_key, f"projection {i}"), velocity.shape)
        expected += np.square(np.asarray(back(u)[0])[0] * gate) / importance.PROJECTIONS
    drawn = jax.random.split(batch_key, 3)[1]
    image, text = importance._positions(drawn, (1, 9, 2), (9, 3))
    places = np.concatenate([np.asarray(text)[0], 2 + np.asarray(image)[0]])
    got = found.weights["single"][0]["mlp"][3, 0]
    np.testing.assert_allclose(got, expected[places].sum(-1), rtol=1e-3, atol=1e-6)
    assert (got[:2] == 0).all(), "the last block's text reaches no velocity"
    # A score is the variance that a neuron alone brings there.
    ffn = jax.tree.map(lambda a: a[3, 0], small.params["single"][0]["block"]["mlp"])
    x = found.inputs["single"][0]["mlp"][3, 0]
    h = x @ ffn["in_layer"]["kernel"] + ffn["in_layer"]["bias"]
    h = np.asarray(jax.nn.gelu(h, approximate=True))
    worth = expected[places] @ np.square(ffn["out_layer"]["kernel"]).T
    score = (np.square(h - h.mean(0)) * worth).mean(0)
    np.testing.assert_allclose(found.sensitivity["single"][0]["mlp"][3, 0], score, rtol=1e-3)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_batch_in_parts_is_the_batch(small, stored):
    """Of scores to 1e-5 of the largest, or 1e-3 where gradients are rounded to the teacher's
    bfloat16 part by part; tokens are the same ones in the same order, to float32's rounding."""
    params = jax.tree.map(lambda a: jnp.asarray(a, stored), small.params)
    given = small.config, params, small.batches(2), small.noisy, jax.random.key(1)
    whole, parts = (
        vars(calibrate(*given, tokens=96, count=2, micro_batch=size)) for size in (None, 2)
    )
    exact = {"float32": 1e-5, "bfloat16": 1e-3}[stored]
    for name, one in whole.items():
        tolerance = {"taylor": exact, "sensitivity": 1e-5, "cond": 1e-6}.get(name, 2e-5)
        if name in ("inputs", "weights") and stored == "bfloat16":
            tolerance = 2**-7  # rounded up here, down there
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(parts[name]), strict=True)
        for a, b in pairs:
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            assert a.shape == b.shape and np.abs(a).max() > 0
            assert np.abs(a - b).max() <= tolerance * np.abs(a).max(), name


def test_memory_is_that_of_a_micro_batch(small):
    """Compiled: four times the samples in four times the parts take no more for activations."""

    def temporaries(size, parts, tokens):
        batch = {"image": np.zeros((size, 900, 48), np.float32)}
        batch["words"] = np.zeros((size, 60, 16), np.float32)

        def noisy(batch, key):
            first = {name: a[:, :9] for name, a in batch.items()}
            (_, _, *others), _ = small.noisy(first, key)
            return (batch["image"], flow.image_ids(30, 30), *others), batch["image"]

        program = importance.measure.lower(
            small.params,
            batch,
            jax.random.key(0),
            config=small.config,
            noisy=noisy,
            counts=(tokens, tokens),
            want=importance.ALL,
            parts=parts,
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    one, four, in_parts = temporaries(2, 1, 4), temporaries(8, 1, 4), temporaries(8, 4, 4)
    assert four > 3 * one
    # What is drawn for the batch is there for all of its samples: noise, projections, positions.
    drawn = 8 * 900 * 48 * 4 * 6
    assert in_parts < one + drawn


def test_only_what_is_asked_for_is_computed(small):
    """By the shapes of what the program gives: nothing is compiled."""
    given = small.params, small.batches(1)[0], jax.random.key(0)
    fixed = {"config": small.config, "noisy": small.noisy, "counts": (4, 4), "parts": 1}
    for want in (("taylor",), ("sensitivity",), ("inputs",), ("weights",), importance.ALL, ()):
        program = partial(importance.measure, want=want, **fixed)
        taylor, sums, tokens, _ = jax.eval_shape(program, *given)
        found = {"taylor": taylor, "sensitivity": sums} | tokens
        assert {name for name in found if jax.tree.leaves(found[name])} == set(want)


def test_too_few_batches_are_told(small):
    given = small.config, small.params, small.batches(1), small.noisy, jax.random.key(0)
    with pytest.raises(ConfigError, match="expected batches = 2 of them, found 1"):
        calibrate(*given, tokens=96, count=2, want=("inputs",))


def test_cond_spreads_over_guidance(small, calibration):
    cond = calibration.cond
    assert cond.shape == (24, 32) and np.isfinite(cond).all()
    key = jax.random.key(0)
    given = small.config, small.params, small.batches(3), small.noisy, key
    again = calibrate(*given, tokens=96, count=3)
    jax.tree.map(np.testing.assert_array_equal, vars(calibration), vars(again))
    inputs, _ = small.noisy(
        small.batches(1)[0], jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)[0]
    )
    params = jax.tree.map(jnp.asarray, small.params)
    _, context = model_of(small.config, params).embed(*inputs)
    assert np.abs(jax.nn.silu(context.vec) - cond[:8]).max() > 1e-3


def test_magnitude(small):
    ffn = small.params["double"][0]["block"]["txt_mlp"]
    expected = (
        np.abs(ffn["in_layer"]["kernel"][1, 0, :, 5]).sum()
        + np.abs(ffn["in_layer"]["bias"][1, 0, 5])
        + np.abs(ffn["out_layer"]["kernel"][1, 0, 5]).sum()
    )
    found = magnitude(small.params)["double"][0]["txt_mlp"][1, 0, 5]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
