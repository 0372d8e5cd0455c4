"""The tensors of the dense model that a student was cut from, and where they lie in the student."""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from d2m_jax.config import FluxConfig
from d2m_jax.models.cut import MODULATION, Cut, dense_config
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.keys import flux_keys
from d2m_jax.weights.keys.flux_keys import Layout
from d2m_jax.weights.keys.key_table import Entry, Part, Picked

FFN = re.compile(r"(double|single)\.(\d+)\.block\.(\w*mlp)\.(in|out)_layer\.(kernel|bias)")
FACTOR = re.compile(r"(.*\.(?:img_mod|txt_mod|modulation)\.lin)\.kernel")


def keys(layout: Layout, config: FluxConfig, cut: Cut) -> tuple[list[Entry], dict]:
    """The dense model's table with the student's parameters, and the shapes of these. What `cut`
    does not tell of is there as the dense model has it."""
    was = dense_config(config, cut)
    before, there = sizes(abstract(was)), sizes(abstract(config))
    table, shapes = [], {}
    for old in flux_keys.keys(layout, was):
        for entry in _entries(old, config, cut):
            table.append(entry)
            shapes[entry.ours] = (before if entry is old else there)[entry.ours]
    return table, shapes


def _entries(entry: Entry, config: FluxConfig, cut: Cut) -> Iterator[Entry]:
    """What an entry of the dense model's becomes."""
    factor, ffn = FACTOR.fullmatch(entry.ours), FFN.fullmatch(entry.ours)
    if factor and config.modulation_rank is not None and MODULATION in cut:
        *rows, rest = cut[MODULATION]
        yield replace(entry, through=np.stack(rows))
        yield replace(entry, ours=f"{factor[1]}.bias", through=rest)
        return
    order = None if ffn is None else cut.get(_name(ffn, entry, config))
    if ffn is None or order is None:
        yield entry
        return
    kind, number, name, side, part = ffn.groups()
    stack = getattr(config, kind)[int(number)]
    start = f"{kind}.{number}.block.{name}"
    layer = start if stack.ffn == "dense" else f"{start}.shared"
    here = replace(entry, ours=f"{layer}.{side}_layer.{part}")
    if (side, part) == ("out", "bias"):
        yield here
        return

    def picked(entry: Entry, first: int, width: int) -> Entry:
        # Hidden neurons are rows of what leads to them, columns of what leads on.
        axis = 0 if side == "in" else 1
        begin = entry.their_part.start if isinstance(entry.their_part, Part) else 0  # if fused
        neurons = begin + order[first : first + width]
        return replace(entry, their_part=Picked(axis, neurons, begin + order.size))

    if stack.ffn == "dense":
        yield picked(here, 0, config.ffn_width(stack))
        return
    shared, width = config.shared_width(stack), config.expert_width(stack)
    yield picked(here, 0, shared)
    for i in range(config.moe.experts):
        one = replace(entry, ours=f"{start}.experts.{side}_{part}", index=(*entry.index, i))
        yield picked(one, shared + i * width, width)


def _name(ffn: re.Match, entry: Entry, config: FluxConfig) -> str:
    """The FFN of an entry as a cut calls it."""
    kind, number, (group, block) = ffn[1], int(ffn[2]), entry.index
    found = next(s for s in config.named_stacks if (s.kind, s.number) == (kind, number))
    return f"{kind}.{found.first + group * found.stack.blocks + block}.{ffn[3]}"
