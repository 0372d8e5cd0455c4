"""A FLUX.1 transformer, dense or made sparse by Dense2MoE, in plain PyTorch, to be read in one go.

    import sparse_flux
    model = sparse_flux.load("the folder of this file", device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        velocity = model(img, img_ids, txt, txt_ids, timesteps, y, guidance)

It needs torch >= 2.1 and safetensors, reads config.json and model*.safetensors beside it, and runs
no code but its own. Names are those of Black Forest Labs' src/flux; KEYS.md lists the tensors.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

Config = SimpleNamespace  # config.json, or a stack of it
Tensors = tuple[Tensor, ...]  # streams: (img, txt) in a double block, (x,) in a single one


def load(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> "Flux":
    """The model of a folder; norms, routers and what makes the global vector stay float32."""
    folder = Path(folder)
    text = (folder / "config.json").read_text()
    config = json.loads(text, object_hook=lambda fields: Config(**fields))
    with torch.device("meta"):
        model = Flux(config.transformer)
    exact = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, (Linear32, RMSNorm)))
    state = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():
                wanted = torch.float32 if name.startswith(exact) else dtype
                state[name] = tensors.get_tensor(name).to(wanted)
    model.load_state_dict(state, assign=True)  # strict: every tensor is there, and no other
    return model


class Context(NamedTuple):
    """What every block of one forward reads beside its streams."""

    vec: Tensor  # [b, D] float32: time + guidance + pooled text
    cond: Tensor  # [b, D or r]: what modulations read, silu(vec) or its projection on the basis
    cos: Tensor  # [b or 1, n, 1, half a head] float32: rotary tables of [txt, img]
    sin: Tensor
    text_tokens: int
    top_k: int | None  # normal experts per token; None: the config's

    def samples(self, rows: Tensor) -> "Context":
        """The same for some samples of the batch."""
        tables = (self.cos, self.sin)
        if self.cos.shape[0] != 1:
            tables = (self.cos[rows], self.sin[rows])
        return Context(self.vec[rows], self.cond[rows], *tables, self.text_tokens, self.top_k)


class Linear32(nn.Linear):
    """A linear that computes in float32 whatever the model's type is."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a scale, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (y * self.scale.float()).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def frequencies(count: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-i / count), rounded once, to float32 (not every device has float64)."""
    exponent = torch.arange(count, dtype=torch.float64, device="cpu") / count
    return (float(theta) ** -exponent).float().to(device)


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """[cos, sin] of 1000 t in float32."""
    angle = 1000.0 * t.float()[:, None] * frequencies(dim // 2, 10_000, t.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope(ids: Tensor, axes_dim: list[int], theta: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [b, n, 1, half a head] of positions [b, n, axes], float32."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        angles.append(ids[..., axis, None].float() * frequencies(dim // 2, theta, ids.device))
    angle = torch.cat(angles, dim=-1)[:, :, None]
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of the last axis of [b, n, heads, d], in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * a - sin * b, sin * a + cos * b], dim=-1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Attention with rotary positions: [b, n, heads, d] three times to [b, n, D]."""
    q, k = (apply_rope(x, context.cos, context.sin) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class MLPEmbedder(nn.Module):
    """Time, guidance and pooled text enter the global vector through one each."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.in_layer = Linear32(inputs, dim)
        self.out_layer = Linear32(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """(shift, scale, gate) once or twice, each [b, 1, D]."""

    def __init__(self, config: Config, chunks: int):
        super().__init__()
        dim = config.hidden_size
        self.lin = nn.Linear(config.modulation_rank or dim, chunks * dim)
        self.chunks = chunks

    def forward(self, cond: Tensor) -> Tensors:
        return self.lin(cond)[:, None].chunk(self.chunks, dim=-1)


class QKNorm(nn.Module):
    """Norms of queries and keys per head."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, qkv: Tensor, heads: int) -> list[Tensor]:
        """[b, n, 3 D] to queries, keys and values [b, n, heads, d]."""
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, dim=-1))
        return [self.query_norm(q), self.key_norm(k), v]


class SelfAttention(nn.Module):
    """The projections of one stream of a double block."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)


def mlp(dim: int, width: int, out_bias: bool) -> nn.Sequential:
    """A dense FFN or one expert."""
    last = nn.Linear(width, dim, bias=out_bias)
    return nn.Sequential(nn.Linear(dim, width), nn.GELU("tanh"), last)


class MoE(nn.Module):
    """shared(x) + scale * sum of weight_i * expert_i(x) over the top k experts of each token."""

    def __init__(self, config: Config, width: int, out_bias: bool):
        super().__init__()
        dim, moe = config.hidden_size, config.moe
        shared = round(moe.shared_ratio * dim)
        expert = (width - shared) // moe.experts
        self.config = moe
        self.shared = mlp(dim, shared, out_bias)
        self.experts = nn.ModuleList(mlp(dim, expert, False) for _ in range(moe.experts))
        self.gate = Linear32(dim, moe.experts)
        if moe.router_input == "unmodulated":
            self.gate_cond = Linear32(dim, moe.experts, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, unmodulated: Tensor, context: Context) -> Tensor:
        k = self.config.top_k if context.top_k is None else context.top_k
        y = self.shared(x)
        chosen, weight = self.route(x, unmodulated, context.vec, k)
        tokens, chosen, weight = x.flatten(0, 1), chosen.flatten(0, 1), weight.flatten(0, 1)
        routed = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, choice = (chosen == i).nonzero(as_tuple=True)
            if len(token) > 0:  # an expert sees only the tokens that chose it
                out = expert(tokens.index_select(0, token))
                routed.index_add_(0, token, out * weight[token, choice, None].to(x.dtype))
        return y + self.scale.to(x.dtype) * routed.view_as(y)

    def route(self, x: Tensor, unmodulated: Tensor, vec: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The chosen experts and their weights, each [b, n, k]; float32."""
        if self.config.router_input == "modulated":
            logits = self.gate(x)
        else:
            logits = self.gate(unmodulated) + self.gate_cond(F.silu(vec))[:, None]
        # As many experts as trained weigh that many, whatever k is.
        trained = self.config.trained_top_k or max(1, self.config.top_k)
        top, chosen = logits.topk(max(k, trained), dim=-1)
        if self.config.gate == "renormalised":
            weight = trained * (top - top[..., :trained].logsumexp(-1, keepdim=True)).exp()
        elif self.config.gate == "softmax":
            weight = logits.shape[-1] * logits.softmax(-1).gather(-1, chosen)
        else:
            weight = 2 * top.sigmoid()
        return chosen[..., :k], weight[..., :k]


FFN = nn.Sequential | MoE


def feed_forward(config: Config, stack: Config, out_bias: bool = True) -> FFN:
    """The FFN that a stack asks for."""
    width = round(stack.mlp_ratio * config.hidden_size)
    if stack.ffn == "moe":
        return MoE(config, width, out_bias)
    return mlp(config.hidden_size, width, out_bias)


def call(ffn: FFN, x: Tensor, unmodulated: Tensor, context: Context) -> Tensor:
    """The FFN's output; only a router reads more than x."""
    return ffn(x, unmodulated, context) if isinstance(ffn, MoE) else ffn(x)


class DoubleStreamBlock(nn.Module):
    """Image and text with weights of their own, joined in attention."""

    def __init__(self, config: Config, stack: Config):
        super().__init__()
        self.heads = config.num_heads
        self.img_mod = Modulation(config, 6)
        self.img_attn = SelfAttention(config.hidden_size, config.num_heads)
        self.img_mlp = feed_forward(config, stack)
        self.txt_mod = Modulation(config, 6)
        self.txt_attn = SelfAttention(config.hidden_size, config.num_heads)
        self.txt_mlp = feed_forward(config, stack)

    def forward(self, streams: Tensors, context: Context) -> Tensors:
        img, txt = streams
        img_mod, txt_mod = self.img_mod(context.cond), self.txt_mod(context.cond)
        img_qkv = self.project(self.img_attn, img, img_mod)
        txt_qkv = self.project(self.txt_attn, txt, txt_mod)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv, strict=True))
        attn = attend(q, k, v, context)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]
        img = self.update(img, self.img_attn.proj(img_attn), self.img_mlp, img_mod, context)
        txt = self.update(txt, self.txt_attn.proj(txt_attn), self.txt_mlp, txt_mod, context)
        return img, txt

    def project(self, attn: SelfAttention, x: Tensor, mod: Tensors) -> list[Tensor]:
        """Queries, keys and values of one stream."""
        return attn.norm(attn.qkv(modulate(layer_norm(x), mod[0], mod[1])), self.heads)

    def update(self, x: Tensor, attn: Tensor, ffn: FFN, mod: Tensors, context: Context) -> Tensor:
        """One stream after attention and FFN."""
        x = x + mod[2] * attn
        norm = layer_norm(x)
        return x + mod[5] * call(ffn, modulate(norm, mod[3], mod[4]), norm, context)


