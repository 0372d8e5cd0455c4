"""The transformer in torch's two layouts, Black Forest Labs' (BFL) and diffusers', any depth."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from d2m_jax.config import KINDS, SHOWN, ConfigError, FluxConfig, StackConfig, check, listed
from d2m_jax.weights.keys.key_table import Entry, Part

Layout = Literal["bfl", "diffusers"]
Span = tuple[int, int] | None  # of the outputs of a linear


def keys(layout: Layout, config: FluxConfig) -> list[Entry]:
    """The table of a dense transformer. ConfigError for a sparse one, which these layouts cannot
    hold."""
    sparse = [s for s in config.stacks if s.ffn == "moe" or s.mixes]
    check(
        not sparse and config.modulation_rank is None,
        f"the layout {layout!r} holds dense models only, found a sparse model; to export it use"
        " --export torch",
    )
    top, double, single = {
        "bfl": (bfl_top, _bfl_double, _bfl_single),
        "diffusers": (_diffusers_top, _diffusers_double, _diffusers_single),
    }[layout]
    entries = list(top(config))
    for stack, i, start, index in numbered_blocks(config, "double"):
        entries += double(config, stack, i, start, index)
    for stack, i, start, index in numbered_blocks(config, "single"):
        entries += single(config, stack, i, start, index)
    return entries


def numbered_blocks(
    config: FluxConfig, kind: Literal["double", "single"]
) -> Iterator[tuple[StackConfig, int, str, tuple[int, int]]]:
    """Every block's stack, number, start of our names, and index in their leading axes."""
    i = 0
    for n, stack in enumerate(getattr(config, kind)):
        for group in range(stack.groups):
            for block in range(stack.blocks):
                yield stack, i, f"{kind}.{n}.block", (group, block)
                i += 1


def linear(
    theirs: str, ours: str, index: tuple[int, ...] = (), at: Span = None, our: Span = None
) -> list[Entry]:
    """Weight and bias of a linear; `at` and `our` are the outputs meant, in theirs and in ours."""
    their_part, our_part = at and Part(0, *at), our and Part(-1, *our)
    return [
        Entry(f"{theirs}.weight", f"{ours}.kernel", "linear", index, their_part, our_part),
        Entry(f"{theirs}.bias", f"{ours}.bias", "same", index, their_part, our_part),
    ]


def _single_out(
    theirs: str, config: FluxConfig, stack: StackConfig, ours: str, index: tuple[int, ...]
) -> list:
    """[attn, mlp] → output with one bias, which is attn_out's in our tree."""
    dim = config.hidden_size
    attention, ffn = Part(1, 0, dim), Part(1, dim, dim + config.ffn_width(stack))
    return [
        Entry(f"{theirs}.weight", f"{ours}.attn_out.kernel", "linear", index, attention),
        Entry(f"{theirs}.weight", f"{ours}.mlp.out_layer.kernel", "linear", index, ffn),
        Entry(f"{theirs}.bias", f"{ours}.attn_out.bias", "same", index),
    ]


def _embedders(config: FluxConfig) -> list[str]:
    return ["time", "vector"] + ["guidance"] * config.guidance_embed


def bfl_top(config: FluxConfig) -> Iterator[Entry]:
    """What lies around BFL's blocks."""
    same = ["img_in", "txt_in", "final_layer.linear"]
    same += [f"{e}_in.{layer}_layer" for e in _embedders(config) for layer in ("in", "out")]
    for name in same:
        yield from linear(name, name)
    yield from linear("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation")


def _bfl_double(
    config: FluxConfig, stack: StackConfig, i: int, start: str, index: tuple[int, ...]
) -> Iterator[Entry]:
    yield from bfl_double_attention(i, start, index)
    for stream in ("img", "txt"):
        yield from bfl_mlp(f"double_blocks.{i}.{stream}_mlp", f"{start}.{stream}_mlp", index)


def bfl_double_attention(i: int, start: str, index: tuple[int, ...]) -> Iterator[Entry]:
    """A double block of BFL's but for its FFNs."""
    for stream in ("img", "txt"):
        ours, theirs = f"{start}.{stream}", f"double_blocks.{i}.{stream}"
        for name in ("mod.lin", "attn.qkv", "attn.proj"):
            yield from linear(f"{theirs}_{name}", f"{ours}_{name}", index)
        for norm in ("query_norm.scale", "key_norm.scale"):
            name = f"attn.norm.{norm}"
            yield Entry(f"{theirs}_{name}", f"{ours}_{name}", "same", index)


def bfl_mlp(theirs: str, ours: str, index: tuple[int, ...]) -> Iterator[Entry]:
    """An FFN of BFL's."""
    yield from linear(f"{theirs}.0", f"{ours}.in_layer", index)
    yield from linear(f"{theirs}.2", f"{ours}.out_layer", index)


