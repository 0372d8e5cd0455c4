"""FLUX.1's two kinds of block (BFL src/flux/modules/layers.py), each with dense or MoE FFNs.

A block maps a tuple of streams to the same tuple, and reports what its FFNs did.
"""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.layers import (
    FFN,
    Linear,
    Modulation,
    ModulationOut,
    QKNorm,
    SelfAttention,
    attend,
    broadcast,
    heads,
    layer_norm,
    modulate,
)
from d2m_jax.models.moe import MoE
from d2m_jax.models.reports import Context, FFNReport, Streams

# The FFNs of each kind of block.
FFNS = {"double": ("img_mlp", "txt_mlp"), "single": ("mlp",)}


def ffn(
    config: FluxConfig, stack: StackConfig, *, out_bias: bool = True, rngs: nnx.Rngs
) -> FFN | MoE:
    """The FFN that a stack asks for."""
    dim = config.hidden_size
    if stack.ffn == "moe":
        widths = config.shared_width(stack), config.expert_width(stack)
        return MoE(dim, *widths, config.moe, out_bias=out_bias, rngs=rngs)
    return FFN(dim, config.ffn_width(stack), out_bias=out_bias, rngs=rngs)


def call_ffn(
    module: FFN | MoE,
    x: Float[Array, "b n d"],
    unmodulated: Float[Array, "b n d"],
    context: Context,
    name: str,
) -> tuple[Float[Array, "b n d"], FFNReport]:
    """The output and report of the FFN of this name; only a gate reads more than x. What is known
    of it, or asked of it, is in the context."""
    if isinstance(module, MoE):
        text = {"img_mlp": 0, "txt_mlp": x.shape[1]}.get(name, context.text_tokens)
        counted = context.counted(text, x.shape[1] - text)
        y, report = module(x, unmodulated, context, context.known.routed.get(name), counted)
    else:
        y, report = module(x), FFNReport()
    if report.choices is not None:
        image = report.choices[:, context.text_tokens :] if name == "mlp" else report.choices
        report = replace(report, choices=None if name == "txt_mlp" else image)
    tokens = context.tokens_of(name)
    if tokens is not None:
        samples = jnp.arange(x.shape[0])[:, None]
        report = replace(report, inputs=x[samples, tokens])
        if name in context.known.probes:
            y = y.at[samples, tokens].add(context.known.probes[name].astype(y.dtype))
    return y, report


class DoubleStreamBlock(nnx.Module):
    """Image and text with weights of their own, joined in attention."""

    def __init__(self, config: FluxConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        dim, num_heads = config.hidden_size, config.num_heads
        inputs = config.modulation_rank or dim
        self.img_mod = Modulation(inputs, dim, 2, rngs=rngs)
        self.img_attn = SelfAttention(dim, num_heads, rngs=rngs)
        self.img_mlp = ffn(config, stack, rngs=rngs)
        self.txt_mod = Modulation(inputs, dim, 2, rngs=rngs)
        self.txt_attn = SelfAttention(dim, num_heads, rngs=rngs)
        self.txt_mlp = ffn(config, stack, rngs=rngs)

    def __call__(self, streams: Streams, context: Context) -> tuple[Streams, dict[str, FFNReport]]:
        (img, txt), known = streams, context.known
        img_mod1, img_mod2 = self.img_mod(context.cond, known.modulations.get("img_mod"))
        txt_mod1, txt_mod2 = self.txt_mod(context.cond, known.modulations.get("txt_mod"))

        img_qkv = self.img_attn.project(modulate(layer_norm(img), img_mod1.shift, img_mod1.scale))
        txt_qkv = self.txt_attn.project(modulate(layer_norm(txt), txt_mod1.shift, txt_mod1.scale))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        attn = attend(q, k, v, context.pe)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]

        def update(
            x: Float[Array, "b n d"], branch: Float[Array, "b n d"], mod: ModulationOut
        ) -> Float[Array, "b n d"]:
            return x + broadcast(mod.gate, x) * branch

        img = update(img, self.img_attn.proj(img_attn), img_mod1)
        norm = layer_norm(img)
        x = modulate(norm, img_mod2.shift, img_mod2.scale)
        y, img_report = call_ffn(self.img_mlp, x, norm, context, "img_mlp")
        img = update(img, y, img_mod2)

        txt = update(txt, self.txt_attn.proj(txt_attn), txt_mod1)
        norm = layer_norm(txt)
        x = modulate(norm, txt_mod2.shift, txt_mod2.scale)
        y, txt_report = call_ffn(self.txt_mlp, x, norm, context, "txt_mlp")
        txt = update(txt, y, txt_mod2)
        return (img, txt), {"img_mlp": img_report, "txt_mlp": txt_report}


class SingleStreamBlock(nnx.Module):
    """Text and image joined; attention and FFN side by side. BFL's linear1 is qkv and mlp.in_layer,
    its linear2 attn_out (which owns the bias of both) and mlp.out_layer."""

    def __init__(self, config: FluxConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.modulation = Modulation(config.modulation_rank or dim, dim, 1, rngs=rngs)
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.norm = QKNorm(dim // config.num_heads)
        self.attn_out = Linear(dim, dim, rngs=rngs)
        self.mlp = ffn(config, stack, out_bias=False, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(self, streams: Streams, context: Context) -> tuple[Streams, dict[str, FFNReport]]:
        (x,), known = streams, context.known
        (mod,) = self.modulation(context.cond, known.modulations.get("modulation"))
        norm = layer_norm(x)
        x_mod = modulate(norm, mod.shift, mod.scale)
        q, k, v = heads(self.qkv, x_mod, self.num_heads)
        attn = attend(self.norm.query_norm(q), self.norm.key_norm(k), v, context.pe)
        y, report = call_ffn(self.mlp, x_mod, norm, context, "mlp")
        return (x + broadcast(mod.gate, x) * (self.attn_out(attn) + y),), {"mlp": report}
