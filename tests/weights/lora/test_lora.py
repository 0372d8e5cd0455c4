"""LoRA files in every common layout, merged: against W + s·α/r·BA in torch's own layout."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from d2m_jax.config import ConfigError, MoEConfig, StackConfig
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import sizes
from d2m_jax.weights import convert
from d2m_jax.weights.directory import orbax_blocks
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.keys import flux_keys, key_table
from d2m_jax.weights.lora import lora
from d2m_jax.weights.torch_files import torch_import
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


OUTER = "double_blocks.0.img_attn.proj"  # [32, 32]
OURS = "double.0.block.img_attn.proj"


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def pair(name, outputs=32, inputs=32, rank=2, seed=0):
    """A LoRA of one linear by PEFT's names."""
    up, down = random(outputs, rank, seed=seed), random(rank, inputs, seed=seed)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, up @ down


def added(tmp_path, tensors, scale=1.0, note=None, config=CONFIG, name="lora.safetensors"):
    """What a file adds to each of our parameters that it changes, in torch's layout."""
    file = tmp_path / name
    safetensors.write(file, tensors, note)
    params = parameters("bfl", STATE["bfl"])
    merged = lora.merge(params, params, [lora.read(file, config, scale)])
    difference = {n: merged[n][...] - params[n][...] for n in params}
    return {n: a.squeeze().T for n, a in difference.items() if np.abs(a).max() > 0}


def close(found, expected):
    """float32's rounding of the sums W + Δ, whose numbers are below 100, and of Δ itself."""
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "factor"),
    [
        ({"lora_alpha": 8, "r": 2}, 4),
        ({"lora_alpha": 8, "r": 2, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "r": 2, "alpha_pattern": {"img_attn.proj": 3}}, 1.5),
        ({"lora_alpha": 8, "r": 2, "alpha_pattern": {"txt_attn.proj": 3}}, 4),
        ({"lora_alpha": 8, "r": 2, "alpha_pattern": {r"double_blocks\.\d+\..*proj": 3}}, 1.5),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {"img_attn.proj": 2}}, 4),
        ({"lora_alpha": 8, "r": 2, "alpha_pattern": {"attn.proj": 3}}, 4),  # no whole component
    ],
)
def test_strength_as_peft_states_it(tmp_path, said, factor):
    """In the header (diffusers), beside the file, or in the folder: of weights and biases."""
    tensors, product = pair(OUTER)
    tensors[f"{OUTER}.lora_B.bias"] = bias = random(32)
    note = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in said.items()})}
    expected = {f"{OURS}.kernel": 0.5 * factor * product, f"{OURS}.bias": 0.5 * factor * bias}
    found = added(tmp_path, tensors, 0.5, note)
    assert found.keys() == expected.keys()
    for name in found:
        close(found[name], expected[name])
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | said))
    renamed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    found = added(folder, renamed, 0.5, name="adapter_model.safetensors")
    close(found[f"{OURS}.kernel"], expected[f"{OURS}.kernel"])
    params = parameters("bfl", STATE["bfl"])
    merged = lora.merge(params, params, [lora.read(folder, CONFIG, 0.5)])
    difference = merged[f"{OURS}.bias"][...] - params[f"{OURS}.bias"][...]
    close(difference[0, 0], expected[f"{OURS}.bias"])
    # of another file of the same folder it says nothing
    found = added(folder, tensors, name="other.safetensors")
    close(found[f"{OURS}.kernel"], product)


def spelt(tensors, spell):
    """The tensors with another spelling of the linear."""
    return {n.replace(OUTER, spell): t for n, t in tensors.items()}