def _bfl_single(
    config: FluxConfig, stack: StackConfig, i: int, start: str, index: tuple[int, ...]
) -> Iterator[Entry]:
    theirs, width = f"single_blocks.{i}", 3 * config.hidden_size
    fused = width, width + config.ffn_width(stack)
    yield from linear(f"{theirs}.modulation.lin", f"{start}.modulation.lin", index)
    yield from linear(f"{theirs}.linear1", f"{start}.qkv", index, at=(0, width))
    yield from linear(f"{theirs}.linear1", f"{start}.mlp.in_layer", index, at=fused)
    yield from _single_out(f"{theirs}.linear2", config, stack, start, index)
    for norm in ("norm.query_norm.scale", "norm.key_norm.scale"):
        yield Entry(f"{theirs}.{norm}", f"{start}.{norm}", "same", index)


def _diffusers_top(config: FluxConfig) -> Iterator[Entry]:
    yield from linear("x_embedder", "img_in")
    yield from linear("context_embedder", "txt_in")
    yield from linear("proj_out", "final_layer.linear")
    called = {"time": "timestep", "vector": "text", "guidance": "guidance"}
    for name in _embedders(config):
        theirs = f"time_text_embed.{called[name]}_embedder.linear"
        yield from linear(f"{theirs}_1", f"{name}_in.in_layer")
        yield from linear(f"{theirs}_2", f"{name}_in.out_layer")
    # BFL chunks (shift, scale), diffusers (scale, shift).
    dim, ours = config.hidden_size, "final_layer.adaLN_modulation"
    first, second = (0, dim), (dim, 2 * dim)
    yield from linear("norm_out.linear", ours, at=first, our=second)
    yield from linear("norm_out.linear", ours, at=second, our=first)


def _qkv(theirs: tuple[str, ...], ours: str, index: tuple[int, ...], dim: int) -> Iterator[Entry]:
    for part, name in enumerate(theirs):
        yield from linear(name, f"{ours}.qkv", index, our=(part * dim, (part + 1) * dim))


