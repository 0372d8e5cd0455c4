"""LoRA files in every common layout, merged: against W + s·α/r·BA in torch's own layout."""

import json

import ml_dtypes
import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.models.flux import abstract
from d2m_jax.weights import flux_keys, key_table, lora, safetensors, torch_import
from d2m_jax.weights.named_arrays import sizes
from tests.weights import toy

CONFIG = toy.config(1, 2)
SHAPES = sizes(abstract(CONFIG))
STATE = {layout: toy.random_state(layout, CONFIG) for layout in ("bfl", "diffusers")}
RANK = 3
LINEARS = {
    "bfl": (
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.txt_mlp.0",
        "single_blocks.1.linear1",
        "single_blocks.1.linear2",
        "final_layer.adaLN_modulation.1",
    ),
    "diffusers": (
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.ff_context.net.2",
        "single_transformer_blocks.1.attn.to_q",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.proj_out",
        "norm_out.linear",
    ),
}


def parameters(layout, state, dtype=np.float32):
    return key_table.parameters(flux_keys.keys(layout, CONFIG), state, SHAPES, dtype)


def pairs(layout, seed=1):
    """(up, down) of some linears."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in LINEARS[layout]:
        outputs, inputs = STATE[layout][f"{name}.weight"].shape
        shapes = (outputs, RANK), (RANK, inputs)
        found[name] = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return found


def written(file, layout, style, alpha=None):
    """A LoRA file of `pairs` in one of the styles of naming."""
    down, up = (
        ("lora_down", "lora_up") if style in ("kohya", "comfy down") else ("lora_A", "lora_B")
    )
    tensors = {}
    for name, (b, a) in pairs(layout).items():
        start = {
            "kohya": "lora_unet_" + name.replace(".", "_"),
            "comfy": "diffusion_model." + name,
            "comfy down": "diffusion_model." + name,
            "diffusers": "transformer." + name,
            "peft": "base_model.model." + name,
            "bare": name,
        }[style]
        tensors |= {f"{start}.{down}.weight": a, f"{start}.{up}.weight": b}
        if alpha is not None:
            tensors[f"{start}.alpha"] = np.asarray(alpha, np.float32)
    safetensors.write(file, tensors)
    return file


def expected(layout, factor):
    """All parameters with the LoRA in them, by way of torch's own layout."""
    state = dict(STATE[layout])
    for name, (up, down) in pairs(layout).items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + np.float32(factor) * (up @ down)
    return {name: param[...] for name, param in parameters(layout, state).items()}


