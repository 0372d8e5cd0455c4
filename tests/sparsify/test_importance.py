import jax
import jax.numpy as jnp
import numpy as np

from d2m_jax.keys import inner_key
from d2m_jax.models.flux import model_of
from d2m_jax.sparsify import importance
from d2m_jax.sparsify.importance import calibrate, magnitude


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
    assert shapes == jax.tree.map(np.shape, calibration.sensitivity)

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
        small.config, small.params, [batch], small.noisy, key, tokens=12, want=("sensitivity",)
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
    got = found.sensitivity["single"][0]["mlp"][3, 0]
    np.testing.assert_allclose(got, expected[places], rtol=1e-3, atol=1e-6)
    assert (got[:2] == 0).all(), "the last block's text reaches no velocity"


def test_cond_spreads_over_guidance(small, calibration):
    cond = calibration.cond
    assert cond.shape == (24, 32) and np.isfinite(cond).all()
    key = jax.random.key(0)
    again = calibrate(small.config, small.params, small.batches(3), small.noisy, key, tokens=96)
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