def _diffusers_double(
    config: FluxConfig, stack: StackConfig, i: int, start: str, index: tuple[int, ...]
) -> Iterator[Entry]:
    theirs, dim = f"transformer_blocks.{i}", config.hidden_size
    for stream, mod, qkv, norms, proj, mlp in (
        ("img", "norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
        (
            "txt",
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "ff_context",
        ),
    ):
        ours, attn = f"{start}.{stream}", f"{theirs}.attn"
        yield from linear(f"{theirs}.{mod}.linear", f"{ours}_mod.lin", index)
        yield from _qkv(tuple(f"{attn}.{name}" for name in qkv), f"{ours}_attn", index, dim)
        for name, norm in zip(norms, ("query_norm", "key_norm"), strict=True):
            yield Entry(f"{attn}.{name}.weight", f"{ours}_attn.norm.{norm}.scale", "same", index)
        yield from linear(f"{attn}.{proj}", f"{ours}_attn.proj", index)
        yield from linear(f"{theirs}.{mlp}.net.0.proj", f"{ours}_mlp.in_layer", index)
        yield from linear(f"{theirs}.{mlp}.net.2", f"{ours}_mlp.out_layer", index)


def _diffusers_single(
    config: FluxConfig, stack: StackConfig, i: int, start: str, index: tuple[int, ...]
) -> Iterator[Entry]:
    theirs, dim = f"single_transformer_blocks.{i}", config.hidden_size
    yield from linear(f"{theirs}.norm.linear", f"{start}.modulation.lin", index)
    qkv = tuple(f"{theirs}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
    yield from _qkv(qkv, start, index, dim)
    for name, norm in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
        yield Entry(f"{theirs}.attn.{name}.weight", f"{start}.norm.{norm}.scale", "same", index)
    yield from linear(f"{theirs}.proj_mlp", f"{start}.mlp.in_layer", index)
    yield from _single_out(f"{theirs}.proj_out", config, stack, start, index)


# What the config is read from: our name → theirs.
SHAPES: dict[Layout, dict[str, str]] = {
    "bfl": {
        "img_in": "img_in.weight",
        "txt_in": "txt_in.weight",
        "vector_in": "vector_in.in_layer.weight",
        "final_layer": "final_layer.linear.weight",
        "guidance_in": "guidance_in.in_layer.weight",
        "double": "double_blocks",
        "double norm": "double_blocks.0.img_attn.norm.query_norm.scale",
        "double mlp": "double_blocks.0.img_mlp.0.bias",
        "single": "single_blocks",
        "single norm": "single_blocks.0.norm.query_norm.scale",
        "single mlp": "single_blocks.0.linear1.bias",
    },
    "diffusers": {
        "img_in": "x_embedder.weight",
        "txt_in": "context_embedder.weight",
        "vector_in": "time_text_embed.text_embedder.linear_1.weight",
        "final_layer": "proj_out.weight",
        "guidance_in": "time_text_embed.guidance_embedder.linear_1.weight",
        "double": "transformer_blocks",
        "double norm": "transformer_blocks.0.attn.norm_q.weight",
        "double mlp": "transformer_blocks.0.ff.net.0.proj.bias",
        "single": "single_transformer_blocks",
        "single norm": "single_transformer_blocks.0.attn.norm_q.weight",
        "single mlp": "single_transformer_blocks.0.proj_mlp.bias",
    },
}


def config_of(
    where: Any,
    layout: Layout,
    tensors: Mapping[str, Any],
    axes_dim: tuple[int, ...] | None = None,
) -> FluxConfig:
    """The config that the tensors' shapes tell; `where` names them in errors.

    Nothing in a file tells how a head is divided among the axes of the positions: `axes_dim`, else
    FLUX.1's (16, 56, 56), or for other widths of a head about the same shares. Raises ConfigError
    for the variants of FLUX.1 that read more than the noisy image.
    """
    called = SHAPES[layout]
    depths = {kind: _depth(where, called[kind], tensors) for kind in KINDS}
    needed = ["img_in", "txt_in", "vector_in", "final_layer"]
    needed += [f"{kind} {what}" for kind in depths for what in ("norm", "mlp") if depths[kind]]
    ranks = {n: 1 if " " in n else 2 for n in needed}
    wrong = [
        called[n] for n in needed if len(getattr(tensors.get(called[n]), "shape", ())) != ranks[n]
    ]
    check(not wrong, f"{where}: {len(wrong)} tensors missing or misshapen: {listed(wrong)}")
    check(any(depths.values()), f"{where}: expected blocks of a transformer, found none")
    shape = {n: tuple(tensors[called[n]].shape) for n in needed}
    dim, channels = shape["img_in"]
    refuse_variant(where, channels, shape["final_layer"][0])
    kind = "double" if depths["double"] else "single"
    head = shape[f"{kind} norm"][0]
    check(
        head > 0 and dim > 0 and dim % head == 0,
        f"{where}: {called[f'{kind} norm']} has {head} elements, expected the width of a head, a"
        f" divisor of {dim}",
    )
    if axes_dim is None:
        share = 2 * (7 * head // 32)
        axes_dim = (head - 2 * share, share, share)
    widths = {k: shape[f"{k} mlp"][0] for k in depths if depths[k]}
    if layout == "bfl" and depths["single"]:
        widths["single"] -= 3 * dim
    stacks = {k: (StackConfig(depths[k], mlp_ratio=widths[k] / dim),) for k in widths}
    try:
        return FluxConfig(
            in_channels=channels,
            vec_in_dim=shape["vector_in"][1],
            context_in_dim=shape["txt_in"][1],
            hidden_size=dim,
            num_heads=dim // head,
            axes_dim=axes_dim,
            guidance_embed=called["guidance_in"] in tensors,
            double=stacks.get("double", ()),
            single=stacks.get("single", ()),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _depth(where: Any, start: str, tensors: Mapping[str, Any]) -> int:
    """The greatest number of a block + 1: a block that is missing is then missed by name."""
    found = {int(m[1]) for n in tensors if (m := re.match(rf"{start}\.(\d{{1,9}})\.", n))}
    depth = max(found, default=-1) + 1
    if depth > 2 * len(found) + SHOWN:  # a damaged name, not a damaged file
        raise ConfigError(f"{where}: holds {start}.{depth - 1} and only {len(found)} such blocks")
    return depth


def refuse_variant(where: Any, channels: int, out: int) -> None:
    """Raise ConfigError for what reads more channels than it writes: the model's, or a LoRA's."""
    if channels == out:
        return
    variant = {384: "FLUX.1 Fill", 128: "FLUX.1 Depth or Canny"}.get(channels, "a FLUX.1 variant")
    raise ConfigError(
        f"{where}: {variant}, which reads {channels} channels (image, mask or hint beside the"
        f" noisy image) and writes {out}; expected a text-to-image model, which reads {out}"
    )


def diffusers_config(config: FluxConfig) -> dict[str, Any]:
    """config.json of diffusers' FluxTransformer2DModel. ConfigError where it has no such model."""
    for stack in config.stacks:
        check(
            stack.mlp_ratio == 4.0,
            f"StackConfig.mlp_ratio = {stack.mlp_ratio}: diffusers' FluxTransformer2DModel knows"
            " 4.0 only; expected the layout 'bfl' for such a model",
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": None,
        "num_layers": config.depth("double"),
        "num_single_layers": config.depth("single"),
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }
