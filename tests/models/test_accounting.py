"""Parameters and FLOPs against the paper, against sums by hand, and against the traced program."""

import importlib
import math
from dataclasses import replace

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from flax import nnx

from d2m_jax.config import (
    FluxConfig,
    ModelConfig,
    MoEConfig,
    PixelsConfig,
    StackConfig,
    WordsConfig,
)
from d2m_jax.models.accounting import (
    PAPER,
    account,
    comparison,
    flops_per_example,
    table,
    to_json,
)
from d2m_jax.models.flux import Flux

TINY = FluxConfig(
    in_channels=12,
    vec_in_dim=20,
    context_in_dim=16,
    hidden_size=32,
    num_heads=2,
    axes_dim=(4, 6, 6),
    double=(StackConfig(2),),
    single=(StackConfig(3),),
)


def preset(name: str) -> FluxConfig:
    return importlib.import_module(f"configs.{name}").get_config()


def test_flux_dev_has_the_parameters_of_the_released_model():
    total = account(FluxConfig()).total
    assert total.parameters == total.activated == 11_901_408_320


@pytest.mark.parametrize("name", PAPER)
def test_presets_meet_the_paper(name):
    counted = account(preset(name))
    activated, flops = PAPER[name]
    assert counted.tokens == 4173
    assert counted.total.activated == pytest.approx(activated, rel=0.02)
    if flops is not None:
        assert counted.paper_flops == pytest.approx(flops, rel=0.03)
        # the paper leaves out what hardly matters
        assert counted.paper_flops < counted.total.flops < 1.001 * counted.paper_flops
    if name != "flux_dev":
        assert 8.5e9 < counted.total.parameters < 9e9


def test_presets_are_whole_and_keep_the_first_blocks_outside_groups():
    for name in PAPER:
        config = preset(name)
        assert sum(stack.depth for stack in config.double) == 19
        assert sum(stack.depth for stack in config.single) == 38
        assert not config.double[0].mixes and not config.single[0].mixes


@pytest.mark.parametrize(
    "double, single, moe, teraflops",
    [(19, 38, False, 66.07), (8, 38, False, 53.32), (5, 10, False, 17.39), (19, 38, True, 43.62)],
)
def test_flops_as_the_paper_counts_them(double, single, moe, teraflops):
    ffn = "moe" if moe else "dense"
    config = FluxConfig(
        double=(StackConfig(double, ffn=ffn),), single=(StackConfig(single, ffn=ffn),)
    )
    counted = account(config).paper_flops
    n, d, ffn_ratio = 4173, 3072, 1.5 if moe else 4
    assert counted == (double + single) * ((8 + 4 * ffn_ratio) * d**2 * n + 4 * n**2 * d)
    assert counted / 1e12 == pytest.approx(teraflops, abs=0.005)


@pytest.mark.parametrize("active, top_k", [(1, 2), (2, 0), (3, 4)])
def test_activated_by_hand(active, top_k):
    """One group of three MoE blocks in each stream, one matrix after the other."""
    d, f, s, experts, rank, blocks = 32, 24, 32, 4, 8, 3
    config = replace(
        TINY,
        double=(StackConfig(1, blocks=blocks, active=active, ffn="moe"),),
        single=(StackConfig(1, blocks=blocks, active=active, ffn="moe"),),
        moe=MoEConfig(shared_ratio=1.0, experts=experts, top_k=top_k),
        modulation_rank=rank,
    )

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    def ffn(out_bias):
        shared = linear(d, s) + s * d + (d if out_bias else 0)
        return shared + linear(d, experts) + 1 + top_k * (linear(d, f) + f * d)

    attention = linear(d, 3 * d) + linear(d, d) + 2 * d // 2
    double = 2 * (attention + ffn(True) + linear(rank, 6 * d))
    single = attention + ffn(False) + linear(rank, 3 * d)
    router = linear(2 * d, blocks) + d * blocks
    embedders = sum(linear(i, d) + linear(d, d) for i in (256, 256, 20))
    outside = linear(12, d) + linear(16, d) + embedders + linear(d, 2 * d) + linear(d, 12)
    routers = 2 * router if active < blocks else 0
    expected = outside + d * rank + active * (double + single) + routers
    assert account(config).total.activated == expected


def product_flops(jaxpr, times: int = 1) -> int:
    """FLOPs of all matrix products in a traced program, loops unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            terms = math.prod(left[axis] for axis in contracted)
            total += 2 * times * terms * math.prod(equation.outvars[0].aval.shape)
        repeat = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inside = sum(
            product_flops(inner, times * repeat)
            for inner in jax.extend.core.jaxprs_in_params(equation.params)
        )
        # A block runs or does not: two of a group's three do.
        total += inside * 2 // 3 if equation.primitive.name == "cond" else inside
    return total


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, modulation_rank=8, guidance_embed=False),
        replace(TINY, single=(StackConfig(1), StackConfig(2, blocks=3, active=2))),
        replace(
            TINY,
            double=(StackConfig(2, ffn="moe"),),
            moe=MoEConfig(experts=4, top_k=4),
        ),
    ],
    ids=["dense", "low rank", "groups", "all experts"],
)
def test_flops_are_those_of_the_traced_program(config):
    image_tokens, text_tokens = 20, 7
    model = nnx.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (
            (1, image_tokens, config.in_channels),
            (1, image_tokens, 3),
            (1, text_tokens, config.context_in_dim),
            (1, text_tokens, 3),
            (1,),
            (1, config.vec_in_dim),
            (1,),
        )
    ]
    traced = jax.make_jaxpr(lambda state, *inputs: nnx.merge(graph, state)(*inputs))
    expected = product_flops(traced(state, *arguments).jaxpr)
    assert flops_per_example(config, image_tokens, text_tokens) == expected


def test_a_model_brings_its_own_tokens():
    model = ModelConfig(TINY, WordsConfig(length=5), PixelsConfig(height=16, width=24, patch=4))
    counted = account(model)
    assert (counted.image_tokens, counted.text_tokens) == (24, 5)
    assert counted == account(TINY, 24, 5)
    assert account(model, image_tokens=8).image_tokens == 8


def test_the_paper_stands_beside_presets_only():
    counted = account(TINY)
    assert comparison("tiny", counted) == [] and "paper" not in table("tiny", counted)
    assert [row["difference"] is not None for row in comparison("flux_moe_m", counted)] == [True]
    large = account(preset("flux_moe_l"))
    assert "5.157 B, paper 5.150 B (+0.1 %)" in table("flux_moe_l", large)
    assert to_json("flux_moe_l", large)["paper"][1]["paper"] == 43.42e12
