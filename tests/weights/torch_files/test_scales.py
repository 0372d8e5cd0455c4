"""fp8 and int8 as ComfyUI and others write them: multiplied, or refused by what they are."""

import json

import ml_dtypes
import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.torch_files.scales import HEADER, multiplied_out
from d2m_jax.weights.torch_files.torch_import import open_source
from tests.weights import toy

CONFIG = toy.config(1, 2)
FP8 = ml_dtypes.float8_e4m3fn
WEIGHT = np.asarray([[1, -2, 448], [0.5, 3, 0.25]], FP8)
ONE = np.asarray(0.3, np.float32)


def mark(**fields):
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def header(**formats):
    layers = {name.replace("__", "."): {"format": kind} for name, kind in formats.items()}
    return {HEADER: json.dumps({"format_version": "1.0", "layers": layers})}


def refused(message, tensors, *headers):
    with pytest.raises(ConfigError, match=message) as error:
        multiplied_out("file", tensors, headers)
    assert str(error.value).startswith("file: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("kind", [FP8, ml_dtypes.float8_e5m2, np.int8])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (2, 1)])
def test_scales(scale, kind, shape):
    weight = WEIGHT.astype(np.float32).clip(-100, 100).astype(kind)
    factor = np.linspace(0.3, 1.7, int(np.prod(shape))).reshape(shape).astype(np.float32)
    tensors = {"a.weight": weight, f"a{scale}": factor, "a.bias": np.ones(2, np.float32)}
    found = multiplied_out("file", tensors)
    assert found.keys() == {"a.weight", "a.bias"}
    rows = [factor.flat[i % factor.size] for i in range(2)]
    for row, number, stored in zip(np.asarray(found["a.weight"]), rows, weight, strict=True):
        np.testing.assert_array_equal(row, stored.astype(np.float32) * number)


def test_what_lies_beside_is_no_weight():
    tensors = {
        "a.weight": WEIGHT,
        "a.weight_scale": ONE,
        "a.input_scale": ONE,
        "a.comfy_quant": mark(format="float8_e4m3fn", full_precision_matrix_mult=True),
        "b.weight": WEIGHT,
        "b.scale_weight": ONE,
        "b.scale_input": ONE,
        "scaled_fp8": np.empty(2, FP8),
        "model.scaled_fp8": np.empty(0, FP8),
    }
    found = multiplied_out("file", tensors, [header(a="float8_e4m3fn", absent="nvfp4")])
    assert found.keys() == {"a.weight", "b.weight"}
    for tensor in found.values():
        np.testing.assert_array_equal(np.asarray(tensor), WEIGHT.astype(np.float32) * ONE)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((0,), 4, 4),
        ((1, 4), 4, 4),  # per column
        ((4, 2, 1), 4, 8),  # per block
        ((4, 2), 4, 8),
        ((2, 2), 4, 4),
        ((3,), 4, 4),
        ((4, 0), 4, 4),
        ((2,), 4, 2),
    ],
)
def test_other_shapes(shape, rows, columns):
    tensors = {"a.weight": np.ones((rows, columns), FP8), "a.weight_scale": np.ones(shape, "f4")}
    shown = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    refused(f"a.weight_scale is a scale of shape {shown}, expected one number, or", tensors)


@pytest.mark.parametrize("bad", [0, np.nan, np.inf, 1e-60, 1e60])
def test_damaged_scales(bad):
    for number in (np.float64(bad), np.asarray([1.0, bad])):
        tensors = {"a.weight": WEIGHT, "a.weight_scale": number}
        refused("a.weight_scale is a scale of 0 or less, NaN or infinity", tensors)


def test_scales_that_fit_nothing():
    refused("a.weight_scale is a scale of a.weight, which is not", {"a.weight_scale": ONE})
    both = {"a.weight": WEIGHT, "a.weight_scale": ONE, "a.scale_weight": ONE}
    refused("a.weight has two scales", both)
    packed = {"a.weight": WEIGHT.view(np.uint8), "a.weight_scale": ONE}
    refused("a.weight_scale is a scale of uint8", packed)
    refused("a scale in uint8", {"a.weight": WEIGHT, "a.weight_scale": np.ones(2, np.uint8)})


def test_scales_of_weights_in_full_precision():
    """Multiplied where a mark says that they are quantised, as ComfyUI does; else nobody knows."""
    wide = WEIGHT.astype(ml_dtypes.bfloat16)
    expected = WEIGHT.astype(np.float32) * ONE
    for scale, more, headers in (
        (".scale_weight", {"scaled_fp8": wide[0, :0]}, ()),
        (".weight_scale", {"a.comfy_quant": mark(format="float8_e4m3fn")}, ()),
        (".weight_scale", {}, [header(a="float8_e4m3fn")]),
    ):
        found = multiplied_out("file", {"a.weight": wide, f"a{scale}": ONE, **more}, headers)
        np.testing.assert_array_equal(np.asarray(found["a.weight"]), expected)
    unmarked = {"a.weight": wide, "a.weight_scale": ONE}
    refused("a.weight_scale is a scale of bfloat16 that nothing marks", unmarked)
    found = multiplied_out("file", unmarked | {"a.weight_scale": np.ones((2, 1), "f4")})
    np.testing.assert_array_equal(np.asarray(found["a.weight"]), wide.astype(np.float32))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "what"])
