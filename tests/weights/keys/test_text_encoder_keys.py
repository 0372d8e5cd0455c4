"""T5 and CLIP files: what transformers writes comes in and goes back, under every name in use."""

import json
import os
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest

from d2m_jax.config import CLIPConfig, ConfigError, T5Config
from d2m_jax.models import clip, t5
from d2m_jax.named_arrays import names
from d2m_jax.weights.keys import text_encoder_keys as keys
from d2m_jax.weights.keys.key_table import by_name, check_fit, their_shapes, write
from tests.models import oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

T5 = T5Config(vocab_size=12, d_model=8, d_kv=3, d_ff=10, num_layers=2, num_heads=2)
CLIP = CLIPConfig(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=6,
    eos_token_id=11,
)


def torch_t5():
    kind = transformers.T5Config(**vars(T5), feed_forward_proj="gated-gelu")
    return oracle.shaken(transformers.T5EncoderModel(kind))


def torch_clip():
    kind = transformers.CLIPTextConfig(**vars(CLIP), bos_token_id=10, pad_token_id=11)
    return oracle.shaken(transformers.CLIPTextModel(kind))


@pytest.mark.parametrize(
    ("model", "config", "read_config", "pick", "table", "initialise"),
    [
        (torch_t5, T5, keys.t5_config, keys.t5_tensors, keys.t5_keys, t5.initialise),
        (torch_clip, CLIP, keys.clip_config, keys.clip_tensors, keys.clip_keys, clip.initialise),
    ],
)
def test_a_folder_of_transformers_there_and_back(
    model, config, read_config, pick, table, initialise, tmp_path
):
    model = model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    assert read_config(json.loads(file.read_text()), str(file)) == config
    tensors = pick(safetensors.load_file(tmp_path / "model.safetensors"))
    params = names(oracle.imported(table(config), tensors, partial(initialise, config, 0)))
    shapes = their_shapes(table(config), {name: a.shape for name, a in params.items()})
    back = {
        name: torch.from_numpy(write(entries, params, shapes[name], np.float32))
        for name, entries in by_name(table(config), "theirs").items()
    }
    safetensors.save_file(back, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path)
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def shapes(initialise, config):
    return {n: a.shape for n, a in names(jax.eval_shape(partial(initialise, config, 0))).items()}


def tensors_of(table, shapes):
    return {name: np.zeros(shape) for name, shape in their_shapes(table, shapes).items()}


@pytest.mark.parametrize("held", ["shared", "encoder.embed_tokens", "both", "whole"])
def test_t5_names_in_use(held):
    ours = shapes(t5.initialise, T5)
    tensors = tensors_of(keys.t5_keys(T5), ours)
    if held != "shared":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    if held == "encoder.embed_tokens":
        del tensors["shared.weight"]
    if held == "whole":  # encoder and decoder, as google's files
        tensors["decoder.final_layer_norm.weight"] = tensors["lm_head.weight"] = np.zeros(8)
    check_fit("file", keys.t5_keys(T5), keys.t5_tensors(tensors), ours)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_names_in_use(prefix):
    ours = shapes(clip.initialise, CLIP)
    tensors = {
        prefix + name.removeprefix("text_model."): a
        for name, a in tensors_of(keys.clip_keys(CLIP), ours).items()
    }
    tensors |= {f"{prefix}embeddings.position_ids": np.zeros((1, 6), int)}
    tensors |= {"text_projection.weight": np.zeros((8, 8)), "logit_scale": np.zeros(())}
    check_fit("file", keys.clip_keys(CLIP), keys.clip_tensors(tensors), ours)


def test_what_is_in_no_table_is_not_swallowed():
    ours = shapes(t5.initialise, T5)
    tensors = tensors_of(keys.t5_keys(T5), ours) | {"encoder.block.0.bias": np.zeros(3)}
    with pytest.raises(ConfigError, match="1 unknown: encoder.block.0.bias"):
        check_fit("file", keys.t5_keys(T5), keys.t5_tensors(tensors), ours)


@pytest.mark.parametrize(
    ("read_config", "changes", "message"),
    [
        (keys.t5_config, {"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu', expected"),
        (keys.t5_config, {"model_type": "umt5"}, "model_type = 'umt5', expected 't5'"),
        (keys.t5_config, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon = 1e-05, expected"),
        (keys.t5_config, {"d_model": None}, "d_model is missing, expected a value"),
        (keys.t5_config, {"d_model": "8"}, "d_model = '8': expected a whole number"),
        (keys.clip_config, {"hidden_act": "gelu"}, "hidden_act = 'gelu', expected 'quick_gelu'"),
        (keys.clip_config, {"model_type": "clip"}, "model_type = 'clip', expected"),
        (keys.clip_config, {"hidden_size": None}, "hidden_size is missing, expected a value"),
        (keys.clip_config, {"num_attention_heads": 3}, "hidden_size = 8: expected a multiple"),
    ],
)
def test_other_encoders_are_refused(read_config, changes, message):
    model = torch_t5() if read_config is keys.t5_config else torch_clip()
    value = model.config.to_dict()
    read_config(value, "folder/config.json")
    with pytest.raises(ConfigError, match=message) as error:
        read_config(value | changes, "folder/config.json")
    assert "\n" not in str(error.value)


def test_an_older_file_without_the_maximum_distance():
    value = torch_t5().config.to_dict()
    del value["relative_attention_max_distance"]
    assert keys.t5_config(value, "config.json") == T5