class SingleStreamBlock(nn.Module):
    """Text and image joined, attention and FFN side by side. BFL's linear1 is qkv and mlp.0 here,
    its linear2 attn_out (which owns the bias of both) and mlp.2."""

    def __init__(self, config: Config, stack: Config):
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_heads
        self.modulation = Modulation(config, 3)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // config.num_heads)
        self.attn_out = nn.Linear(dim, dim)
        self.mlp = feed_forward(config, stack, out_bias=False)

    def forward(self, streams: Tensors, context: Context) -> Tensors:
        (x,) = streams
        shift, scale, gate = self.modulation(context.cond)
        norm = layer_norm(x)
        x_mod = modulate(norm, shift, scale)
        attn = attend(*self.norm(self.qkv(x_mod), self.heads), context)
        return (x + gate * (self.attn_out(attn) + call(self.mlp, x_mod, norm, context)),)


class BlockRouter(nn.Module):
    """Which blocks of a group run, [b, active], by pooled image and text and the global vector."""

    def __init__(self, config: Config, blocks: int, active: int):
        super().__init__()
        self.alpha, self.active, self.choice = config.mob_alpha, active, config.mob_choice
        self.features = Linear32(2 * config.hidden_size, blocks)
        self.vec = Linear32(config.hidden_size, blocks, bias=False)

    def forward(self, streams: Tensors, context: Context) -> Tensor:
        if len(streams) == 1:
            streams = streams[0].tensor_split([context.text_tokens], dim=1)[::-1]
        means = [part.float().mean(1) for part in streams]
        means = [m * torch.rsqrt(m.square().mean(-1, keepdim=True) + 1e-6) for m in means]
        features = self.features(torch.cat(means, dim=-1))
        logits = self.alpha * features + (1 - self.alpha) * self.vec(context.vec)
        if self.choice == "any":
            return logits.topk(self.active, dim=-1).indices
        first = logits.unfold(-1, self.active, 1).sum(-1).argmax(-1, keepdim=True)
        return first + torch.arange(self.active, device=first.device)


