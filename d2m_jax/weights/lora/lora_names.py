"""The names in LoRA files of all tools, brought to one form: a part of the transformer and a role.

kohya writes `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, PEFT and diffusers
`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`, ComfyUI
`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`, LyCORIS `lycoris_….lokr_w1`, XLabs
`double_blocks.0.processor.qkv_lora1.down.weight`, OneTrainer `lora_transformer_….lora_down.weight`
or `transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight`; wrappers add to each of these.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from d2m_jax.weights.keys.recognise import WRAPPERS

T = TypeVar("T")

# What frameworks wrap around a model or its blocks, and PEFT around layers, anywhere in a name;
# in kohya's names dots are _.
WRAPPED = re.compile(
    rf"(?:^|(?<=[._]))(?:{'|'.join(w for w in WRAPPERS if w[0] == '_')})[._]"
    rf"|(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)}|base_layer|modules_to_save(?:\.default)?)\."
)
# In front of the transformer's parts, one after the other, where dots count as _.
PREFIXES = (
    "base_model_",
    "model_",
    "diffusion_model_",
    "transformer_",
    "unet_",
    "lora_",
    "lycoris_",
    "net_",
    "flux_",
)
TEXT_ENCODERS = re.compile(
    r"^(?:base_model\.model\.|model\.)*(?:lora_|lycoris_)?(?:text_encoders?|te|prior_te|conditioner"
    r"|cond_stage_model|clip|clip_[lg]|t5"
    r"|t5xxl|text_model|encoder|bundle_emb|emb_params)(?:_?[1-4])?[._]"
)
# The word that ends a name, before an adapter's name and `weight` or `bias`: its role.
WORDS = {
    r"lora_A|lora_down|lora\.down|lora_linear_layer\.down|down": "down",
    r"lora_B|lora_up|lora\.up|lora_linear_layer\.up|up": "up",
    r"lora_magnitude_vector|dora_scale": "magnitude",
    "alpha": "alpha",
    "diff|w_norm": "diff",
    "diff_b|b_norm": "diff_b",
    "set_weight": "weight",
    "reshape_weight": "reshape",
    **{f"lokr_{w}": f"lokr_{w}" for w in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{f"hada_{w}": f"hada_{w}" for w in ("w1_a", "w1_b", "w2_a", "w2_b")},
}
PARTS = re.compile(
    rf"(?P<part>.+?)\.(?P<word>{'|'.join(WORDS)})"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
# Methods that no class of lora_differences.py knows, by what only their names hold.
METHODS = {
    "a LoRA of convolutions (Tucker)": r"\.(lora_mid|lokr_t2|hada_t[12])\b",
    "OFT or BOFT": r"\.(oft_|boft_)",
    "(IA)³": r"\.(ia3_l|on_input)",
    "VeRA": r"\bvera_lambda_",
    "GLoRA": r"\.(a1|a2|b1|b2|bm)\.weight$",
    "T-LoRA": r"\.(q_layer|p_layer|lambda_layer|base_[pq])\b",
}
# Other models, by what only their parts are called, where dots count as _.
MODELS = {
    "Stable Diffusion or SDXL (a U-Net)": r"(^|_)((input|output)_blocks|middle_block"
    r"|(down|up)_blocks|mid_block)_",
    "Stable Diffusion 3": r"(^|_)joint_(transformer_)?blocks_",
    "FLUX.2": r"(double|single)_stream_modulation|to_qkv_mlp_proj|_ff(_context)?_linear_(in|out)",
    "Chroma": r"distilled_guidance_layer",
    "Qwen-Image": r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_",
    "HunyuanVideo": r"_mlp_fc[12]$|_mod_linear$|token_refiner",
    "HiDream": r"(double|single)_stream_blocks_",
    "Z-Image or Lumina": r"(^|_)layers_\d+_(attention|feed_forward)_|(noise|context)_refiner",
    "Wan": r"(^|_)blocks_\d+_(self_attn|cross_attn|ffn)_",
    "LTX-Video, PixArt or another model with cross-attention": r"transformer_blocks_\d+_attn[12]_",
    "an image adapter (IP-Adapter) or a ControlNet": r"controlnet|ip_adapter|(^|_)(ip|to)_[kv]_ip_",
    "a language model": r"model_layers_\d+_(self_attn|mlp)_",
}


class Named(NamedTuple):
    """A tensor's name taken apart: `transformer.x_embedder.lora_A.style.weight` is the part
    `transformer.x_embedder`, the role `down`, the adapter `style`."""

    part: str
    role: str
    adapter: str


def unwrapped(name: str) -> str:
    """The name without what frameworks wrap around modules."""
    return WRAPPED.sub("", name)


def of_text_encoder(name: str) -> bool:
    """Whether an unwrapped name is of a text encoder, or of embeddings that come along."""
    return TEXT_ENCODERS.match(name) is not None


def taken_apart(name: str) -> Named | None:
    """Part, role and adapter of an unwrapped name; None for a name of no LoRA.

    A role is what WORDS says, `bias` for the bias of an up, and for a whole tensor `weight` or
    `bias`.
    """
    found = PARTS.fullmatch(name)
    if found is None:
        part, _, kind = name.rpartition(".")
        role = {"weight": "weight", "scale": "weight", "bias": "whole_bias"}.get(kind)
        return Named(part, role, "") if part and role else None
    role = next(role for words, role in WORDS.items() if re.fullmatch(words, found["word"]))
    if found["kind"] == "bias":
        role = {"up": "bias"}.get(role, "")
    return Named(found["part"], role, found["adapter"] or "") if role else None


def flat(name: str) -> str:
    """The form in which parts are compared: kohya's, whose names have _ for every dot."""
    return name.replace(".", "_").strip("_")


