"""LoRA files merged into a dense transformer: W + scale · alpha / rank · up · down, in float32.

Files name a linear as kohya (`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`), diffusers
and PEFT (`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`) or BFL and ComfyUI
(`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`) do, whatever layout the model has.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2m_jax.config import ConfigError, FluxConfig, check, suggestion
from d2m_jax.models.flux import abstract
from d2m_jax.weights import flux_keys, key_table, recognise, safetensors
from d2m_jax.weights.key_table import SHOWN, Entry, Parameter, listed, overlap, relative
from d2m_jax.weights.named_arrays import sizes

PREFIXES = re.compile(
    r"^(base_model\.model\.)?(model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\."
    r"|lora_unet_|lora_transformer_)?"
)
ROLES = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_A.default.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora_B.default.weight": "up",
    "lora_B.bias": "bias",
    "alpha": "alpha",
}


@dataclass(frozen=True)
class Delta:
    """What a LoRA adds to one torch tensor, times `factor`."""

    parts: tuple[Any, ...]  # (up, down) of a weight, (bias,) of a bias
    factor: float

    def array(self) -> np.ndarray:
        """The sum's second term, float32, in torch's shape."""
        first, *rest = (np.asarray(part).astype(np.float32) for part in self.parts)
        return np.float32(self.factor) * (first @ rest[0] if rest else first)


def read(path: Path | str, config: FluxConfig, scale: float = 1.0) -> list[tuple[Entry, Delta]]:
    """What a LoRA file adds to which part of our parameters.

    Raises ConfigError that lists all names that are unknown, incomplete or misshapen.
    """
    path = Path(path)
    check(path.is_file(), f"{path}: no such file, expected a LoRA (.safetensors)")
    recognise.refuse_pickle(path)
    tensors = safetensors.read(path)
    alphas = _stated_alphas(path)
    tables = [entry for layout in flux_keys.SHAPES for entry in flux_keys.keys(layout, config)]
    entries = key_table.by_name(tables, "theirs")
    # kohya's names have _ for every dot, so all are looked up in that form.
    known = {
        name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight")
        for name in entries
        if name.endswith(".weight")
    }
    linears: dict[str, dict[str, Any]] = {}
    wrong = []
    for name, tensor in tensors.items():
        role = next((role for role in ROLES if name.endswith("." + role)), None)
        bare = PREFIXES.sub("", name)
        linear = known.get(bare.removesuffix(f".{role}").replace(".", "_"))
        if role is None or linear is None:
            near = suggestion(bare.replace(".", "_"), known) if len(wrong) < SHOWN else ""
            wrong.append(f"{name} is unknown{near}")
        else:
            linears.setdefault(linear, {})[ROLES[role]] = tensor
    shapes = key_table.their_shapes(tables, sizes(abstract(config)))
    found = []
    for linear, parts in linears.items():
        complaint = _misfit(parts, shapes[f"{linear}.weight"])
        if complaint:
            wrong.append(f"{linear} {complaint}")
            continue
        rank = parts["down"].shape[0]
        stated = alphas.get(linear, alphas.get("", rank))
        alpha = float(np.asarray(parts["alpha"]).reshape(())) if "alpha" in parts else stated
        weight = Delta((parts["up"], parts["down"]), scale * alpha / rank)
        found += [(entry, weight) for entry in entries[f"{linear}.weight"]]
        if "bias" in parts:
            bias = Delta((parts["bias"],), scale)
            found += [(entry, bias) for entry in entries[f"{linear}.bias"]]
    check(not wrong, f"{path}: {len(wrong)} tensors do not fit this model: {listed(wrong)}")
    check(len(found) > 0, f"{path}: expected a LoRA, found no tensors of one")
    return found


def _misfit(parts: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    """What is wrong with the tensors of one linear; empty for nothing."""
    if not {"up", "down"} <= parts.keys():
        return f"has {' and '.join(parts)}, expected down and up"
    up, down = tuple(parts["up"].shape), tuple(parts["down"].shape)
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or (up[0], down[1]) != shape:
        return f"has up {list(up)} and down {list(down)}, expected them for {list(shape)}"
    if "bias" in parts and tuple(parts["bias"].shape) != shape[:1]:
        return f"has a bias {list(parts['bias'].shape)}, expected {list(shape[:1])}"
    if "alpha" in parts and np.prod(parts["alpha"].shape, dtype=int) != 1:
        return f"has alpha {list(parts['alpha'].shape)}, expected one number"
    return ""


def _stated_alphas(path: Path) -> dict[str, float]:
    """The alphas that diffusers writes beside its tensors: by linear, and "" for all others."""
    text = safetensors.read_metadata(path).get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        value = json.loads(text)
        alphas = dict(value.get("transformer.alpha_pattern") or {})
        if "transformer.lora_alpha" in value:
            alphas[""] = value["transformer.lora_alpha"]
        return {name: float(alpha) for name, alpha in alphas.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: lora_adapter_metadata is damaged ({error})") from None


def merge(
    params: Mapping[str, Parameter],
    exact: Mapping[str, Parameter],
    loras: Sequence[list[tuple[Entry, Delta]]],
) -> dict[str, Parameter]:
    """`params` with LoRAs added; `exact` are the same in float32: there is one rounding, at the
    end."""
    by_name: dict[str, list[tuple[Entry, Delta]]] = {}
    for lora in loras:
        for entry, delta in lora:
            by_name.setdefault(entry.ours, []).append((entry, delta))
    return dict(params) | {
        name: _merged(params[name], exact[name], deltas) for name, deltas in by_name.items()
    }


def _merged(param: Parameter, exact: Parameter, deltas: list[tuple[Entry, Delta]]) -> Parameter:
    by_index: dict[tuple[int, ...], list[tuple[Entry, Delta]]] = {}
    for entry, delta in deltas:
        by_index.setdefault(entry.index, []).append((entry, delta))

    def take(region):
        out = param[region]
        for index, some in by_index.items():
            block = tuple(slice(i, i + 1) for i in index) + region[len(index) :]
            block = overlap(block, region)
            if block is None:
                continue
            total = exact[block]
            for entry, delta in some:
                box = entry.box(param.shape)
                common = overlap(box, block)
                if common is not None:
                    piece = entry.piece_of_theirs(delta.array())
                    piece = piece[relative(common, box)[len(index) :]]
                    total[relative(common, block)] += piece
            out[relative(block, region)] = total.astype(out.dtype)
        return out

    return Parameter(param.shape, param.dtype, take)
