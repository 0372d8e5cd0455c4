"""FLUX.1's two kinds of block (BFL src/flux/modules/layers.py), each with dense or MoE FFNs.

A block maps a tuple of streams to the same tuple: (img, txt) in a double block, the joined (x,) in
a single one.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.layers import (
    FFN,
    Linear,
    Modulation,
    QKNorm,
    SelfAttention,
    attend,
    heads,
    layer_norm,
    modulate,
)
from d2m_jax.models.moe import MoE

Streams = tuple[Array, ...]


@dataclass(frozen=True)
class Context:
    """What every block of one forward reads beside its streams."""

    vec: Float[Array, "b d"]  # the global vector: timestep + guidance + pooled text
    cond: Float[
        Array, "b r"
    ]  # what the modulations read: silu(vec) or its projection on the shared basis
    pe: tuple[Array, Array]  # rotary tables of [txt, img]
    text_tokens: int
    top_k: int | None = None  # normal experts per token; None: the config's
    collect: int = 0  # FFN inputs to hand out per sample, for calibration
    keep_routed: bool = False  # whether to hand out what the normal experts added
    # What a block need not compute: its modulations by name, and by the name of an FFN what its
    # normal experts added in an earlier step.
    known: dict[str, Array] = field(default_factory=dict)


def ffn(config: FluxConfig, stack: StackConfig, *, out_bias: bool = True, rngs) -> FFN | MoE:
    """The FFN that a stack asks for."""
    if stack.ffn == "moe":
        return MoE(config, stack, out_bias=out_bias, rngs=rngs)
    return FFN(config.hidden_size, config.ffn_width(stack), out_bias=out_bias, rngs=rngs)


def call_ffn(
    block: nnx.Module, name: str, x: Array, unmodulated: Array, context: Context
) -> tuple[Array, dict[str, Any]]:
    """The output of a block's FFN and what there is to know about it: routing, what the normal
    experts added and evenly spaced inputs when asked for."""
    module = getattr(block, name)
    if isinstance(module, MoE):
        routed = context.known.get(name)
        y, aux = module(x, unmodulated, context.vec, context.top_k, routed, context.keep_routed)
    else:
        y, aux = module(x), {}
    if context.collect:
        spaced = (
            jnp.linspace(0, x.shape[1] - 1, min(context.collect, x.shape[1])).round().astype(int)
        )
        aux = aux | {"input": x[:, spaced]}
    return y, aux


class DoubleStreamBlock(nnx.Module):
    """Image and text with weights of their own, joined in attention."""

    def __init__(self, config: FluxConfig, stack: StackConfig, *, rngs):
        dim, num_heads = config.hidden_size, config.num_heads
        inputs = config.modulation_rank or dim
        self.img_mod = Modulation(inputs, dim, 6, rngs=rngs)
        self.img_attn = SelfAttention(dim, num_heads, rngs=rngs)
        self.img_mlp = ffn(config, stack, rngs=rngs)
        self.txt_mod = Modulation(inputs, dim, 6, rngs=rngs)
        self.txt_attn = SelfAttention(dim, num_heads, rngs=rngs)
        self.txt_mlp = ffn(config, stack, rngs=rngs)

    def __call__(self, streams: Streams, context: Context) -> tuple[Streams, dict[str, Any]]:
        img, txt = streams
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(
            context.cond, context.known.get("img_mod")
        )
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(
            context.cond, context.known.get("txt_mod")
        )

        img_qkv = self.img_attn.project(modulate(layer_norm(img), img_shift1, img_scale1))
        txt_qkv = self.txt_attn.project(modulate(layer_norm(txt), txt_shift1, txt_scale1))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        attn = attend(q, k, v, context.pe)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]

        img = img + img_gate1.astype(img.dtype) * self.img_attn.proj(img_attn)
        norm = layer_norm(img)
        x = modulate(norm, img_shift2, img_scale2)
        y, img_aux = call_ffn(self, "img_mlp", x, norm, context)
        img = img + img_gate2.astype(img.dtype) * y

        txt = txt + txt_gate1.astype(txt.dtype) * self.txt_attn.proj(txt_attn)
        norm = layer_norm(txt)
        x = modulate(norm, txt_shift2, txt_scale2)
        y, txt_aux = call_ffn(self, "txt_mlp", x, norm, context)
        txt = txt + txt_gate2.astype(txt.dtype) * y
        return (img, txt), {"img_mlp": img_aux, "txt_mlp": txt_aux}


class SingleStreamBlock(nnx.Module):
    """Text and image joined; attention and FFN side by side. BFL's linear1 is qkv and mlp.in_layer,
    its linear2 attn_out (which owns the bias of both) and mlp.out_layer."""

    def __init__(self, config: FluxConfig, stack: StackConfig, *, rngs):
        dim = config.hidden_size
        self.modulation = Modulation(config.modulation_rank or dim, dim, 3, rngs=rngs)
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.norm = QKNorm(dim // config.num_heads)
        self.attn_out = Linear(dim, dim, rngs=rngs)
        self.mlp = ffn(config, stack, out_bias=False, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(self, streams: Streams, context: Context) -> tuple[Streams, dict[str, Any]]:
        (x,) = streams
        shift, scale, gate = self.modulation(context.cond, context.known.get("modulation"))
        norm = layer_norm(x)
        x_mod = modulate(norm, shift, scale)
        q, k, v = heads(self.qkv, x_mod, self.num_heads)
        attn = attend(self.norm.query_norm(q), self.norm.key_norm(k), v, context.pe)
        y, aux = call_ffn(self, "mlp", x_mod, norm, context)
        return (x + gate.astype(x.dtype) * (self.attn_out(attn) + y),), {"mlp": aux}
