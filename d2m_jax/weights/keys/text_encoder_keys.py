"""T5 and CLIP in transformers' layout: which tensor is which parameter, and config.json.

CLIP is FLUX.1's, the text tower alone, or whole, with the vision tower that scores images.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from d2m_jax.config import (
    CLIPConfig,
    CLIPModelConfig,
    CLIPVisionConfig,
    T5Config,
    check,
    from_json,
)
from d2m_jax.models import clip, clip_vision, t5
from d2m_jax.named_arrays import names
from d2m_jax.weights.keys.key_table import Entry

# The start of our names, and what stands there in transformers'; the first that fits.
T5 = {
    "shared": "shared",
    "relative_attention_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "block.SelfAttention.layer_norm": "encoder.block.{layer}.layer.0.layer_norm",
    "block.SelfAttention": "encoder.block.{layer}.layer.0.SelfAttention",
    "block.DenseReluDense.layer_norm": "encoder.block.{layer}.layer.1.layer_norm",
    "block.DenseReluDense": "encoder.block.{layer}.layer.1.DenseReluDense",
    "final_layer_norm": "encoder.final_layer_norm",
}
# transformers 4 writes the prefix and expects it, transformers 5 reads both.
CLIP = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "position_embedding": "text_model.embeddings.position_embedding",
    "layers": "text_model.encoder.layers.{layer}",
    "final_layer_norm": "text_model.final_layer_norm",
}
WHOLE = {f"text.{ours}": theirs for ours, theirs in CLIP.items()} | {
    "vision.layers": "vision_model.encoder.layers.{layer}",
    "vision.pre_layrnorm": "vision_model.pre_layrnorm",  # so it is spelt
    "vision.post_layernorm": "vision_model.post_layernorm",
    "vision": "vision_model.embeddings",
    "text_projection": "text_projection",
    "visual_projection": "visual_projection",
}
# What older files hold beside it, and what no feature depends on.
UNUSED = (
    *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "logit_scale"),
)
# transformers' own values, which a config.json may leave out.
TEXT = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | {
    **{"vocab_size": 49_408, "hidden_size": 512, "intermediate_size": 2048, "eos_token_id": 49_407},
    **{"num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77},
}
VISION = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | {
    **{"num_channels": 3, "hidden_size": 768, "intermediate_size": 3072, "image_size": 224},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32},
}


def t5_keys(config: T5Config) -> list[Entry]:
    """The table of T5EncoderModel's names."""
    return _table(t5.abstract(config), T5)


def clip_keys(config: CLIPConfig) -> list[Entry]:
    """The table of CLIPTextModel's names."""
    return _table(clip.abstract(config), CLIP)


def clip_model_keys(config: CLIPModelConfig) -> list[Entry]:
    """The table of CLIPModel's names."""
    return _table(clip_vision.abstract(config), WHOLE)


def _table(params: dict, starts: Mapping[str, str]) -> list[Entry]:
    entries = []
    for ours, leaf in names(params).items():
        start = next(start for start in starts if ours.startswith(start))
        theirs = starts[start] + ours.removeprefix(start)
        theirs = re.sub(r"\b(kernel|scale|embedding)$", "weight", theirs)
        layout = "linear" if ours.endswith(".kernel") else "same"
        layout = "conv" if leaf.ndim == 4 else layout
        if "{layer}" in theirs:
            entries += [
                Entry(theirs.format(layer=i), ours, layout, (i,)) for i in range(leaf.shape[0])
            ]
        else:
            entries.append(Entry(theirs, ours, layout))
    return entries


def t5_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's tensors out of a file that may be a whole T5, whose decoder is left out, and
    may hold the embedding under either of its names, or both."""
    encoder = {n: t for n, t in tensors.items() if not n.startswith(("decoder.", "lm_head."))}
    embedding = encoder.pop("encoder.embed_tokens.weight", None)
    return encoder if embedding is None else {"shared.weight": embedding} | encoder


def clip_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The text encoder's tensors, with the prefix `text_model.`, out of a file that may lack it and
    may hold what FLUX.1 does not use."""
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for unused in ("embeddings.position_ids", "text_projection.weight", "logit_scale"):
        bare.pop(unused, None)
    return {f"text_model.{name}": tensor for name, tensor in bare.items()}


def clip_model_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Both towers' tensors out of a file of CLIPModel."""
    return {name: tensor for name, tensor in tensors.items() if name not in UNUSED}


def t5_config(value: Mapping[str, Any], where: str) -> T5Config:
    """The config in transformers' config.json, `value`, read from the file `where`.

    ConfigError names the field that makes it another T5 than ours, or is missing.
    """
    same = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}
    # Older files lack the maximum distance: it was 128 always.
    value = {"relative_attention_max_distance": 128} | dict(value)
    return _config(T5Config, value, where, same)


def clip_config(value: Mapping[str, Any], where: str) -> CLIPConfig:
    """The config in transformers' config.json, `value`, read from the file `where`.

    ConfigError names the field that makes it another CLIP than ours, or is missing.
    """
    same = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    return _config(CLIPConfig, value, where, same)


def clip_model_config(value: Mapping[str, Any], where: str) -> CLIPModelConfig:
    """The config in config.json of a CLIPModel, `value`, read from the file `where`. ConfigError as
    of clip_config."""
    kind = value.get("model_type")
    check(kind == "clip", f"{where}: model_type = {kind!r}, expected 'clip', both towers")
    text, vision = (
        own | dict(value.get(name) or {})
        for name, own in (("text_config", TEXT), ("vision_config", VISION))
    )
    same = {name: VISION[name] for name in ("hidden_act", "layer_norm_eps", "num_channels")}
    return CLIPModelConfig(
        clip_config(text, f"{where}, text_config"),
        _config(CLIPVisionConfig, vision, f"{where}, vision_config", same),
        value.get("projection_dim", 512),
    )


def _config(kind: type, value: Mapping[str, Any], where: str, same: Mapping[str, Any]) -> Any:
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in (*same, *fields):
        check(value.get(name) is not None, f"{where}: {name} is missing, expected a value")
    for name, expected in same.items():
        check(
            value[name] == expected,
            f"{where}: {name} = {value[name]!r}, expected {expected!r}: an encoder of another kind",
        )
    return from_json(kind, {name: value[name] for name in fields}, where)
