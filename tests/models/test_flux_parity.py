"""The dense transformer against code that we did not write: diffusers' FluxTransformer2DModel."""

import os
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.flux import abstract, model_of
from d2m_jax.named_arrays import names
from d2m_jax.weights.keys import flux_keys, key_table
from d2m_jax.weights.torch_files import torch_import
from tests.models import toy
from tests.seed import SEED, generator

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def ours(state, config):
    """Diffusers' tensors, or gradients by their names, in our tree."""
    state = {name: tensor.detach().numpy() for name, tensor in state.items()}
    like = abstract(config)
    table, shapes = (
        flux_keys.keys("diffusers", config),
        {n: a.shape for n, a in names(like).items()},
    )
    key_table.check_fit("diffusers", table, state, shapes)
    return torch_import.load(key_table.parameters(table, state, shapes, np.float32), like)


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("doubles", "singles", "guidance", "batch", "grid", "text"),
    [(2, 2, True, 2, (3, 5), 4), (1, 3, False, 3, (4, 1), 7)],
)
def test_forward_and_gradients(doubles, singles, guidance, batch, grid, text):
    config = FluxConfig(
        in_channels=12,
        vec_in_dim=20,
        context_in_dim=24,
        hidden_size=32,
        num_heads=2,
        axes_dim=(4, 6, 6),
        guidance_embed=guidance,
        double=(StackConfig(doubles),),
        single=(StackConfig(singles),),
    )
    torch.manual_seed(SEED)
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=12,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms' scales are 1 at birth
            parameter += 0.1 * torch.randn_like(parameter)

    img, img_ids, txt, txt_ids, t, y, strength = toy.inputs(config, batch, grid, text)
    if guidance:
        # 1000 · guidance turns the sinusoid so far that one rounding of its float32 frequency is
        # 3e-4 of the embedding, in diffusers as in ours: guidance as small as the times hides it
        strength = strength / 5
    target = generator(1).normal(size=img.shape).astype(np.float32)
    tensor = {
        name: None if a is None else torch.from_numpy(np.array(a))
        for name, a in {
            "hidden_states": img,
            "img_ids": img_ids[0],
            "encoder_hidden_states": txt,
            "txt_ids": txt_ids[0],
            "timestep": t,
            "pooled_projections": y,
            "guidance": strength,
        }.items()
    }
    expected = theirs(**tensor, return_dict=False)[0]
    ((expected - torch.from_numpy(target)) ** 2).mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        velocity = model_of(config, params)(img, img_ids, txt, txt_ids, t, y, strength)
        return jnp.square(velocity - target).mean(), velocity

    (_, velocity), found = loss(jax.tree.map(jnp.asarray, ours(theirs.state_dict(), config)))
    # float32 sums in another order, and rotary tables in float32 where diffusers takes float64
    # (4e-6, and four times that for other orders)
    assert relative(velocity, expected.detach().numpy()) < 1.6e-5
    # the backward pass doubles the chain; a wrong formula would be off by 1e-2 and more
    for path, gradient in jax.tree_util.tree_leaves_with_path(ours(gradients, config)):
        mine = found
        for key in path:
            mine = mine[key.key]
        assert relative(mine, gradient) < 1e-4, jax.tree_util.keystr(path)
