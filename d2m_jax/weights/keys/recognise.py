"""What a file of tensors is, by their names: the parts we take, and what we refuse and why."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2m_jax import hosts
from d2m_jax.config import ConfigError, check, listed
from d2m_jax.weights.files import first_bytes
from d2m_jax.weights.keys.flux_keys import Layout

# What a file is by its ending, where its first bytes do not say.
PICKLE = "a pickle file, which can run any code when it is read, so it is never read"
ENDINGS: dict[str, str] = dict.fromkeys((".bin", ".ckpt", ".pt", ".pth", ".pkl"), PICKLE)
ENDINGS[".gguf"] = "GGUF, which holds quantised blocks"
# Names at the top of a transformer, in both layouts. Those of AT_LEAST_ONE are in no other model.
AT_LEAST_ONE = (
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "guidance_in",
    "double_blocks",
    "single_blocks",
    "final_layer",
    "x_embedder",
    "context_embedder",
    "time_text_embed",
    "transformer_blocks",
    "single_transformer_blocks",
)
TOP = (*AT_LEAST_ONE, "norm_out", "proj_out")
# What torch.compile, FSDP, checkpointing, fairscale, Lightning and DDP put anywhere into names.
WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_fpw_module",
    "_forward_module",
    "module",
)
USUAL = ("model.diffusion_model.", "diffusion_model.")  # ComfyUI's starts of a transformer's names
# The starts of an all-in-one file's other parts.
OTHERS = (
    "vae.",
    "first_stage_model.",
    "text_encoder.",
    "text_encoders.",
    "text_encoder_2.",
    "cond_stage_model.",
    "conditioner.",
)
# (what it is, a part of a name that only such files have); the first that is found counts.
QUANTISED = (
    ("quantised by SVDQuant", (".wscales", ".wcscales", ".smooth_factor", ".smooth_orig")),
    ("quantised by bitsandbytes (NF4, FP4 or int8)", (".quant_state.", ".absmax", ".SCB")),
    ("quantised to NVFP4 (4 bits)", (".weight_scale_2",)),
    ("quantised by GPTQ or AWQ (4 bits)", (".qweight", ".qzeros", ".pre_quant_scale")),
    ("quantised by torchao", ("weight:qdata", "weight_qdata", "weight:tensor_impl")),
    ("quantised by quanto", (".weight._data", ".weight._scale")),
    ("quantised by compressed-tensors", (".weight_packed", ".weight_zero_point")),
    ("quantised by HQQ", (".W_q",)),
    ("fp8 with a scale per block", (".weight_scale_inv",)),
)
UNQUANTISED = "bf16, fp16, fp32 or fp8"
LORA = (("a LoRA", (".lora_A", ".lora_B", "lora_unet_", ".lora_down", ".lora_up", "lora_te")),)
FOREIGN = (
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


def kind(path: Path) -> str | None:
    """What a file is, in words; None for safetensors, whatever its name, and for what is not known.
    Raises ConfigError where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(first_bytes.LENGTH)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if first_bytes.is_safetensors(start):
        return None
    found = first_bytes.kind(start) if start else None
    return found or ENDINGS.get(path.suffix.lower())


def refuse_other(path: Path) -> None:
    """Raise ConfigError for a file that is something else than safetensors."""
    found = kind(path)
    check(found is None, f"{path}: {found}; expected .safetensors")


def unwrapped(name: str) -> tuple[str, str]:
    """A name of a FLUX transformer without what tools put before and into it, and what stood before
    it: ("model._orig_mod.", "img_in.weight"). Any other name as it is, after ""."""
    parts = name.split(".")
    # A number stands in a list of blocks, so that what comes after it is at the top of no
    # transformer; at the start of a name it is of an nn.Sequential around the whole.
    first = next((i for i, part in enumerate(parts) if not _wraps(part)), 0)
    places = range(first, len(parts))
    end = next((i for i in places if parts[i] in TOP or parts[i].isdecimal()), len(parts))
    if end == len(parts) or parts[end] not in TOP:
        return "", name
    return "".join(f"{part}." for part in parts[:end]), _plain(".".join(parts[end:]))


