"""The dense transformer against code that we did not write: diffusers' FluxTransformer2DModel."""

import os
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.flux import model_of
from tests.models import toy

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def ours(state, config):
    """Diffusers' tensors, or gradients by their names, in our tree."""
    state = {name: tensor.detach().numpy() for name, tensor in state.items()}
    dim = config.hidden_size

    def linear(*names):
        """One linear, or several side by side."""
        weight = np.concatenate([state.pop(f"{name}.weight") for name in names])
        bias = np.concatenate([state.pop(f"{name}.bias") for name in names])
        return {"kernel": weight.T, "bias": bias}

    def embedder(name):
        first, second = (f"time_text_embed.{name}_embedder.linear_{i}" for i in (1, 2))
        return {"in_layer": linear(first), "out_layer": linear(second)}

    def norm(query, key):
        return {
            "query_norm": {"scale": state.pop(f"{query}.weight")},
            "key_norm": {"scale": state.pop(f"{key}.weight")},
        }

    def double(i):
        block = f"transformer_blocks.{i}"

        def stream(mod, qkv, norms, proj, mlp):
            names = [f"{block}.attn.{name}" for name in qkv]
            return (
                {"lin": linear(f"{block}.{mod}.linear")},
                {
                    "qkv": linear(*names),
                    "norm": norm(*(f"{block}.attn.{name}" for name in norms)),
                    "proj": linear(f"{block}.attn.{proj}"),
                },
                {
                    "in_layer": linear(f"{block}.{mlp}.net.0.proj"),
                    "out_layer": linear(f"{block}.{mlp}.net.2"),
                },
            )

        img = ("norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff")
        added = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        txt = ("norm1_context", *added, "to_add_out", "ff_context")
        parts = ("mod", "attn", "mlp")
        return {f"img_{p}": v for p, v in zip(parts, stream(*img), strict=True)} | {
            f"txt_{p}": v for p, v in zip(parts, stream(*txt), strict=True)
        }

    def single(i):
        block = f"single_transformer_blocks.{i}"
        out = linear(f"{block}.proj_out")
        return {
            "modulation": {"lin": linear(f"{block}.norm.linear")},
            "qkv": linear(*(f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v"))),
            "norm": norm(f"{block}.attn.norm_q", f"{block}.attn.norm_k"),
            "attn_out": {"kernel": out["kernel"][:dim], "bias": out["bias"]},
            "mlp": {
                "in_layer": linear(f"{block}.proj_mlp"),
                "out_layer": {"kernel": out["kernel"][dim:]},
            },
        }

    def stack(block, depth):
        blocks = [block(i) for i in range(depth)]
        return {0: {"block": jax.tree.map(lambda *a: np.stack(a)[:, None], *blocks)}}

    last = linear("norm_out.linear")
    swapped = {k: np.concatenate(np.split(a, 2, axis=-1)[::-1], -1) for k, a in last.items()}
    tree = {
        "img_in": linear("x_embedder"),
        "txt_in": linear("context_embedder"),
        "time_in": embedder("timestep"),
        "vector_in": embedder("text"),
        "double": stack(double, config.double[0].depth),
        "single": stack(single, config.single[0].depth),
        "final_layer": {"adaLN_modulation": swapped, "linear": linear("proj_out")},
    }
    if config.guidance_embed:
        tree["guidance_in"] = embedder("guidance")
    assert not state, f"left over: {list(state)}"
    return tree


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
    torch.manual_seed(0)
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
    target = np.random.default_rng(1).normal(size=img.shape).astype(np.float32)
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
    assert relative(velocity, expected.detach().numpy()) < 1e-5
    # the backward pass doubles the chain; a wrong formula would be off by 1e-2 and more
    for path, gradient in jax.tree_util.tree_leaves_with_path(ours(gradients, config)):
        mine = found
        for key in path:
            mine = mine[key.key]
        assert relative(mine, gradient) < 1e-4, jax.tree_util.keystr(path)
