"""Torch models as oracles: every parameter random, and their tensors as our parameters."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from d2m_jax.named_arrays import names, restructure
from d2m_jax.weights.keys.key_table import check_fit, parameters
from tests.seed import SEED


def shaken(model):
    """The model with noise on all parameters: at birth norms are 1 and biases 0."""
    import torch

    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tensors(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def imported(table, tensors, initialise):
    """A torch model's tensors as our parameters, by a key table; none missing, none left over."""
    like = jax.eval_shape(initialise)
    shapes = {name: a.shape for name, a in names(like).items()}
    check_fit("the oracle", table, tensors, shapes)
    found = parameters(table, tensors, shapes, np.float32)
    return restructure(like, {name: jnp.asarray(p[...]) for name, p in found.items()})


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


def operations(jaxpr) -> list:
    """Those of a program and its inner programs."""
    inner = [operations(part) for e in jaxpr.eqns for part in jaxprs_in_params(e.params)]
    return sum(inner, list(jaxpr.eqns))
