"""The transformer: full size without its numbers, stacks in any shape, float32 where it counts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2m_jax import flow
from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models import experts, flux, layers
from tests.models import toy
from tests.models.oracle import operations
from tests.seed import generator


def count(config):
    return sum(a.size for a in jax.tree.leaves(toy.shapes(config)))


def test_full_size_flux_has_all_its_parameters():
    assert count(FluxConfig()) == 11_901_408_320  # of FLUX.1 [dev]'s checkpoint
    assert count(FluxConfig(guidance_embed=False)) == 11_891_178_560  # [schnell]'s


def trace(config, batch=1, grid=(64, 64), text=512):
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (
            (batch, grid[0] * grid[1], config.in_channels),
            (1, grid[0] * grid[1], 3),
            (batch, text, config.context_in_dim),
            (1, text, 3),
            (batch,),
            (batch, config.vec_in_dim),
            (batch,),
        )
    ]

    def forward(params, *arrays):
        return flux.model_of(config, params, jnp.bfloat16)(*arrays)

    return jax.make_jaxpr(forward)(toy.shapes(config), *arrays)


def test_the_program_does_not_grow_with_depth():
    """What makes full-size FLUX.1 a few seconds to trace."""
    shallow = replace(FluxConfig(), double=(StackConfig(2),), single=(StackConfig(2),))
    full, two = trace(FluxConfig()), trace(shallow)
    assert len(operations(full.jaxpr)) == len(operations(two.jaxpr))
    assert full.out_avals[0].shape == (1, 4096, 64) and full.out_avals[0].dtype == jnp.float32


def test_fresh_model_is_finite_and_its_blocks_do_nothing():
    """Modulations and last layer are zero at birth, as is usual for DiTs."""
    params = flux.initialise(toy.DENSE, 0)
    expected = toy.shapes(toy.DENSE)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    again, other = flux.initialise(toy.DENSE, 0), flux.initialise(toy.DENSE, 1)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    kernels = [p["single"][0]["block"]["qkv"]["kernel"] for p in (params, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    # every block has numbers of its own, of the size that its inputs ask for
    assert np.abs(kernels[0][0] - kernels[0][1]).max() > 0.1
    assert np.std(kernels[0]) * toy.DENSE.hidden_size**0.5 == pytest.approx(1, abs=0.05)
    velocity = jax.jit(lambda p, *a: flux.model_of(toy.DENSE, p)(*a))(params, *toy.inputs())
    np.testing.assert_array_equal(velocity, np.zeros_like(velocity))


SIX = replace(toy.DENSE, double=(StackConfig(1),), single=(StackConfig(6),))


@partial(jax.jit, static_argnums=0)
def run(config, params, *inputs):
    return flux.model_of(config, params)(*inputs)


@pytest.fixture(scope="module")
def six():
    params = toy.params(SIX)
    return params, run(SIX, params, *toy.inputs())


def test_groups_are_a_reshape(six):
    params, expected = six
    config = replace(SIX, single=(StackConfig(2, 3, 3),))
    regrouped = params | {
        "single": jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[2:]), params["single"])
    }
    assert jax.tree.map(jnp.shape, regrouped) == jax.tree.map(jnp.shape, toy.shapes(config))
    np.testing.assert_allclose(run(config, regrouped, *toy.inputs()), expected, atol=1e-4)


def test_stacks_are_a_cut(six):
    params, expected = six
    config = replace(SIX, single=(StackConfig(2), StackConfig(2, 2, 2)))
    block = params["single"][0]
    cut = {
        0: jax.tree.map(lambda a: a[:2], block),
        1: jax.tree.map(lambda a: a[2:].reshape(2, 2, *a.shape[2:]), block),
    }
    result = run(config, params | {"single": cut}, *toy.inputs())
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_mob_runs_the_chosen_blocks(six):
    """Routers forced to blocks 0 and 2 of each group of three: the dense model of those four."""
    params, _ = six
    config = replace(SIX, single=(StackConfig(2, 3, 2),))
    single = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[2:]), params["single"])
    router = jax.tree.map(jnp.zeros_like, toy.params(config)["single"][0]["router"])
    router["features"]["bias"] = jnp.asarray([[2.0, 0.0, 1.0]] * 2)
    mixed = params | {"single": {0: single[0] | {"router": router}}}
    kept = jax.tree.map(lambda a: a[jnp.asarray([0, 2, 3, 5])], params["single"])
    four = run(replace(SIX, single=(StackConfig(4),)), params | {"single": kept}, *toy.inputs())
    np.testing.assert_allclose(run(config, mixed, *toy.inputs()), four, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch(monkeypatch):
    """MoE and MoB together; up to float rounding, for another batch is another program."""
    monkeypatch.setattr(experts, "asked", lambda: "tiled")
    config = replace(
        toy.SPARSE,
        single=(StackConfig(2, 3, 2, ffn="moe"),),
    )
    params = toy.params(config)
    img, img_ids, txt, txt_ids, t, y, guidance = toy.inputs(config, batch=4)
    whole = run(config, params, img, img_ids, txt, txt_ids, t, y, guidance)
    alone = run(config, params, img[2:3], img_ids, txt[2:3], txt_ids, t[2:3], y[2:3], guidance[2:3])
    np.testing.assert_allclose(alone[0], whole[2], atol=1e-4)
    crowd = [a.at[jnp.asarray([0, 1, 3])].set(a[1]) for a in (img, txt, t, y, guidance)]
    crowded = run(config, params, crowd[0], img_ids, crowd[1], txt_ids, *crowd[2:])
    np.testing.assert_allclose(crowded[2], whole[2], atol=1e-4)


def test_remat_changes_nothing():
    params = toy.params(toy.DENSE)

    def gradient(remat):
        def loss(params):
            model = flux.model_of(toy.DENSE, params)
            return jnp.square(model.run(*model.embed(*toy.inputs()), remat=remat)[0]).mean()

        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(*(jax.tree.leaves(gradient(remat)) for remat in (False, True)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_embedding_is_float32_whatever_the_activations_are():
    """bfloat16 makes 3504 of guidance 3.5 × 1000, and 256 of position 257."""
    params = toy.params(toy.DENSE)
    img, _, txt, txt_ids, t, y, guidance = toy.inputs(grid=(1, 300))
    arguments = (img, flow.image_ids(1, 300), txt, txt_ids, t, y, guidance)

    def embed(dtype):
        def inner(params):
            streams, context = flux.model_of(toy.DENSE, params, dtype).embed(*arguments)
            return streams, context.vec, context.pe

        return jax.jit(inner)(params)

    (img16, txt16), vec16, pe16 = embed(jnp.bfloat16)
    _, vec32, pe32 = embed(jnp.float32)
    assert img16.dtype == txt16.dtype == jnp.bfloat16
    assert vec16.dtype == pe16[0].dtype == jnp.float32
    np.testing.assert_allclose(vec16, vec32, atol=1e-5)
    np.testing.assert_allclose(pe16, pe32, atol=1e-6)
    assert len(np.unique(np.asarray(pe16[0])[0, txt.shape[1] :, 0], axis=0)) == 300


def test_half_precision_forward_is_near():
    params, inputs = toy.params(toy.SPARSE), toy.inputs()
    full = run(toy.SPARSE, params, *inputs)
    half = jax.jit(lambda p, *a: flux.model_of(toy.SPARSE, p, jnp.bfloat16)(*a))(params, *inputs)
    assert half.dtype == jnp.float32
    # tokens whose best experts tie in bfloat16 may choose others: the median holds
    assert np.median(np.abs(half - full)) < 0.1 * np.abs(full).mean()


def test_last_layer_reads_shift_then_scale():
    """BFL's order; diffusers has scale first."""
    layer = layers.LastLayer(4, 4, rngs=nnx.Rngs(0))
    layer.linear.kernel[...] = jnp.eye(4)
    layer.adaLN_modulation.bias[...] = jnp.asarray([1.0, 2, 3, 4, 10, 20, 30, 40])
    x = generator().normal(size=(1, 3, 4)).astype(np.float32)
    norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = norm * np.float32([11, 21, 31, 41]) + np.float32([1, 2, 3, 4])
    np.testing.assert_allclose(layer(jnp.asarray(x), jnp.zeros((1, 4))), expected, rtol=1e-4)


def test_low_rank_modulation_at_full_rank_is_the_original(six):
    """basis = identity, so that cond is silu(vec) itself."""
    params, expected = six
    config = replace(SIX, modulation_rank=SIX.hidden_size)
    whole = params | {"modulation_basis": {"kernel": jnp.eye(SIX.hidden_size)}}
    np.testing.assert_allclose(run(config, whole, *toy.inputs()), expected, atol=1e-4)


def test_missing_guidance_is_an_error():
    with pytest.raises(ValueError, match="guidance"):
        jax.eval_shape(
            lambda p: flux.model_of(toy.DENSE, p)(*toy.inputs()[:-1]), toy.shapes(toy.DENSE)
        )


def test_top_k_reaches_every_layer():
    params = toy.params(toy.SPARSE)

    def load(k):
        model = flux.model_of(toy.SPARSE, params)
        return (
            model.run(*model.embed(*toy.inputs(), top_k=k))[1]["single"][0].ffns["mlp"].routing.load
        )

    # one choice per token out of 19: multiples of 1/19
    loads = np.asarray(jax.jit(load, static_argnums=0)(1)) * 19
    np.testing.assert_allclose(loads, loads.round(), atol=1e-4)
    assert loads.shape == (2, 1, 3, 6)
