"""The autoencoder in torch's layouts: diffusers' vae/ folder and BFL's ae.safetensors."""

import re
from collections.abc import Mapping
from typing import Any

from d2m_jax.config import AutoencoderConfig, check, from_json
from d2m_jax.models.autoencoder import abstract
from d2m_jax.named_arrays import names
from d2m_jax.weights.keys.key_table import Entry, Layout

# Patterns of our names and what they are called there, applied in this order.
DIFFUSERS = {
    r"(down|up)(_blocks\.\d+)\.resample": r"\1\2.\1samplers.0.conv",
    r"\battention\b": "attentions.0",
    r"\bto_out\b": "to_out.0",
}
BFL = {
    r"(down|up)_blocks\.(\d+)\.resample": r"\1.\2.\1sample.conv",
    r"(down|up)_blocks": r"\1",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attention": "mid.attn_1",
    r"\bresnets\b": "block",
    r"\bgroup_norm\b": "norm",
    r"\bto_([qkv])\b": r"\1",
    r"\bto_out\b": "proj_out",
    r"\bconv_shortcut\b": "nin_shortcut",
    r"\bconv_norm_out\b": "norm_out",
}


def diffusers_keys(config: AutoencoderConfig) -> list[Entry]:
    """The table of diffusers' names."""
    return _table(config, DIFFUSERS, linear="linear")


def bfl_keys(config: AutoencoderConfig) -> list[Entry]:
    """The table of BFL's names: `decoder.up` counts from the image, all matrices are 1 × 1
    convolutions."""
    last = len(config.block_out_channels) - 1

    def from_image(match: re.Match[str]):
        return f"decoder.up_blocks.{last - int(match[1])}"

    return _table(config, {r"decoder\.up_blocks\.(\d+)": from_image} | BFL, linear="pointwise")


def _table(config: AutoencoderConfig, patterns: Mapping[str, Any], linear: Layout) -> list[Entry]:
    entries = []
    for ours, leaf in names(abstract(config)).items():
        theirs = re.sub(r"\b(kernel|scale)$", "weight", ours)
        for pattern, replacement in patterns.items():
            theirs = re.sub(pattern, replacement, theirs)
        layout: Layout = "same"
        if leaf.ndim == 4:
            layout = "conv"
        elif leaf.ndim == 2:
            layout = "pointwise" if "conv_shortcut" in ours else linear
        entries.append(Entry(theirs, ours, layout))
    return entries


def autoencoder_config(value: Mapping[str, Any], where: str) -> AutoencoderConfig:
    """The config in diffusers' vae/config.json, `value`, read from the file `where`.

    ConfigError names the field that makes it another network than FLUX.1's, or is missing.
    """
    value = {"use_quant_conv": True, "use_post_quant_conv": True} | dict(value)  # diffusers' own
    size = value.get("sample_size", AutoencoderConfig.height)
    fields = {"height": size, "width": size}
    for name in (
        "block_out_channels",
        "layers_per_block",
        "latent_channels",
        "norm_num_groups",
        "scaling_factor",
        "shift_factor",
    ):
        check(value.get(name) is not None, f"{where}: {name} is missing, expected a value")
        fields[name] = value[name]
    config = from_json(AutoencoderConfig, fields, where)
    levels = len(config.block_out_channels)
    same = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "out_channels": 3,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
    for name, expected in same.items():
        found = value.get(name, expected)
        check(
            found == expected,
            f"{where}: {name} = {found!r}, expected {expected!r}: no autoencoder like FLUX.1's",
        )
    return config


def bfl_autoencoder_config(tensors: Mapping[str, Any], where: str) -> AutoencoderConfig:
    """The config of the tensors (anything with `shape`) of a BFL file; `where` names it in errors.

    Groups of norms, scale and shift are in no tensor: they are FLUX.1's.
    """
    for name in tensors:
        check(
            "quant_conv" not in name,
            f"{where}: found {name}, expected none: an autoencoder of Stable Diffusion or FLUX.2",
        )
    pattern = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight")
    matches = {name: pattern.fullmatch(name) for name in tensors}
    places = [(int(m[1]), int(m[2])) for m in matches.values() if m]
    levels, blocks = (1 + max((place[i] for place in places), default=0) for i in (0, 1))
    convolutions = [f"encoder.down.{i}.block.0.conv2.weight" for i in range(levels)]
    for name in (*convolutions, "encoder.conv_out.weight"):
        check(name in tensors, f"{where}: {name} is missing, expected BFL's autoencoder")
    return AutoencoderConfig(
        block_out_channels=tuple(int(tensors[name].shape[0]) for name in convolutions),
        layers_per_block=blocks,
        latent_channels=int(tensors["encoder.conv_out.weight"].shape[0]) // 2,
    )
