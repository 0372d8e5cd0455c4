"""Loads of experts and use of blocks, for gates and routers whose choice is known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import (
    FluxConfig,
    ModelConfig,
    MoEConfig,
    PixelsConfig,
    StackConfig,
    WordsConfig,
)
from d2m_jax.evaluate import routing
from d2m_jax.evaluate.noisy import Program
from d2m_jax.models.flux import initialise
from d2m_jax.report import pictures
from tests.seed import generator

MODEL = ModelConfig(
    FluxConfig(
        in_channels=48,
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=16,
        num_heads=1,
        axes_dim=(4, 6, 6),
        guidance_embed=False,
        double=(StackConfig(1, ffn="moe"),),
        single=(StackConfig(1), StackConfig(1, 2, 1, ffn="moe")),
        moe=MoEConfig(experts=4, top_k=2),
    ),
    WordsConfig(dim=8, length=3),
    PixelsConfig(8, 12, 4),
)


@pytest.fixture(scope="module")
def params():
    return initialise(MODEL.transformer, 0)


@pytest.fixture(scope="module")
def batches():
    rng = generator()

    def batch(start):
        return {
            "img": jnp.float32(rng.normal(size=(8, 2, 3, 48))),
            "txt": jnp.float32(rng.normal(size=(8, 3, 8))),
            "timesteps": jnp.float32((np.arange(8) + start) / 8),
            "y": jnp.float32(rng.normal(size=(8, 8))),
        }

    return [batch(0.25), batch(0.75)]


def with_gates(params, change):
    """The parameters with every gate's and router's arrays changed by name."""

    def at(path, leaf):
        names = [key.key for key in path]
        return change(names, np.array(leaf))

    return jax.tree_util.tree_map_with_path(at, params)


def test_shares_of_layers_and_groups(params, batches):
    layers, groups = routing.measure(Program(MODEL), params, batches)
    assert [layer.name for layer in layers] == [
        "double 0 image",
        "double 0 text",
        "single 1",
        "single 2",
    ]
    assert [group.name for group in groups] == ["single 1 to 2"]
    for layer in layers:
        assert layer.by_time.shape == (routing.BINS, 4)
        ran = layer.by_time.sum(1) > 0
        assert np.allclose(layer.by_time[ran].sum(1), 1, atol=1e-5)
        assert 0 <= layer.health["entropy"] <= 1
    image, text = layers[:2]
    assert text.by_place is None and image.by_place.shape == (2, 3, 4)
    # the layer sees image tokens alone, so both ways of counting meet
    assert np.allclose(image.by_place.mean((0, 1)), image.by_time.mean(0), atol=1e-5)
    (group,) = groups
    assert np.allclose(group.by_time.sum(1), 1)
    # a block of the group is in use where its experts are
    used = np.stack([layer.by_time.sum(1) > 0 for layer in layers[2:]], axis=1)
    assert np.array_equal(used, group.by_time > 0)


def test_known_choices(params, batches):
    def change(names, leaf):
        if names[-2:] == ["gate", "bias"]:
            leaf[..., [1, 3]] = 100  # experts 1 and 3, always
        if "router" in names and names[-2:] == ["features", "bias"]:
            leaf[..., 1] = 100  # the second block, always
        return leaf

    layers, (group,) = routing.measure(Program(MODEL), with_gates(params, change), batches)
    for layer in (layers[0], layers[1], layers[3]):
        assert np.allclose(layer.by_time, [0, 0.5, 0, 0.5])
        assert layer.health["dead_experts"] == 2
        assert layer.health["largest_load"] == pytest.approx(2)
    assert np.allclose(layers[3].by_place, [0, 0.5, 0, 0.5])
    assert np.allclose(layers[2].by_time, 0) and np.allclose(layers[2].by_place, 0)
    assert np.allclose(group.by_time, [0, 1])


def test_places_are_those_of_image_tokens(params, batches):
    # fresh blocks change nothing, so what enters shows: text and image far apart in one feature
    def change(names, leaf):
        if names in (["txt_in", "bias"], ["img_in", "bias"]):
            leaf[0] = 100 if names[0] == "txt_in" else -100
        if names[-2:] == ["gate", "kernel"]:
            leaf[..., 0, :] = [100, 100, -100, -100]
        return leaf

    image, text, *single = routing.measure(Program(MODEL), with_gates(params, change), batches)[0]
    assert np.allclose(image.by_place, [0, 0, 0.5, 0.5])
    assert np.allclose(text.by_time, [0.5, 0.5, 0, 0])
    some = [layer for layer in single if layer.by_time.any()]  # that the router chooses
    assert some
    for layer in some:
        assert np.allclose(layer.by_place, [0, 0, 0.5, 0.5])
        ran = layer.by_time.sum(1) > 0
        assert np.allclose(layer.by_time[ran], [1 / 6, 1 / 6, 1 / 3, 1 / 3])  # 3 tokens, and 6


def test_other_routers(batches):
    moe = replace(MODEL.transformer.moe, router_input="unmodulated")
    model = replace(MODEL, transformer=replace(MODEL.transformer, moe=moe))
    params = initialise(model.transformer, 0)
    layers, groups = routing.measure(Program(model), params, batches)
    assert [layer.by_place is None for layer in layers] == [False, True, False, False]
    figure = pictures.routing(layers, groups)
    assert len(figure.axes) >= 2 * (len(layers) + len(groups))

    shared = replace(MODEL, transformer=replace(MODEL.transformer, moe=replace(moe, top_k=0)))
    assert routing.measure(Program(shared), params, batches)[0] == []