@pytest.mark.parametrize(
    "spell",
    [
        f"transformer.base_model.model.{OUTER}",
        f"base_model.model.transformer.{OUTER}",
        f"transformer._orig_mod.{OUTER}",
        f"_orig_mod.module.{OUTER}",
        "double_blocks.0._orig_mod.img_attn.proj",
        "transformer.double_blocks.0._fsdp_wrapped_module.img_attn._checkpoint_wrapped_module.proj",
        f"model.diffusion_model.{OUTER}",
        f"unet.{OUTER}",
        "lora_unet_double_blocks_0_img_attn_proj_",
        "lora_unet__orig_mod_double_blocks_0_img_attn_proj",
        "lora_transformer_transformer_blocks_0_attn_to_out_0",
        "lycoris_transformer_blocks_0_attn_to_out_0",
        "transformer.transformer_blocks.0.attn.to_out.0",
        "double_blocks.0.processor.proj_lora1",
        "diffusion_model.double_blocks.0.processor.proj_lora1",
    ],
)
def test_every_spelling_of_a_linear(tmp_path, spell):
    tensors, product = pair(OUTER)
    found = added(tmp_path, spelt(tensors, spell))
    assert found.keys() == {f"{OURS}.kernel"}
    close(found[f"{OURS}.kernel"], product)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.style.weight", "lora_B.style.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_A", "lora_B"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("down.weight", "up.weight"),
    ],
)
def test_every_spelling_of_a_role(tmp_path, down, up):
    tensors, product = pair(OUTER)
    found = added(
        tmp_path,
        dict(zip([f"{OUTER}.{down}", f"{OUTER}.{up}"], tensors.values(), strict=True)),
    )
    close(found[f"{OURS}.kernel"], product)


def test_parts_of_fused_linears(tmp_path):
    """OneTrainer numbers them as OMI does, XLabs has one of queries, keys and values alone."""
    tensors, product = pair("transformer.double_blocks.0.txt_attn.qkv.1")
    expected = np.zeros((96, 32), np.float32)
    expected[32:64] = product
    close(added(tmp_path, tensors)["double.0.block.txt_attn.qkv.kernel"], expected)
    tensors, product = pair("single_blocks.1.linear1.3", outputs=128)
    found = added(tmp_path, tensors)
    assert found.keys() == {"single.0.block.mlp.in_layer.kernel"}
    close(found["single.0.block.mlp.in_layer.kernel"][..., 1], product)
    tensors, product = pair("single_blocks.1.processor.qkv_lora", outputs=96)
    found = added(tmp_path, tensors)
    close(found["single.0.block.qkv.kernel"][..., 1], product)


def lokr(alpha=3.0, **parts):
    return {f"{OUTER}.lokr_{n}": a for n, a in parts.items()} | {
        f"{OUTER}.alpha": np.asarray(alpha, np.float32)
    }


def test_lokr(tmp_path):
    """In each form: alpha / rank counts unless both factors are whole (LyCORIS 4.1.3)."""
    w1, w2 = random(4, 8), random(8, 4)
    a1, b1, a2, b2 = random(4, 2), random(2, 8), random(8, 2), random(2, 4)
    for tensors, expected in (
        (lokr(w1=w1, w2=w2), np.kron(w1, w2)),
        (lokr(np.inf, w1=w1, w2=w2), np.kron(w1, w2)),
        (lokr(w1=w1, w2_a=a2, w2_b=b2), 1.5 * np.kron(w1, a2 @ b2)),
        (lokr(w1_a=a1, w1_b=b1, w2=w2), 1.5 * np.kron(a1 @ b1, w2)),
        (lokr(w1_a=a1, w1_b=b1, w2_a=a2, w2_b=b2), 1.5 * np.kron(a1 @ b1, a2 @ b2)),
    ):
        close(added(tmp_path, tensors, 0.5)[f"{OURS}.kernel"], 0.5 * expected)


def test_loha(tmp_path):
    a, b, c, d = random(32, 2), random(2, 32), random(32, 2, seed=1), random(2, 32, seed=1)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    tensors = {f"{OUTER}.{role}": array for role, array in tensors.items()}
    close(added(tmp_path, tensors)[f"{OURS}.kernel"], (a @ b) * (c @ d))
    tensors[f"{OUTER}.alpha"] = np.float32(5)
    close(added(tmp_path, tensors, 0.5)[f"{OURS}.kernel"], 0.5 * 5 / 2 * (a @ b) * (c @ d))


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [("lora_magnitude_vector", (32,), 1), ("dora_scale", (32, 1), 1), ("dora_scale", (1, 32), 0)],
)
def test_dora(tmp_path, name, shape, axis):
    tensors, product = pair(OUTER)
    tensors |= {f"{OUTER}.{name}": 1 + random(*shape) ** 2, f"{OUTER}.alpha": np.float32(3)}
    old = STATE["bfl"][f"{OUTER}.weight"]
    new = old + 0.5 * 3 / 2 * product
    length = np.linalg.norm(new, axis=axis, keepdims=True)
    magnitude = (1 + random(*shape) ** 2).reshape(length.shape)
    found = added(tmp_path, tensors, 0.5)
    close(found[f"{OURS}.kernel"], magnitude * new / length - old)


