"""What a LoRA can change: the linears and norms of a model, by all names that they have."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from d2m_jax.config import FluxConfig
from d2m_jax.models.cut import Cut
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.keys import cut_keys, flux_keys, key_table, sparse_keys
from d2m_jax.weights.keys.key_table import Entry
from d2m_jax.weights.lora import lora_names


@dataclass(frozen=True)
class Tensor:
    """A tensor of one of torch's layouts, and where it lies in our parameters."""

    name: str
    entries: tuple[Entry, ...]
    shape: tuple[int, ...]
    absent: bool  # from a sparse model, of which nobody knows where it has these
    whole: bool  # whether the model still has all of it: what was pruned, or of low rank, has not


@dataclass(frozen=True)
class Linear:
    """A linear, or a norm, of one of torch's layouts."""

    name: str
    layout: str
    weight: Tensor
    bias: Tensor | None


def linears(config: FluxConfig, cut: Cut) -> dict[str, Linear]:
    """All linears and norms by their flat names: those of the dense model that this is, or was
    before it was cut, as BFL and diffusers call them, and those of --export torch, experts too."""
    there = sizes(abstract(config))
    tables = [(layout, *cut_keys.keys(layout, config, cut)) for layout in flux_keys.SHAPES]
    tables.append(("torch", sparse_keys.keys(config), there))
    known: dict[str, Linear] = {}
    for layout, table, ours in tables:
        shapes = key_table.their_shapes(table, ours)
        tensors = {
            name: Tensor(
                name,
                tuple(entries),
                shapes[name],
                any(there.get(entry.ours) != ours[entry.ours] for entry in entries),
                _whole(entries, ours, shapes[name]),
            )
            for name, entries in key_table.by_name(table, "theirs").items()
        }
        for name, tensor in tensors.items():
            part, _, kind = name.rpartition(".")
            if kind in ("weight", "scale"):
                linear = Linear(part, layout, tensor, tensors.get(f"{part}.bias"))
                known.setdefault(lora_names.flat(part), linear)
                known.setdefault(lora_names.flat(name), linear)  # ComfyUI: ….norm.scale.diff
    for alias, name in lora_names.aliases(config.depth("double"), config.depth("single")):
        known[lora_names.flat(alias)] = known[lora_names.flat(name)]
    return known


def _whole(
    entries: Iterable[Entry], ours: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> bool:
    """Whether these entries fill a tensor of this shape."""
    boxes = [[part.stop - part.start for part in e.box(ours[e.ours])] for e in entries]
    through = any(entry.through is not None for entry in entries)
    return not through and sum(map(math.prod, boxes)) == math.prod(shape)