def test_other_formats(kind):
    tensors = {"a.weight": WEIGHT.astype(np.int8), "a.weight_scale": ONE}
    message = f"a is quantised as {kind}, expected bf16, fp16, fp32 or fp8"
    refused(message, tensors | {"a.comfy_quant": mark(format=kind)})
    refused(message, tensors, header(a=kind))
    text = json.dumps({"layers": {"a": kind}})
    refused(message, tensors, {}, {HEADER: text})
    # Some tools write names without the file's start into the header, others with it.
    flux = {f"img_in.{n.removeprefix('a.')}": t for n, t in tensors.items()}
    refused(f"img_in is quantised as {kind}", flux, header(model__diffusion_model__img_in=kind))


def test_what_else_a_mark_states():
    """What may change the weights is refused by name; what says no, or is of the past, is not."""
    tensors = {"a.weight": WEIGHT, "a.weight_scale": ONE}
    plain = {"format": "float8_e4m3fn", "convrot": False, "orig_dtype": "torch.bfloat16"}
    for bad in ({"convrot": True}, {"group_size": 64}):
        ((name, value),) = bad.items()
        message = f"a is quantised as float8_e4m3fn with {name} = {value}, which may change"
        refused(message, tensors | {"a.comfy_quant": mark(**plain | bad)})
        refused(message, tensors, {HEADER: json.dumps({"layers": {"a": plain | bad}})})
    found = multiplied_out("file", tensors | {"a.comfy_quant": mark(**plain)})
    np.testing.assert_array_equal(np.asarray(found["a.weight"]), WEIGHT.astype(np.float32) * ONE)


def test_damaged_marks():
    tensors = {"a.weight": WEIGHT, "a.weight_scale": ONE}
    for bad in (mark(), mark(format=3), np.zeros(9, np.uint8), np.ones(4, np.float32)):
        refused("a.comfy_quant is damaged", tensors | {"a.comfy_quant": bad})
    for bad in ("", "{", "[]", "{}", '{"layers": 3}', '{"layers": {"a": 3}}', "[" * 100_000):
        refused("_quantization_metadata of its header is damaged", tensors, {HEADER: bad})
    for bad in ('{"layers": {"a": {}}}', '{"layers": {"a": {"format": null}}}'):
        refused("_quantization_metadata of its header is damaged", tensors, {HEADER: bad})
    refused("a is marked as 'float8_e4m3fn', expected a.weight_scale", {"a.weight": WEIGHT},
            header(a="float8_e4m3fn"))  # fmt: skip


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["weight.quant_state.bitsandbytes__nf4", "weight.absmax"], "bitsandbytes"),
        (["SCB", "weight_format"], "bitsandbytes"),
        (["weight_scale", "weight_scale_2"], "NVFP4"),
        (["qweight", "wscales", "lora_down", "lora_up"], "SVDQuant"),
        (["qweight", "qzeros", "scales", "g_idx"], "GPTQ or AWQ"),
        (["weight._data", "weight._scale"], "quanto"),
        (["_weight_qdata", "_weight_scale"], "torchao"),
        (["weight_packed", "weight_scale", "weight_shape"], "compressed-tensors"),
        (["weight_scale_inv"], "fp8 with a scale per block"),
    ],
)
def test_other_tools(tmp_path, names, kind):
    """By name, before anything else of theirs is found wrong."""
    state = toy.random_state("diffusers", CONFIG, ml_dtypes.bfloat16)
    layer = "transformer_blocks.0.attn.to_q"
    if "weight" not in names:
        state[f"{layer}.weight"] = np.ones((32, 16), np.uint8)
    state |= {f"{layer}.{name}": np.ones((32, 2), np.uint8) for name in names}
    safetensors.write(tmp_path / "a.safetensors", state)
    with pytest.raises(ConfigError, match=f"a.safetensors: .*{kind}.*expected bf16, fp16"):
        open_source(tmp_path / "a.safetensors")


@pytest.mark.parametrize("start", ["", "model.diffusion_model.", "model."])
@pytest.mark.parametrize("shards", [False, True])
def test_a_whole_file(tmp_path, start, shards, capfd):
    """ComfyUI's, marks in the header: multiplied out through every layer of names."""
    state, expected, formats = {}, {}, {}
    for name, array in toy.random_state("bfl", CONFIG).items():
        expected[name] = array
        if array.ndim == 2 and "_blocks" in name:
            layer = name.removesuffix(".weight")
            scale = np.asarray(np.abs(array).max() / 448, np.float32)
            array = (array / scale).astype(FP8)
            expected[name] = array.astype(np.float32) * scale
            state |= {f"{start}{layer}.weight_scale": scale, f"{start}{layer}.input_scale": scale}
            formats[start + layer] = {"format": "float8_e4m3fn"}
        state[start + name] = array
    metadata = {HEADER: json.dumps({"layers": formats})}
    file = tmp_path / "flux.safetensors"
    if shards:
        safetensors.write_sharded(tmp_path, "flux", state, 50_000)
        file = tmp_path / "flux.safetensors.index.json"
    else:
        safetensors.write(file, state, metadata)
    source = open_source(file)
    assert source.tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(source.tensors[name]), array, name)
    assert len(capfd.readouterr().err.splitlines()) == (start == "model.")
    if not shards:
        formats[f"{start}single_blocks.1.linear1"] = {"format": "mxfp8"}
        safetensors.write(file, state, {HEADER: json.dumps({"layers": formats})})
        with pytest.raises(ConfigError, match="single_blocks.1.linear1 is quantised as mxfp8"):
            open_source(file)