class LastLayer(nn.Module):
    """Modulated norm and projection to the tokens' channels."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, channels)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(layer_norm(x), shift, scale))


class Flux(nn.Module):
    """The transformer. `config` is "transformer" of config.json; a stack of it is `groups` groups
    of `blocks` blocks, of which a router picks `active` per sample where they are fewer."""

    def __init__(self, config: Config):
        super().__init__()
        dim, self.config = config.hidden_size, config
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_in = nn.Linear(config.context_in_dim, dim)
        self.time_in = MLPEmbedder(256, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, dim)
        if config.modulation_rank is not None:
            self.modulation_basis = Linear32(dim, config.modulation_rank, bias=False)
        self.double_blocks, self.double_routers, self.double_groups = stacks(
            DoubleStreamBlock, config, config.double
        )
        self.single_blocks, self.single_routers, self.single_groups = stacks(
            SingleStreamBlock, config, config.single
        )
        self.final_layer = LastLayer(dim, config.in_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        top_k: int | None = None,
    ) -> Tensor:
        """Velocity [b, n, channels] in float32. img [b, n, channels], img_ids [b or 1, n, 3], txt
        [b, l, T5's width], txt_ids [b or 1, l, 3], timesteps [b] in [0, 1], y [b, CLIP's width],
        guidance [b]; top_k normal experts per token, 0 to n, where others than the config's."""
        dtype = self.img_in.weight.dtype
        vec = self.time_in(timestep_embedding(timesteps))
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("guidance: this model has a guidance embedding, found none")
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        vec = vec + self.vector_in(y)
        cond = F.silu(vec)
        if self.config.modulation_rank is not None:
            cond = self.modulation_basis(cond)
        ids = torch.cat([txt_ids, img_ids], dim=1)
        tables = rope(ids, self.config.axes_dim, self.config.theta)
        context = Context(vec, cond.to(dtype), *tables, txt.shape[1], top_k)
        streams = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))
        for group in self.double_groups:
            streams = run_group(self.double_blocks, self.double_routers, group, streams, context)
        img, txt = streams
        streams = (torch.cat([txt, img], dim=1),)
        for group in self.single_groups:
            streams = run_group(self.single_blocks, self.single_routers, group, streams, context)
        return self.final_layer(streams[0][:, txt.shape[1] :], vec.to(dtype)).float()


def stacks(
    kind: type[nn.Module], config: Config, of: list[Config]
) -> tuple[nn.ModuleList, nn.ModuleDict, list[range]]:
    """All blocks of one kind, the routers by the number of their group's first block, and every
    group's numbers of blocks."""
    blocks, routers, groups = nn.ModuleList(), nn.ModuleDict(), []
    for stack in of:
        for _ in range(stack.groups):
            first = len(blocks)
            groups.append(range(first, first + stack.blocks))
            blocks.extend(kind(config, stack) for _ in range(stack.blocks))
            if stack.active < stack.blocks:
                routers[str(first)] = BlockRouter(config, stack.blocks, stack.active)
    return blocks, routers, groups


def run_group(
    blocks: nn.ModuleList, routers: nn.ModuleDict, group: range, streams: Tensors, context: Context
) -> Tensors:
    """Run the blocks of one group, each on the samples that chose it."""
    if str(group.start) not in routers:
        for i in group:
            streams = blocks[i](streams, context)
        return streams
    chosen = routers[str(group.start)](streams, context)
    for i in group:
        rows = (chosen == i - group.start).any(dim=1).nonzero()[:, 0]
        if len(rows) > 0:
            some = tuple(x.index_select(0, rows) for x in streams)
            some = blocks[i](some, context.samples(rows))
            pairs = zip(streams, some, strict=True)
            streams = tuple(x.index_copy(0, rows, new) for x, new in pairs)
    return streams
