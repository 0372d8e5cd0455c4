"""The examples in docstrings of what others build into their models are run as they stand."""

import doctest
import importlib
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from d2m_jax import flow
from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.flux import model_of
from tests.models import toy

NAMES = {"jnp": jnp, "nnx": nnx, "flow": flow, "FluxConfig": FluxConfig, "StackConfig": StackConfig}
PLACES = {
    "MoE": "models.moe",
    "BlockRouter": "models.mob",
    "Flux": "models.flux",
    "lockstep": "distillation.lockstep",
    "grouped_matmul": "kernels.grouped_matmul",
    "balance": "distillation.losses",
}


@pytest.mark.parametrize("name", PLACES)
def test_example(name):
    module = importlib.import_module(f"d2m_jax.{PLACES[name]}")
    names = NAMES | vars(module)
    if name == "lockstep":
        models = (model_of(c, toy.params(c)) for c in (toy.DENSE, toy.SPARSE))
        names |= dict(zip(("teacher", "student"), models, strict=True), inputs=toy.inputs())
    (found,) = doctest.DocTestFinder(recurse=False).find(
        getattr(module, name), name, module, globs=names
    )
    said = []
    result = doctest.DocTestRunner().run(found, out=said.append)
    assert result.attempted >= 2 and result.failed == 0, "".join(said)


def test_the_example_of_a_model_of_your_own():
    page = (Path(__file__).parent.parent / "docs/python.md").read_text()
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "Layer" in block
    )
    names = {}
    exec(code, names)
    assert names["y"].shape == (4, 128, 64) and 1 <= names["balance"] < 2
