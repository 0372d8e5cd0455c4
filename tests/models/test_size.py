"""What a model says of itself, against counts by hand and the accounting from the config."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from d2m_jax.config import StackConfig
from d2m_jax.kernels.quantized import quantized
from d2m_jax.models import flux
from d2m_jax.models.accounting import account
from d2m_jax.models.parameters import unstacked
from d2m_jax.models.size import amount, summary
from tests.models import toy

MIXED = replace(toy.SPARSE, single=(StackConfig(1, ffn="moe"), StackConfig(2, 3, 2)))


@pytest.fixture(scope="module")
def params():
    return toy.params(MIXED)


def test_a_model_says_size_sparsity_type_and_device(params):
    cost = account(MIXED).total
    device = jax.devices()[0]
    expected = (
        f"Flux: {amount(cost.parameters)} parameters,"
        f" {amount(cost.activated)} activated per token\n"
        "  double blocks: 1 MoE; single blocks: 1 MoE, 2 of 3 dense in each of 2 groups;"
        " MoE: a shared expert and 2 of 6 normal ones\n"
        f"  stored in float32, on {device.platform}:{device.id}; computes in bfloat16"
    )
    model = flux.model_of(MIXED, params, jnp.bfloat16)
    assert repr(model) == str(model) == expected


def test_a_dense_model_has_nothing_to_activate():
    said = summary(toy.DENSE, toy.shapes(toy.DENSE))
    total = sum(a.size for a in jax.tree.leaves(toy.shapes(toy.DENSE)))
    assert said.startswith(f"{total / 1e3:.3f} k parameters\n")
    assert "activated" not in said and "MoE" not in said


def test_it_does_not_matter_how_parameters_are_stored(params):
    """Each block's alone, or quantised: the same numbers, and scales are none."""
    plain = summary(MIXED, params)
    assert summary(MIXED, unstacked(params)) == plain
    assert summary(MIXED, quantized(params, "int8")) == plain.replace(
        "in float32", "in int8 and float32"
    )


def test_models_without_arrays_say_so(params):
    """Abstract, traced, and half made; nothing is read."""
    abstract = nnx.eval_shape(lambda: flux.Flux(MIXED, rngs=nnx.Rngs(0)))
    assert "shapes alone" in repr(abstract) and "parameters" in repr(abstract)
    said = []

    @jax.jit
    def traced(params):
        said.append(repr(flux.model_of(MIXED, params)))
        return 0

    traced(params)
    assert "shapes alone" in said[0] and repr(abstract).split("\n")[0] == said[0].split("\n")[0]
    assert "Flux object" in repr(object.__new__(flux.Flux))