@pytest.mark.filterwarnings("error")
def test_dora_of_a_row_of_zeros(tmp_path):
    """It has no direction to keep, and stays 0."""
    tensors, _ = pair(OUTER)
    tensors[f"{OUTER}.dora_scale"] = 1 + random(32, 1) ** 2
    row = STATE["bfl"][f"{OUTER}.weight"][3]
    tensors[f"{OUTER}.lora_B.weight"] = up = np.zeros((32, 33), np.float32)
    tensors[f"{OUTER}.lora_A.weight"] = np.eye(33, 32, dtype=np.float32)
    up[3, :32] = -row
    found = added(tmp_path, tensors)[f"{OURS}.kernel"]
    np.testing.assert_array_equal(found[3], -row)
    assert np.isfinite(found).all()


def test_dora_of_a_linear_that_we_split(tmp_path):
    """Norms are those of BFL's whole linear2, of which we have the two sides apart."""
    name, state = "single_blocks.0.linear2", STATE["bfl"]
    tensors, product = pair(name, inputs=160)
    tensors[f"{name}.dora_scale"] = magnitude = 1 + random(32, 1) ** 2
    new = state[f"{name}.weight"] + product
    state = state | {f"{name}.weight": magnitude * new / np.linalg.norm(new, axis=1, keepdims=True)}
    file = tmp_path / "a.safetensors"
    safetensors.write(file, tensors)
    params = parameters("bfl", STATE["bfl"])
    merged = lora.merge(params, params, [lora.read(file, CONFIG)])
    for ours, param in parameters("bfl", state).items():
        close(merged[ours][...], param[...])


def test_differences_and_whole_tensors(tmp_path):
    """Of weights, biases and norms, beside a LoRA (ComfyUI, LyCORIS; PEFT's modules_to_save)."""
    norm, ours = "double_blocks.0.img_attn.norm", "double.0.block.img_attn"
    tensors, product = pair("double_blocks.0.img_attn.qkv", outputs=96)
    diff, bias, scale, other = random(32, 32), random(32), random(16), random(16, seed=1)
    tensors |= {
        f"{OUTER}.diff": diff,
        f"{OUTER}.diff_b": bias,
        f"{norm}.query_norm.diff": scale,
        f"{norm}.key_norm.scale.diff": other,
        "double_blocks.0.txt_attn.proj.weight": diff,
        "double_blocks.0.txt_attn.norm.query_norm.w_norm": other,
        "lycoris_transformer_blocks_0_attn_norm_added_k.scale": scale,
    }
    state = STATE["bfl"]
    expected = {
        f"{ours}.qkv.kernel": 0.5 * product,
        f"{ours}.proj.kernel": 0.5 * diff,
        f"{ours}.proj.bias": 0.5 * bias,
        f"{ours}.norm.query_norm.scale": 0.5 * scale,
        f"{ours}.norm.key_norm.scale": 0.5 * other,
        "double.0.block.txt_attn.proj.kernel": 0.5
        * (diff - state["double_blocks.0.txt_attn.proj.weight"]),
        "double.0.block.txt_attn.norm.query_norm.scale": 0.5 * other,
        "double.0.block.txt_attn.norm.key_norm.scale": 0.5
        * (scale - state["double_blocks.0.txt_attn.norm.key_norm.scale"]),
    }
    found = added(tmp_path, tensors, 0.5)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        close(found[name], array)


