"""Tiny FLUX.1 models as torch and diffusers make them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import inspect

import numpy as np

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.keys import flux_keys, key_table
from tests.seed import SEED, generator


def config(doubles=2, singles=3, guidance=True):
    return FluxConfig(
        in_channels=12,
        vec_in_dim=20,
        context_in_dim=24,
        hidden_size=32,
        num_heads=2,
        axes_dim=(8, 4, 4),
        guidance_embed=guidance,
        double=(StackConfig(doubles),),
        single=(StackConfig(singles),),
    )


def diffusers_model(config, dtype="float32", seed=0):
    """A model of diffusers with this config, whose every weight is random."""
    import diffusers
    import torch

    value = flux_keys.diffusers_config(config)
    del value["_class_name"]
    model = diffusers.FluxTransformer2DModel(**value).eval()
    generator = torch.Generator().manual_seed(SEED + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(getattr(torch, dtype))


def to_diffusers(state, dim=32):
    """Diffusers' own translation of BFL's names, made to believe in another width than 3072."""
    import torch
    from diffusers.loaders import single_file_utils as upstream

    code = inspect.getsource(upstream.convert_flux_transformer_checkpoint_to_diffusers)
    assert code.count("3072") == 1
    space = {"torch": torch}
    exec(code.replace("3072", str(dim)), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"](dict(state))


def random_state(layout, config, dtype=np.float32, seed=0):
    """Random arrays by torch's names of one layout."""
    rng = generator(seed)
    shapes = sizes(abstract(config))
    theirs = key_table.their_shapes(flux_keys.keys(layout, config), shapes)
    return {n: rng.normal(size=shape).astype(dtype) for n, shape in theirs.items()}
