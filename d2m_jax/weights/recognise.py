"""What a file of tensors is, by their names: the parts we take, and what we refuse and why."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2m_jax.config import ConfigError
from d2m_jax.weights.flux_keys import Layout

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# The parts of an all-in-one file: ours → the prefixes in use, the bare file's "" not among them.
PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "t5": ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
    "clip": ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    "autoencoder": ("vae.", "first_stage_model."),
}
# (what it is, a part of a name that only such files have); the first that is found counts.
FOREIGN = (
    ("a LoRA", (".lora_A", ".lora_B", "lora_unet_", ".lora_down", ".lora_up", "lora_te")),
    ("a quantised model (GPTQ, SVDQuant or bitsandbytes)", (".qweight", ".quant_state")),
    ("FLUX.2", ("double_stream_modulation", "single_stream_modulation")),
    ("a ControlNet", ("controlnet_blocks.", "controlnet_single_blocks.", "control_model.")),
    ("Chroma", ("distilled_guidance_layer.",)),
    ("FLUX.1 Redux, an image adapter", ("redux_up.", "redux_down.")),
    ("Stable Diffusion 3", ("joint_blocks.", "pos_embed.proj.")),
    ("a U-Net (Stable Diffusion or SDXL)", ("input_blocks.", "down_blocks.0.attentions")),
    ("an autoencoder", ("decoder.conv_in.",)),
    ("a T5 text encoder", ("SelfAttention.q.", "SelfAttention.k.")),
    ("a CLIP text encoder", ("self_attn.q_proj.",)),
)
MARKS: dict[Layout, tuple[str, ...]] = {
    "bfl": ("double_blocks.", "single_blocks."),
    "diffusers": ("transformer_blocks.", "single_transformer_blocks."),
}


def refuse_pickle(path: Path) -> None:
    """Raise ConfigError for a file that only pickle, or no torch program at all, could read."""
    if path.suffix.lower() in PICKLES:
        raise ConfigError(
            f"{path}: a pickle file, which can run any code when it is read, so it is never read;"
            " expected .safetensors"
        )
    if path.suffix.lower() == ".gguf":
        raise ConfigError(f"{path}: GGUF holds quantised blocks; expected .safetensors")


def parts(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of an all-in-one file by PREFIXES' names, without their prefixes.

    A file without any prefix is a transformer, or what is refused as one.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        part, prefix = _part(name)
        found.setdefault(part, {})[name.removeprefix(prefix)] = tensor
    if "transformer" not in found:
        found["transformer"] = found.pop("", {})
    return found


def _part(name: str) -> tuple[str, str]:
    for part, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return part, prefix
    return "", ""


def transformer(where: Any, tensors: Mapping[str, Any]) -> tuple[Layout, dict[str, Any]]:
    """The layout of a FLUX.1 transformer, and its tensors by that layout's names.

    What else the file holds of an all-in-one model is left out. Raises ConfigError where there is
    no such transformer, and says what there is.
    """
    _refuse_foreign(where, tensors, FOREIGN[:1])
    found = parts(tensors)["transformer"]
    # ComfyUI writes the norms' scales under either name.
    found = {n.removesuffix("weight") + "scale" if _is_norm(n) else n: t for n, t in found.items()}
    _refuse_foreign(where, found, FOREIGN)
    for layout, marks in MARKS.items():
        if any(name.startswith(marks) for name in found):
            return layout, found
    first = ", ".join(list(found)[:3]) or "no tensors"
    raise ConfigError(
        f"{where}: expected FLUX.1's transformer (double_blocks.… or transformer_blocks.…), found"
        f" {first}"
    )


def _is_norm(name: str) -> bool:
    return name.endswith((".query_norm.weight", ".key_norm.weight"))


def _refuse_foreign(where: Any, tensors: Iterable[str], kinds) -> None:
    names = list(tensors)
    for kind, marks in kinds:
        name = next((n for n in names if any(mark in n for mark in marks)), None)
        if name is not None:
            advice = "; merge it into its model with --lora" if kind == "a LoRA" else ""
            raise ConfigError(
                f"{where}: {kind} (it holds {name}), expected a FLUX.1 transformer{advice}"
            )