ENCODERS = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": random(2, 8),
    "lora_te2_encoder_block_0_layer_0_SelfAttention_q.alpha": np.float32(1),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": random(2, 8),
    "text_encoders.clip_l.transformer.text_model.final_layer_norm.diff": random(8),
    "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_down.weight": random(2, 8),
    "t5.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight": random(8, 2),
    "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": random(2, 8),
    "bundle_emb.cat.clip_l": random(1, 8),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": random(
        2, 8
    ),
    "model.text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": random(2, 8),
}


def test_text_encoders_are_left_out(tmp_path, capsys):
    tensors, product = pair(OUTER)
    found = added(tmp_path, tensors | ENCODERS)
    close(found[f"{OURS}.kernel"], product)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{len(ENCODERS)} tensors of text encoders left out (lora_te1_text" in line
    with pytest.raises(ConfigError, match="a LoRA of text encoders alone .*8 more|encoders alone"):
        added(tmp_path, ENCODERS)


def test_one_lora_under_two_kinds_of_name(tmp_path, capsys):
    """It counts once; what only one of them has counts too."""
    tensors, product = pair(OUTER)
    other, elsewhere = pair("double_blocks.0.txt_attn.proj", seed=1)
    theirs = spelt(tensors, "transformer.transformer_blocks.0.attn.to_out.0")
    found = added(tmp_path, tensors | theirs | other)
    close(found[f"{OURS}.kernel"], product)
    close(found["double.0.block.txt_attn.proj.kernel"], elsewhere)
    assert "1 linears by BFL's names (double_blocks.0.img_attn.proj, …) left out" in (
        capsys.readouterr().err
    )
    found = added(tmp_path, tensors | spelt(tensors, f"transformer.{OUTER}"))
    close(found[f"{OURS}.kernel"], product)


def test_a_fused_linear_and_a_part_of_it(tmp_path):
    """Under two kinds of name it counts once where all of it is there twice, else it is refused."""
    fused = pair("lora_unet_double_blocks_0_img_attn_qkv", outputs=96)[0]
    parts, products = {}, []
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        more, product = pair(f"transformer.transformer_blocks.0.attn.{name}", seed=i)
        parts |= more
        products.append(product)
    found = added(tmp_path, fused | parts)
    close(found["double.0.block.img_attn.qkv.kernel"], np.concatenate(products))
    del parts["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"]
    del parts["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"]
    with pytest.raises(ConfigError, match="img_attn.qkv, and parts of it by diffusers' names too"):
        added(tmp_path, fused | parts)


def test_settings_beside_a_file_that_is_not_alone(tmp_path, capsys):
    """They count in the folder given, and else a line says that they do not."""
    tensors, product = pair(OUTER)
    safetensors.write(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    safetensors.write(tmp_path / "optimizer.safetensors", tensors)
    settings = {"r": 2, "lora_alpha": None, "peft_type": "LORA"}  # PEFT's default: 8
    (tmp_path / "adapter_config.json").write_text("\ufeff" + json.dumps(settings))
    params = parameters("bfl", STATE["bfl"])

    def kernel(path):
        merged = lora.merge(params, params, [lora.read(path, CONFIG)])
        return (merged[f"{OURS}.kernel"][...] - params[f"{OURS}.kernel"][...])[0, 0].T

    close(kernel(tmp_path), 4 * product)
    assert capsys.readouterr().err == ""
    close(kernel(tmp_path / "pytorch_lora_weights.safetensors"), product)
    assert "adapter_config.json beside it not used" in capsys.readouterr().err


def test_a_named_adapter_in_a_folder_of_its_own(tmp_path):
    """PEFT's save_pretrained writes NAME/adapter_model.safetensors: the only one is meant."""
    tensors, product = pair(OUTER)
    for name in ("q", "r"):
        (tmp_path / name).mkdir()
        safetensors.write(tmp_path / name / "adapter_model.safetensors", tensors)
        (tmp_path / name / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
        if name == "q":
            params = parameters("bfl", STATE["bfl"])
            merged = lora.merge(params, params, [lora.read(tmp_path, CONFIG)])
            difference = merged[f"{OURS}.kernel"][...] - params[f"{OURS}.kernel"][...]
            close(difference[0, 0].T, 4 * product)
    with pytest.raises(ConfigError, match="holds the LoRAs q; r; give one of these folders"):
        lora.read(tmp_path, CONFIG)


def test_strength_of_zero_and_of_dora(tmp_path, capsys):
    tensors, _ = pair(OUTER)
    tensors[f"{OUTER}.dora_scale"] = 1 + random(32, 1) ** 2
    tensors[f"{OUTER}.alpha"] = np.asarray(2, np.int64)
    assert added(tmp_path, tensors, 0.0) == {}
    assert capsys.readouterr().err == ""
    added(tmp_path, tensors, 0.5)
    assert "DoRA at a strength of 0.5 as PEFT has it; other tools differ" in capsys.readouterr().err


def sparse():
    """A model whose second stack of single blocks is a mixture of experts and of blocks."""
    config = toy.config(1, 1)
    moe = MoEConfig(experts=4, top_k=2, shared_ratio=2.0)
    stacks = (StackConfig(1), StackConfig(1, 2, 1, ffn="moe"))
    config = replace(config, single=stacks, moe=moe, modulation_rank=8)
    tree = sizes(abstract(config))
    arrays = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(tree.items())}
    return config, {name: orbax_blocks.parameter(array) for name, array in arrays.items()}


def test_a_sparse_model_takes_what_it_has(tmp_path):
    """Attention by all names, dense FFNs, and experts by those of --export torch."""
    config, params = sparse()
    file = tmp_path / "a.safetensors"
    changes = {
        "transformer.single_transformer_blocks.2.attn.to_k": (
            (32, 32),
            "single.1.block.qkv.kernel",
        ),
        "single_transformer_blocks.0.proj_mlp": ((128, 32), "single.0.block.mlp.in_layer.kernel"),
        "double_blocks.0.txt_mlp.2": ((32, 128), "double.0.block.txt_mlp.out_layer.kernel"),
        "base_model.model.single_blocks.1.attn_out": ((32, 32), "single.1.block.attn_out.kernel"),
        "single_blocks.2.mlp.experts.3.2": ((32, 16), "single.1.block.mlp.experts.out_kernel"),
        "single_routers.1.vec": ((2, 32), "single.1.router.vec.kernel"),
    }
    tensors, products = {}, {}
    for i, (name, (shape, ours)) in enumerate(changes.items()):
        more, products[ours] = pair(name, *shape, seed=i)
        tensors |= more
    safetensors.write(file, tensors)
    merged = lora.merge(params, params, [lora.read(file, config)])
    found = {n: merged[n][...] - params[n][...] for n in params}
    found = {n: a for n, a in found.items() if np.abs(a).max() > 0}
    assert found.keys() == products.keys()
    where = {
        "single.1.block.qkv.kernel": (0, 1, slice(None), slice(32, 64)),
        "single.1.block.attn_out.kernel": (0, 0),
        "single.1.block.mlp.experts.out_kernel": (0, 1, 3),
    }
    for name, product in products.items():
        part = found[name][where.get(name, (0, 0) if found[name].ndim == 4 else (0,))]
        close(part.T, product)
        assert np.count_nonzero(found[name]) == np.count_nonzero(part)


def test_a_sparse_model_refuses_the_rest(tmp_path):
    config, _ = sparse()
    file = tmp_path / "a.safetensors"
    for name, shape in (
        ("single_blocks.1.linear1", (224, 32)),
        ("single_transformer_blocks.2.proj_mlp", (128, 32)),
        ("double_blocks.0.img_mod.lin", (192, 32)),
    ):
        good, _ = pair(OUTER)
        safetensors.write(file, good | pair(name, *shape)[0])
        with pytest.raises(ConfigError, match=f"sparse model .* changes {name}.weight, and"):
            lora.read(file, config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha", "SDXL"),
        ("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight", "SDXL"),
        ("lora_unet_joint_blocks_3_x_block_attn_qkv.lora_down.weight", "Stable Diffusion 3"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight", "FLUX.2"),
        ("diffusion_model.double_stream_modulation_img.lin.lora_A.weight", "FLUX.2"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight", "Qwen-Image"),
        ("diffusion_model.blocks.0.cross_attn.k.lora_A.weight", "Wan"),
        ("transformer.double_blocks.0.img_mlp.fc1.lora_A.weight", "HunyuanVideo"),
        ("diffusion_model.layers.0.attention.qkv.lora_A.weight", "Z-Image or Lumina"),
        ("transformer.transformer_blocks.0.attn1.to_k.lora_A.weight", "LTX-Video"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "a language model"),
        ("distilled_guidance_layer.layers.0.in_layer.lora_A.weight", "Chroma"),
        (f"{OUTER}.oft_blocks", "OFT"),
        (f"{OUTER}.a1.weight", "GLoRA"),
        (f"{OUTER}.lora_mid.weight", "Tucker"),
        (f"{OUTER}.ia3_l", "(IA)³"),
    ],
)
def test_what_else_it_is(tmp_path, name, kind):
    with pytest.raises(ConfigError) as error:
        added(tmp_path, pair(OUTER)[0] | {name: random(2, 32)})
    assert f"{kind}" in str(error.value) and name in str(error.value)
    assert "expected a LoRA of FLUX.1" in str(error.value)


def test_a_control_lora_is_told_by_its_channels(tmp_path):
    config = replace(toy.config(1, 2), in_channels=64)
    tensors, _ = pair("transformer.x_embedder", inputs=128)
    said = "FLUX.1 Depth or Canny, which reads 128 channels"
    comfy = "diffusion_model.img_in"
    for form in (
        tensors,
        {f"{comfy}.diff": random(32, 128)},
        {f"{comfy}.diff": random(32, 64), f"{comfy}.reshape_weight": np.asarray([32, 128])},
        {f"{comfy}.set_weight": random(32, 128)},
    ):
        with pytest.raises(ConfigError, match=said):
            added(tmp_path, form, config=config)
    of_own_shape = {f"{OUTER}.reshape_weight": np.asarray([32, 32])}
    other, product = pair(OUTER)
    close(added(tmp_path, other | of_own_shape)[f"{OURS}.kernel"], product)
    with pytest.raises(ConfigError, match="proj fills the weight up, expected .32, 32. as it is"):
        added(tmp_path, other | {f"{OUTER}.reshape_weight": np.asarray([32, 48])})


def test_what_is_wrong_is_listed(tmp_path, capsys):
    file = tmp_path / "lora.safetensors"
    a, b = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32)
    good = {"img_in.lora_A.weight": np.ones((2, 12), np.float32), "img_in.lora_B.weight": b}

    def refused(tensors, *messages, scale=1.0, note=None):
        with pytest.raises(ConfigError) as error:
            added(tmp_path, tensors, scale, note)
        assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
        for message in messages:
            assert message in str(error.value), str(error.value)

    def both(role, array, *messages, **more):
        refused(pair(OUTER)[0] | {f"{OUTER}.{role}": array}, f"{OUTER} {messages[0]}", **more)

    refused(
        good
        | {
            "double_blocks.0.img_attn.qvk.lora_A.weight": a,
            "double_blocks.7.img_attn.qkv.lora_A.weight": a,
            "double_blocks.0.img_attn.proj.lora_A.weight": a,
            "double_blocks.0.txt_attn.proj.lora_A.weight": a,
            "double_blocks.0.txt_attn.proj.lora_B.weight": b[:31],
            "double_blocks.0.img_mlp.0.lora_B.weight": b,
            "double_blocks.0.img_mlp.0.lora_A.weight": np.ones((3, 32), np.float32),
        },
        "5 tensors do not fit",
        "qvk.lora_A.weight is unknown, did you mean double_blocks_0_img_attn_qkv?",
        "double_blocks.7.img_attn.qkv.lora_A.weight is unknown, this model has 1 such blocks",
        "img_attn.proj has down, expected up too",
        "txt_attn.proj changes [31, 32], expected [32, 32]",
        "img_mlp.0 has up [32, 2] and down [3, 32], expected two matrices to multiply",
    )
    refused({"img_in.lora_A.weight": a, "img_in.lora_B.weight": b}, "reads 32 channels")
    refused({}, "found no tensors of one")
    refused(STATE["bfl"], "holds no differences of weights, expected a LoRA")
    refused({f"{OUTER}.alpha": np.float32(1)}, "has alpha alone, expected a difference")
    both("alpha", np.ones(2, np.float32), "has alpha [2], expected one number")
    both("alpha", np.float32(0), "has alpha 0.0, expected a number other than 0")
    both("alpha", np.float32(np.nan), "has alpha nan")
    both("diff", random(32, 32), "is changed in 2 ways at once (LoRA, diff)")
    both("dora_scale", random(31), "has a magnitude [31], expected one for [32, 32]")
    both("lora_B.bias", random(31), "has a bias [31], expected [32]")
    refused(pair(OUTER)[0] | {f"{OUTER}.diff_b": np.full(32, np.nan, "f4")}, "diff_b holds a NaN")
    refused({f"{OUTER}.diff": np.ones((32, 32), np.int8)}, "diff is int8, expected floating point")
    refused(
        {f"{OUTER}.lokr_w1": random(4, 4), f"{OUTER}.lokr_w2": random(4, 4)}, "changes [16, 16]"
    )
    refused({f"{OUTER}.lokr_w1": random(4, 4)}, "expected lokr_w2_a and lokr_w2_b too")
    two = pair(f"transformer.{OUTER}", seed=1)[0]
    refused(pair(OUTER)[0] | two, "has two of down, the other is transformer.")
    styles = {f"{OUTER}.lora_A.a.weight": a, f"{OUTER}.lora_B.b.weight": b}
    refused(styles, "holds the adapters a and b, expected one")
    refused(good, "a strength of nan", scale=float("nan"))
    for said, message in (
        ({"r": 4}, "has rank 2, "),
        ({"r": 2, "lora_alpha": "x"}, "lora_adapter_metadata: damaged"),
        ({"r": 2, "alpha_pattern": {"(": 1}}, "lora_adapter_metadata: damaged"),
        ({"r": 2, "peft_type": "OFT"}, "peft_type = 'OFT', expected one of LORA, LOHA, LOKR"),
        ({"r": 2, "init_lora_weights": "pissa"}, "which changes the base model too"),
        ({"r": 2, "use_dora": True}, "lacks the magnitude of a DoRA"),
    ):
        refused(good, message, note={"lora_adapter_metadata": json.dumps(said)})
    with pytest.raises(ConfigError, match="absent: no such file"):
        lora.read(tmp_path / "absent", CONFIG)
    capsys.readouterr()
    marked = pair(OUTER)[0] | {"__a_marker__": np.zeros(0, np.float32)}
    assert added(tmp_path, marked).keys() == {f"{OURS}.kernel"}
    assert capsys.readouterr().err.endswith("empty tensors ignored: __a_marker__\n")


def test_the_command_line_form(tmp_path):
    file = tmp_path / "a:b.safetensors"
    file.touch()
    assert convert.lora_of(str(file)) == (file, 1.0)
    assert convert.lora_of(f"{file}:-0.5") == (file, -0.5)
    assert convert.lora_of("plain.safetensors") == (Path("plain.safetensors"), 1.0)
    assert convert.lora_of("a:b/c.safetensors") == (Path("a:b/c.safetensors"), 1.0)
    with pytest.raises(ConfigError, match="https://x.y/z: addresses are not downloaded"):
        convert.lora_of("https://x.y/z")
    for scale in ("nan", "inf", "0,8", "0_5", "strong", ""):
        with pytest.raises(ConfigError, match=f"SCALE = {scale}, expected a number such as 0.8"):
            convert.lora_of(f"x.safetensors:{scale}")


def test_lora_alone_is_no_model(tmp_path):
    file = written(tmp_path / "lora.safetensors", "bfl", "kohya")
    with pytest.raises(
        ConfigError, match="a LoRA .* merge it into its model: python conv.* --lora "
    ):
        torch_import.open_source(file)