def _wraps(part: str) -> bool:
    return part in WRAPPERS or part.isdecimal()


def _plain(name: str) -> str:
    """A name without the wrappers in it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def transformer(where: Any, tensors: Mapping[str, Any]) -> tuple[Layout, dict[str, Any]]:
    """The layout of a FLUX.1 transformer, and its tensors by that layout's names.

    What else the file holds of an all-in-one model is left out. One line on stderr tells of other
    starts of names that were cut, and of tensors outside them. Raises ConfigError where there is no
    such transformer, and says what there is, or where there are two.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHERS)}
    refuse(where, own, QUANTISED, UNQUANTISED)
    refuse(where, own, LORA)
    found = _without_start(where, own)
    # ComfyUI writes the norms' scales under either name.
    found = {n.removesuffix("weight") + "scale" if _is_norm(n) else n: t for n, t in found.items()}
    refuse(where, found, FOREIGN)
    for layout, marks in MARKS.items():
        if any(name.startswith(marks) for name in found):
            return layout, found
    refuse(where, tensors, (*LORA, *FOREIGN))
    first = ", ".join(list(tensors)[:3]) or "no tensors"
    raise ConfigError(
        f"{where}: expected FLUX.1's transformer (double_blocks.… or transformer_blocks.…), found"
        f" {first}"
    )


def without_wrappers(where: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an encoder by their names without wrappers, of which one line tells."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        check(_plain(name) not in found, f"{where}: holds {_plain(name)} twice, as {name} too")
        found[_plain(name)] = tensor
    cut = [f"{w}." for w in WRAPPERS if any(w in name.split(".") for name in tensors)]
    if cut:
        hosts.say(_cut(where, cut))
    return found


def _cut(where: Any, parts: Sequence[str]) -> str:
    return f"{where}: read without what a tool put into its names: {listed(parts)}"


def _without_start(where: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors whose names have the start that a transformer's have, without it."""
    starts: dict[str, str] = {}  # without wrappers → the first name
    for name in tensors:
        start, rest = unwrapped(name)
        if rest.split(".")[0] in AT_LEAST_ONE:
            starts.setdefault(_plain(start), name)
    if len(starts) > 1:
        raise ConfigError(
            f"{where}: holds more than one transformer, or parts of one under several names"
            f" ({' and '.join(starts.values())}); expected one, in a file of its own"
        )
    start = next(iter(starts), "")
    found, names, cut, outside = {}, {}, {}, []
    for name, tensor in tensors.items():
        plain = _plain(name)
        if not plain.startswith(start):
            outside.append(name)
            continue
        short = plain.removeprefix(start)
        if short in found:
            raise ConfigError(f"{where}: holds {short} twice, as {names[short]} and as {name}")
        found[short], names[short] = tensor, name
        before, rest = unwrapped(name)
        if rest == short:
            inside = name.removeprefix(before).split(".")
            parts = [before, *(f"{part}." for part in inside if part in WRAPPERS)]
            cut |= dict.fromkeys(part for part in parts if part not in ("", *USUAL))
    if cut:
        hosts.say(_cut(where, list(cut)))
    if outside:
        hosts.say(f"{where}: ignored {len(outside)} tensors beside {start}…: {listed(outside)}")
    return found


def _is_norm(name: str) -> bool:
    return name.endswith((".query_norm.weight", ".key_norm.weight"))


def refuse(
    where: Any,
    tensors: Iterable[str],
    kinds: Iterable[tuple[str, Sequence[str]]],
    expected: str = "a FLUX.1 transformer",
) -> None:
    """Raise ConfigError that says which of the kinds, such as FOREIGN, the tensors are of."""
    names = list(tensors)
    for kind, marks in kinds:
        name = next((n for n in names if any(mark in n for mark in marks)), None)
        if name is not None:
            merge = f"python convert_torch_weights.py MODEL OUTPUT --lora {where}"
            advice = f"; merge it into its model: {merge}" if kind == "a LoRA" else ""
            raise ConfigError(f"{where}: {kind} (it holds {name}), expected {expected}{advice}")
