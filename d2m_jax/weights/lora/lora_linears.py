"""What a LoRA can change: the linears and norms of a model, by all names that they have."""

from dataclasses import dataclass, replace

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.keys import flux_keys, key_table, sparse_keys
from d2m_jax.weights.keys.key_table import Entry
from d2m_jax.weights.lora import lora_names


@dataclass(frozen=True)
class Tensor:
    """A tensor of one of torch's layouts, and where it lies in our parameters."""

    name: str
    entries: tuple[Entry, ...]
    shape: tuple[int, ...]
    absent: bool  # from a sparse model, which has no such FFN or modulation


@dataclass(frozen=True)
class Linear:
    """A linear, or a norm, of one of torch's layouts."""

    name: str
    layout: str
    weight: Tensor
    bias: Tensor | None


def linears(config: FluxConfig) -> dict[str, Linear]:
    """All linears and norms by their flat names: those of the dense model that this is, or was
    before it was cut, as BFL and diffusers call them, and those of --export torch, experts too."""

    def dense(stacks: tuple[StackConfig, ...]):
        return tuple(replace(stack, ffn="dense", active=stack.blocks) for stack in stacks)

    doubles, singles = dense(config.double), dense(config.single)
    was = replace(config, double=doubles, single=singles, modulation_rank=None)
    there, before = sizes(abstract(config)), sizes(abstract(was))
    tables = [(layout, before, flux_keys.keys(layout, was)) for layout in flux_keys.SHAPES]
    tables.append(("torch", there, sparse_keys.keys(config)))
    known: dict[str, Linear] = {}
    for layout, ours, table in tables:
        shapes = key_table.their_shapes(table, ours)
        tensors = {
            name: Tensor(
                name,
                tuple(entries),
                shapes[name],
                any(there.get(entry.ours) != ours[entry.ours] for entry in entries),
            )
            for name, entries in key_table.by_name(table, "theirs").items()
        }
        for name, tensor in tensors.items():
            part, _, kind = name.rpartition(".")
            if kind in ("weight", "scale"):
                linear = Linear(part, layout, tensor, tensors.get(f"{part}.bias"))
                known.setdefault(lora_names.flat(part), linear)
                known.setdefault(lora_names.flat(name), linear)  # ComfyUI: ….norm.scale.diff
    depths = (sum(stack.depth for stack in stacks) for stacks in (doubles, singles))
    for alias, name in lora_names.aliases(*depths):
        known[lora_names.flat(alias)] = known[lora_names.flat(name)]
    return known