def look_up(part: str, known: Mapping[str, T]) -> T | None:
    """What `known` (by flat names) has for a part, whatever prefixes it carries."""
    part = flat(part)
    while part not in known:
        prefix = next((prefix for prefix in PREFIXES if part.startswith(prefix)), None)
        if prefix is None:
            return None
        part = part.removeprefix(prefix).strip("_")
    return known[part]


def aliases(doubles: int, singles: int) -> Iterator[tuple[str, str]]:
    """Other names of linears: (the tool's, diffusers' or ours).

    XLabs numbers its processors; OneTrainer (OMI) numbers the parts of BFL's fused linears.
    """
    for i in range(doubles):
        bfl, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}.attn"
        for number, stream in (("1", "img"), ("2", "txt")):
            yield f"{bfl}.processor.qkv_lora{number}", f"{bfl}.{stream}_attn.qkv"
            yield f"{bfl}.processor.proj_lora{number}", f"{bfl}.{stream}_attn.proj"
        for n, x in enumerate("qkv"):
            yield f"{bfl}.img_attn.qkv.{n}", f"{theirs}.to_{x}"
            yield f"{bfl}.txt_attn.qkv.{n}", f"{theirs}.add_{x}_proj"
    for i in range(singles):
        bfl, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield f"{bfl}.processor.qkv_lora", f"{bfl}.qkv"
        yield f"{bfl}.processor.proj_lora", f"{bfl}.linear2"
        for n, x in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
            yield f"{bfl}.linear1.{n}", f"{theirs}.{x}"


def foreign(names: Iterable[str]) -> tuple[str, str] | None:
    """The method or the model that a file is of, where FLUX.1 has no place for it, and the name
    that tells; None where nothing tells."""
    for name in names:
        named = taken_apart(name)
        part = flat(name if named is None else named.part)
        for kinds, text in ((METHODS, name), (MODELS, part)):
            for kind, pattern in kinds.items():
                if re.search(pattern, text):
                    return kind, name
    return None