@pytest.mark.parametrize(
    ("layout", "style", "alpha"),
    [
        ("bfl", "kohya", 1.5),
        ("bfl", "kohya", None),
        ("bfl", "comfy", None),
        ("bfl", "comfy down", 6),
        ("bfl", "bare", None),
        ("diffusers", "kohya", 6),
        ("diffusers", "diffusers", None),
        ("diffusers", "diffusers", 6),
        ("diffusers", "peft", None),
    ],
)
def test_styles(tmp_path, layout, style, alpha):
    file = written(tmp_path / "lora.safetensors", layout, style, alpha)
    factor = 0.7 * (1 if alpha is None else alpha / RANK)
    params = parameters(layout, STATE[layout])
    merged = lora.merge(params, params, [lora.read(file, CONFIG, 0.7)])
    for name, array in expected(layout, factor).items():
        np.testing.assert_allclose(merged[name][...], array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_any_lora_fits_any_layout(tmp_path):
    """The file's names need not be of the model's layout, and several add up."""
    files = [written(tmp_path / f"{layout}.safetensors", layout, "kohya") for layout in STATE]
    state = STATE["bfl"]
    params = parameters("bfl", state)
    merged = lora.merge(params, params, [lora.read(file, CONFIG) for file in files])
    zero = {n: np.zeros_like(a) for n, a in STATE["diffusers"].items()}
    for name, (up, down) in pairs("diffusers").items():
        zero[f"{name}.weight"] = up @ down
    other = parameters("diffusers", zero)
    for name, array in expected("bfl", 1).items():
        np.testing.assert_allclose(
            merged[name][...], array + other[name][...], rtol=1e-5, atol=1e-5
        )
        region = tuple(slice(n // 3, n // 3 + max(1, n // 2)) for n in array.shape)
        np.testing.assert_array_equal(merged[name][region], merged[name][...][region])


def test_one_rounding(tmp_path):
    """Sums are float32 whatever the type of the result."""
    file = written(tmp_path / "lora.safetensors", "bfl", "bare")
    narrow, exact = (parameters("bfl", STATE["bfl"], t) for t in (ml_dtypes.bfloat16, np.float32))
    merged = lora.merge(narrow, exact, [lora.read(file, CONFIG)])
    full = lora.merge(exact, exact, [lora.read(file, CONFIG)])
    for name, param in merged.items():
        assert param[...].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(param[...], full[name][...].astype(ml_dtypes.bfloat16), name)


def test_bias_and_stated_alpha(tmp_path):
    name, bias = "double_blocks.0.img_attn.proj", np.arange(32, dtype=np.float32)
    up, down = np.ones((32, 2), np.float32), np.ones((2, 32), np.float32)
    parts = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias}
    note = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2})}
    file = tmp_path / "a.safetensors"
    safetensors.write(file, {f"{name}.{role}": a for role, a in parts.items()}, note)
    params = parameters("bfl", STATE["bfl"])
    merged = lora.merge(params, params, [lora.read(file, CONFIG, 0.5)])
    ours = "double.0.block.img_attn.proj"
    difference = merged[f"{ours}.kernel"][...] - params[f"{ours}.kernel"][...]
    np.testing.assert_allclose(difference, 0.5 * 8 / 2 * 2, rtol=1e-5)
    difference = merged[f"{ours}.bias"][...] - params[f"{ours}.bias"][...]
    np.testing.assert_allclose(difference[0, 0], 0.5 * bias, rtol=1e-5, atol=1e-6)


def test_what_is_wrong_is_listed(tmp_path):
    file = tmp_path / "a.safetensors"
    a, b = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32)
    good = {"img_in.lora_A.weight": np.ones((2, 12), np.float32), "img_in.lora_B.weight": b}

    def refused(tensors, *messages):
        safetensors.write(file, tensors)
        with pytest.raises(ConfigError) as error:
            lora.read(file, CONFIG)
        assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
        for message in messages:
            assert message in str(error.value), str(error.value)

    refused(
        good
        | {
            "lora_te1_text_model_encoder.lora_down.weight": a,
            "double_blocks.0.img_attn.qvk.lora_A.weight": a,
            "double_blocks.0.img_attn.proj.lora_A.weight": a,
            "double_blocks.0.txt_attn.proj.lora_A.weight": a,
            "double_blocks.0.txt_attn.proj.lora_B.weight": b[:31],
            "double_blocks.0.txt_attn.proj.dora_scale": b,
        },
        "5 tensors do not fit",
        "lora_te1_text_model_encoder.lora_down.weight is unknown",
        "qvk.lora_A.weight is unknown, did you mean double_blocks_0_img_attn_qkv?",
        "img_attn.proj has down, expected down and up",
        "txt_attn.proj has up [31, 2] and down [2, 32], expected them for [32, 32]",
        "dora_scale is unknown",
    )
    refused({"img_in.lora_A.weight": a, "img_in.lora_B.weight": b}, "expected them for [32, 12]")
    refused({}, "expected a LoRA, found no tensors")
    with pytest.raises(ConfigError, match="absent: no such file"):
        lora.read(tmp_path / "absent", CONFIG)


def test_lora_alone_is_no_model(tmp_path):
    file = written(tmp_path / "lora.safetensors", "bfl", "kohya")
    with pytest.raises(ConfigError, match="a LoRA .* merge it into its model with --lora"):
        torch_import.open_source(file)
