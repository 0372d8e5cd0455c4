"""The transformer, dense or sparse, by the names of torch_module/sparse_flux.py.

They are BFL's but where a block is sparse or split in our tree: nothing is stacked or fused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.weights.keys.flux_keys import (
    bfl_double_attention,
    bfl_mlp,
    bfl_top,
    linear,
    numbered_blocks,
)
from d2m_jax.weights.keys.key_table import Entry


def keys(config: FluxConfig) -> list[Entry]:
    """The table of any transformer."""
    entries = list(bfl_top(config))
    if config.modulation_rank is not None:
        entries += _weight("modulation_basis", "modulation_basis")
    for stack, i, start, index in numbered_blocks(config, "double"):
        entries += bfl_double_attention(i, start, index)
        for stream in ("img", "txt"):
            theirs, ours = f"double_blocks.{i}.{stream}_mlp", f"{start}.{stream}_mlp"
            entries += _ffn(config, stack, theirs, ours, index)
    for stack, i, start, index in numbered_blocks(config, "single"):
        theirs = f"single_blocks.{i}"
        for name in ("modulation.lin", "qkv", "attn_out"):
            entries += linear(f"{theirs}.{name}", f"{start}.{name}", index)
        for norm in ("norm.query_norm.scale", "norm.key_norm.scale"):
            entries.append(Entry(f"{theirs}.{norm}", f"{start}.{norm}", "same", index))
        found = _ffn(config, stack, f"{theirs}.mlp", f"{start}.mlp", index)
        # attn_out owns the bias of the FFN's output.
        owned = (f"{start}.mlp.out_layer.bias", f"{start}.mlp.shared.out_layer.bias")
        entries += [entry for entry in found if entry.ours not in owned]
    return [*entries, *_routers(config, "double"), *_routers(config, "single")]


def _ffn(
    config: FluxConfig, stack: StackConfig, theirs: str, ours: str, index: tuple[int, ...]
) -> Iterator[Entry]:
    if stack.ffn == "dense":
        yield from bfl_mlp(theirs, ours, index)
        return
    yield from bfl_mlp(f"{theirs}.shared", f"{ours}.shared", index)
    yield from linear(f"{theirs}.gate", f"{ours}.gate", index)
    if config.moe.router_input == "unmodulated":
        yield from _weight(f"{theirs}.gate_cond", f"{ours}.gate_cond", index)
    yield Entry(f"{theirs}.scale", f"{ours}.scale", "same", index)
    for i in range(config.moe.experts):
        expert, at = f"{theirs}.experts.{i}", (*index, i)
        yield Entry(f"{expert}.0.weight", f"{ours}.experts.in_kernel", "linear", at)
        yield Entry(f"{expert}.0.bias", f"{ours}.experts.in_bias", "same", at)
        yield Entry(f"{expert}.2.weight", f"{ours}.experts.out_kernel", "linear", at)


def _routers(config: FluxConfig, kind: Literal["double", "single"]) -> Iterator[Entry]:
    for stack, i, start, (group, block) in numbered_blocks(config, kind):
        if stack.mixes and block == 0:
            theirs, ours = f"{kind}_routers.{i}", start.removesuffix("block") + "router"
            yield from linear(f"{theirs}.features", f"{ours}.features", (group,))
            yield from _weight(f"{theirs}.vec", f"{ours}.vec", (group,))


def _weight(theirs: str, ours: str, index: tuple[int, ...] = ()) -> list[Entry]:
    """A linear without bias."""
    return linear(theirs, ours, index)[:1]


# Of every linear, norm and scale, by the end of its name.
MEANINGS = {
    "img_in": "noisy latents, packed, to the model's width D",
    "txt_in": "T5's tokens to D",
    "time_in.in_layer": "sinusoid of the time (256: cosines, sines) to D; SiLU follows",
    "time_in.out_layer": "the time's part of the global vector",
    "guidance_in.in_layer": "sinusoid of the guidance (256: cosines, sines) to D; SiLU follows",
    "guidance_in.out_layer": "the guidance's part of the global vector",
    "vector_in.in_layer": "CLIP's pooled vector to D; SiLU follows",
    "vector_in.out_layer": "the pooled text's part of the global vector",
    "modulation_basis": "SiLU of the global vector to the basis that all blocks' modulations read",
    "mod.lin": "(shift, scale, gate) of the attention, then of the FFN",
    "modulation.lin": "(shift, scale, gate) of the block",
    "qkv": "queries, keys, values, heads within each",
    "query_norm.scale": "RMS norm of a head's queries",
    "key_norm.scale": "RMS norm of a head's keys",
    "attn.proj": "output of the attention",
    "attn_out": "output of the attention (left part of BFL's linear2, with its bias)",
    "mlp.0": "dense FFN, D to hidden; GELU in tanh's form follows",
    "mlp.2": "dense FFN, hidden to D",
    "shared.0": "shared expert, which every token goes through; GELU follows",
    "shared.2": "shared expert, hidden to D",
    "gate": "the token to the experts' logits; computed in float32",
    "gate_cond": "SiLU of the global vector, added to the experts' logits",
    "mlp.scale": "what the sum of the chosen experts is multiplied by",
    "{expert}.0": "normal expert, D to hidden; GELU follows",
    "{expert}.2": "normal expert, hidden to D",
    "features": "block router: means of image and text tokens, each normalised, to logits",
    "vec": "block router: the global vector to logits",
    "final_layer.adaLN_modulation.1": "(shift, scale) of the last norm",
    "final_layer.linear": "D to the velocity of the packed latents",
}


def describe(config: FluxConfig, tensors: Mapping[str, Any]) -> str:
    """KEYS.md: every pattern of names in `tensors` with its shape, type and meaning."""
    rows: dict[tuple, set[int]] = {}
    for name, tensor in tensors.items():
        pattern = re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", name)
        pattern = re.sub(r"(_blocks\.\d+)\.(img|txt)_", r"\1.{img,txt}_", pattern)
        number = re.search(r"(?<=_blocks\.)\d+|(?<=_routers\.)\d+", name)
        if number:
            which = "{block}" if "_blocks" in name else "{first block}"
            pattern = re.sub(r"(_blocks|_routers)\.\d+", rf"\1.{which}", pattern)
        shape = " × ".join(map(str, tensor.shape)) or "one number"
        row = rows.setdefault((pattern, shape, str(tensor.dtype)), set())
        row |= {int(number[0])} if number else set()
    table = [
        f"| `{pattern}` | {_ranges(sorted(blocks))} | {shape} | {dtype} | {meaning(pattern)} |"
        for (pattern, shape, dtype), blocks in rows.items()
    ]
    groups = [
        f"- {kind}: {s.groups} times {s.active} of {s.blocks} blocks run; {s.ffn} FFN"
        for kind, *_, s in config.named_stacks
    ]
    return KEYS.format(groups="\n".join(groups), rows="\n".join(table), last=config.moe.experts - 1)


def meaning(pattern: str) -> str:
    """What a tensor is for: the entry of MEANINGS with the longest end in common."""
    module = re.sub(r"\.(weight|bias)$", "", pattern).replace("{img,txt}_", "")
    found = [end for end in MEANINGS if f".{module}".endswith(f".{end}")]
    return MEANINGS[max(found, key=len)]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 3, 7] as "0-3, 7"."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


KEYS = """# The tensors of this model

`sparse_flux.py` runs it: `model = sparse_flux.load(folder, device="cuda")`. `config.json` holds its
sizes. Weights of linears are [outputs, inputs]. Blocks are numbered from 0 through all groups; a
group of which not all blocks run has a router, named by the number of its first block.

{groups}

Where an FFN is a mixture of experts (moe), `{{expert}}` counts the normal ones from 0 to {last}.

| name | blocks | shape | type | meaning |
|---|---|---|---|---|
{rows}
"""
