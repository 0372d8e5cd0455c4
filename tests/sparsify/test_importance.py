import jax
import jax.numpy as jnp
import numpy as np

from d2m_jax.models.flux import model_of
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
    shapes = jax.tree.map(np.shape, calibration.inputs)
    assert shapes["double"][0] == {"img_mlp": (2, 1, 96, 32), "txt_mlp": (2, 1, 48, 32)}
    assert shapes["single"][0] == {"mlp": (4, 1, 96, 32)}

    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 2), 3)[0]
    inputs, _ = small.noisy(small.batches(3)[2], key)

    @jax.jit
    def report(params, inputs):
        model = model_of(small.config, params)
        return model.run(*model.embed(*inputs, collect=11))[1]

    report = report(small.params, inputs)
    read = np.asarray(report["single"][0].ffns["mlp"].inputs)[3, 0].reshape(-1, 32)
    drawn = calibration.inputs["single"][0]["mlp"][3, 0, -32:]  # of the last batch
    distance = np.abs(drawn[:, None] - read[None]).max(-1)
    assert (distance.min(1) < 1e-4).all()
    assert len(set(distance.argmin(1))) == 32, "the same token twice"


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
