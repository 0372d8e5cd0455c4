"""Torch's files in and out: formats and types, shardings, bit-identical round trips, diffusers."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import d2m_jax
from d2m_jax.config import ConfigError, ModelConfig
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import names
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.torch_files.torch_export import export_bfl, export_diffusers, export_torch
from d2m_jax.weights.torch_files.torch_import import load, load_model, open_source
from tests.half import needs_half
from tests.models.toy import inputs
from tests.seed import generator
from tests.weights import toy

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
CONFIG = toy.config(1, 2)


@pytest.fixture(scope="module")
def bfl(tmp_path_factory):
    """A file in BFL's layout, float32."""
    file = tmp_path_factory.mktemp("bfl") / "flux.safetensors"
    safetensors.write(file, toy.random_state("bfl", CONFIG))
    return file


@pytest.fixture(scope="module")
def expected(bfl):
    """Its parameters by our names."""
    return {name: param[...] for name, param in open_source(bfl).parameters().items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array), name)


def test_diffusers_folder_and_back(tmp_path):
    """save_pretrained → load_model → our export → from_pretrained: the same model all along."""
    theirs = toy.diffusers_model(CONFIG)
    theirs.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="60KB")
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 2
    model = d2m_jax.load_model(tmp_path / "pipe")
    assert model.config == CONFIG
    args = inputs(CONFIG, text=3)
    mine = np.asarray(model(*args))
    params = open_source(tmp_path / "pipe").parameters()
    export_diffusers(tmp_path / "back", CONFIG, params, shard_bytes=60_000)
    back = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "back").eval()
    state = back.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    img, img_ids, txt, txt_ids, t, y, guidance = (torch.from_numpy(np.array(a)) for a in args)
    with torch.no_grad():
        velocity = back(img, txt, y, t, img_ids[0], txt_ids[0], guidance, return_dict=False)[0]
    # float32 sums in another order, and guidance times 1000 turns the sinusoid a long way
    # (tests/models/test_flux_parity.py); a wrong tensor is off by 1e-1
    assert np.linalg.norm(mine - velocity.numpy()) / np.linalg.norm(velocity) < 1e-3


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_import_and_export_keep_every_bit(tmp_path, layout, dtype):
    rng = generator()
    state = toy.random_state(layout, CONFIG, dtype)
    # any bits of finite numbers, subnormal ones and -0 among them
    state = {
        n: np.frombuffer(rng.bytes(a.nbytes), dtype).reshape(a.shape) for n, a in state.items()
    }
    with np.errstate(invalid="ignore"):
        state = {n: np.where(np.isfinite(a), a, dtype(-0.0)) for n, a in state.items()}
    safetensors.write(tmp_path / "config.safetensors", state)
    source = open_source(tmp_path / "config.safetensors")
    params = source.parameters()
    config = source.config
    if layout == "bfl":
        export_bfl(tmp_path / "out.safetensors", config, params)
        back = safetensors.read(tmp_path / "out.safetensors")
    else:
        export_diffusers(tmp_path / "out", config, params)
        back = safetensors.read(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert np.asarray(back[name]).tobytes() == array.tobytes(), name


def test_layouts_and_places_agree(bfl, expected, tmp_path):
    """The same model as shards, with ComfyUI's prefix, in diffusers' layout, as a folder."""
    state = safetensors.read(bfl)
    (tmp_path / "shards").mkdir()
    safetensors.write_sharded(tmp_path / "shards", "flux", state, 50_000)
    comfy = {"model.diffusion_model." + n: t for n, t in state.items()}
    comfy |= {"vae.decoder.conv_in.weight": np.ones(2, np.float32)}
    safetensors.write(tmp_path / "comfy.safetensors", comfy)
    export_diffusers(tmp_path / "folder", CONFIG, expected)
    shutil.copytree(tmp_path / "folder", tmp_path / "pipe" / "transformer")
    for path in ("shards", "comfy.safetensors", "folder", "pipe"):
        same({n: p[...] for n, p in open_source(tmp_path / path).parameters().items()}, expected)
    index = next((tmp_path / "shards").glob("*.index.json"))
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert open_source(index).layout == "bfl"
    # without config.json, which alone tells how a head is divided among the axes
    (tmp_path / "folder" / "config.json").unlink()
    assert open_source(tmp_path / "folder").config.axes_dim == (4, 6, 6)


@needs_half
@pytest.mark.parametrize("kind", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_other_types(bfl, tmp_path, kind):
    narrow = {n: np.asarray(t).astype(kind) for n, t in safetensors.read(bfl).items()}
    safetensors.write(tmp_path / "a.safetensors", narrow)
    source = open_source(tmp_path / "a.safetensors")
    params = source.parameters()
    assert {p.dtype.name for p in params.values()} == {
        "float32" if kind == "float16" else "bfloat16"
    }
    wide = {n: a.astype(np.float32) for n, a in narrow.items()}
    safetensors.write(tmp_path / "b.safetensors", wide)
    exact = open_source(tmp_path / "b.safetensors").parameters()
    for name, param in params.items():
        np.testing.assert_array_equal(param[...].astype(np.float32), exact[name][...])


def test_scaled_fp8(bfl, expected, tmp_path):
    state = {}
    for name, tensor in safetensors.read(bfl).items():
        array = np.asarray(tensor)
        if array.ndim == 2:
            scale = np.abs(array).max() / 448
            state[name.removesuffix("weight") + "scale_weight"] = np.asarray(scale, np.float32)
            array = (array / scale).astype(ml_dtypes.float8_e4m3fn)
        state[name] = array
    state["scaled_fp8"] = np.empty(0, ml_dtypes.float8_e4m3fn)
    safetensors.write(tmp_path / "a.safetensors", state)
    for name, param in open_source(tmp_path / "a.safetensors").parameters().items():
        # e4m3 has 3 bits after the point: half a step is 1/16 of a number
        np.testing.assert_allclose(param[...], expected[name], rtol=1 / 15, atol=0.02)


@pytest.mark.parametrize(
    ("kind", "said"), [(np.int8, "int8 without"), (np.uint8, "uint8, as packed"), (np.int64, "i")]
)
def test_whole_numbers_are_no_weights(bfl, tmp_path, kind, said):
    state = dict(safetensors.read(bfl)) | {"img_in.weight": np.ones((32, 12), kind)}
    safetensors.write(tmp_path / "a.safetensors", state)
    message = f"a.safetensors: img_in.weight is {said}.* expected floating point"
    with pytest.raises(ConfigError, match=message):
        open_source(tmp_path / "a.safetensors")


@pytest.mark.parametrize("start", ["", "model.diffusion_model."])
def test_what_is_no_weight_is_ignored(bfl, expected, tmp_path, start, capfd):
    """Marks and counts, with one line; what may be a misspelt weight stays an error."""
    state = {start + name: tensor for name, tensor in safetensors.read(bfl).items()}
    marks = {
        "__index_timestep_zero__": np.empty(0, np.float32),
        "__32x32__": np.asarray(1, np.float32),
        "step": np.asarray(3000, np.int64),
        "initted": np.asarray([True]),
        "nothing": np.empty((0, 4), np.float32),
        "absent.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8),
    }
    file = tmp_path / "a.safetensors"
    safetensors.write(file, state | {start + name: array for name, array in marks.items()})
    same({n: p[...] for n, p in open_source(file).parameters().items()}, expected)
    said = capfd.readouterr().err
    assert said.startswith(f"{file}: ignored 6 tensors that are no weights: ")
    assert said.count("\n") == 1 and all(name in said for name in marks)
    for name, shape in (("img_in.wieght", (32, 12)), ("txt_in.bais", (32,)), ("number", ())):
        safetensors.write(file, state | {start + name: np.ones(shape, np.float32)})
        with pytest.raises(ConfigError, match=f"a.safetensors: .*1 unknown: {name}"):
            open_source(file)


@pytest.mark.parametrize("name", ["A.SAFETENSORS", "a.Safetensors", "a.SFT", "a.sft"])
def test_endings_in_capitals(bfl, expected, tmp_path, name):
    shutil.copy(bfl, tmp_path / name)
    same({n: p[...] for n, p in open_source(tmp_path / name).parameters().items()}, expected)
    for other, kind in (("A.CKPT", "a pickle file"), ("A.GGUF", "GGUF")):
        (tmp_path / other).write_bytes(b"")
        with pytest.raises(ConfigError, match=f"{other}.*{kind}"):
            open_source(tmp_path / other)


@pytest.mark.parametrize(
    ("name", "kind", "number", "dtype", "said"),
    [
        ("img_in.weight", np.float32, np.nan, jnp.float32, "holds NaN"),
        ("img_in.weight", ml_dtypes.bfloat16, np.nan, jnp.float32, "holds NaN"),
        ("txt_in.bias", np.float16, -np.inf, jnp.bfloat16, "holds infinity"),
        # of fused and stacked tensors it is the one in the file
        ("single_blocks.1.linear1.weight", np.float32, np.nan, jnp.bfloat16, "holds NaN"),
        ("double_blocks.0.txt_attn.qkv.bias", np.float32, np.inf, jnp.float32, "holds infinity"),
        ("single_blocks.0.linear2.weight", ml_dtypes.float8_e4m3fn, np.nan, jnp.float32, "holds N"),
        ("img_in.bias", np.float64, -1e39, jnp.float32, r"holds -1e\+39, too large for float32"),
        ("img_in.bias", np.float32, 1e5, jnp.float16, r"holds 1e\+05, too large for float16"),
        ("img_in.bias", np.float32, 3.4e38, jnp.bfloat16, r"holds 3.4e\+38, too large for bfl"),
    ],
)
def test_what_is_not_finite_is_refused_while_loading(
    bfl, tmp_path, name, kind, number, dtype, said
):
    state = dict(safetensors.read(bfl))
    array = np.array(state[name]).astype(kind)
    array.flat[array.size - 1] = number
    safetensors.write(tmp_path / "a.safetensors", state | {name: array})
    with pytest.raises(ConfigError, match=f"a.safetensors: {name} {said}") as error:
        load_model(tmp_path / "a.safetensors", dtype=dtype)
    assert "\n" not in str(error.value)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ConfigError, match=f"a.safetensors: {name} {said}"):
        load_model(tmp_path / "a.safetensors", dtype=dtype, sharding=lambda name, shape: place)


def test_exports_of_what_is_not_finite(expected, tmp_path):
    """Of arrays that nobody has looked at: a merged LoRA may have made an infinity."""
    damaged = dict(expected)
    damaged["single.0.block.qkv.kernel"] = np.array(expected["single.0.block.qkv.kernel"])
    damaged["single.0.block.qkv.kernel"][1, 0, 3, 2] = np.inf
    for export, name in (
        (export_bfl, "single_blocks.1.linear1.weight"),
        (export_diffusers, "single_transformer_blocks.1.attn.to_q.weight"),
    ):
        with pytest.raises(FloatingPointError, match=f"^{name} is not finite"):
            export(tmp_path / "a.safetensors", CONFIG, damaged)
    with pytest.raises(FloatingPointError, match="^single_blocks.1.qkv.weight is not finite"):
        export_torch(tmp_path / "a", ModelConfig(transformer=CONFIG), damaged)
    assert not list(tmp_path.iterdir())


def test_straight_into_a_mesh(bfl, expected):
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    asked = []

    def place(name, shape):
        asked.append(name)
        spec = ("tensor", "fsdp") if name.endswith("kernel") else ()
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - len(spec)), *spec))

    model = load_model(bfl, sharding=place)
    assert sorted(asked) == sorted(expected)
    kernel = model.single[0].block.qkv.kernel[...]
    assert kernel.sharding.spec == PartitionSpec(None, None, "tensor", "fsdp")
    np.testing.assert_array_equal(kernel, expected["single.0.block.qkv.kernel"])
    # the same as a tree, and parts of arrays that no boundary of a fused tensor respects
    like = abstract(CONFIG)
    tree = jax.tree.map(lambda a: jax.sharding.SingleDeviceSharding(jax.devices()[0]), like)
    source = open_source(bfl)
    same(names(load(source.parameters(), like, tree)), expected)
    for name, param in source.parameters().items():
        region = tuple(slice(n // 3, n // 3 + max(1, n // 2)) for n in param.shape)
        np.testing.assert_array_equal(param[region], expected[name][region])


def test_load_model_types(bfl, capfd):
    model = load_model(bfl, dtype=jnp.bfloat16)
    assert "taken as in FLUX.1" in capfd.readouterr().err  # its heads are narrower
    assert model.dtype == jnp.bfloat16 and model.img_in.kernel[...].dtype == jnp.bfloat16


def test_model_directories_as_before(bfl, tmp_path):
    params = load(open_source(bfl).parameters(), abstract(CONFIG))
    model_directory.save(tmp_path / "m", ModelConfig(transformer=CONFIG), params)
    half = d2m_jax.load_model(tmp_path / "m", dtype=jnp.bfloat16)
    assert half.img_in.kernel[...].dtype == half.dtype == jnp.bfloat16
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("fsdp",))
    place = NamedSharding(mesh, PartitionSpec())
    model = load_model(tmp_path / "m", sharding=lambda name, shape: place)
    assert model.img_in.kernel[...].sharding == place
    np.testing.assert_array_equal(model.img_in.kernel[...], params["img_in"]["kernel"])


def test_what_is_no_model(bfl, tmp_path, monkeypatch):
    def refused(path, message):
        with pytest.raises(ConfigError, match=message) as error:
            load_model(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "absent", "absent: no such file or folder")
    refused("absent.safetensors", "no such file or folder")
    refused(tmp_path, "holds no .safetensors file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin: a pickle file")
    refused(tmp_path / "pytorch_model.bin", "a pickle file")
    (tmp_path / "a.txt").write_text("")
    refused(tmp_path / "a.txt", "a.txt: no safetensors: an empty file")
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(bfl, tmp_path / name)
    refused(tmp_path, "holds 2 models")
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    refused(tmp_path, "_class_name = 'SD3Transformer2DModel', expected 'FluxTransformer2DModel'")
    (tmp_path / "config.json").write_text(json.dumps({"axes_dims_rope": [8, "a"]}))
    refused(tmp_path, "axes_dims_rope = ")
    (tmp_path / "config.json").write_text(json.dumps({"axes_dims_rope": [8, 8, 8]}))
    refused(tmp_path, "axes_dim = ")
    (tmp_path / "config.json").write_text("[")
    refused(tmp_path, "config.json: damaged")
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(20_000)
    refused(tmp_path / "a.safetensors", "truncated")


def test_lighter_copies_and_their_shards(expected, bfl, tmp_path):
    """NAME.fp16.safetensors, whole or in shards, counts where it is alone."""
    half = {n: np.asarray(t).astype(np.float16) for n, t in safetensors.read(bfl).items()}
    safetensors.write_sharded(tmp_path, "model", half, shard_bytes=20_000)
    shards = len(list(tmp_path.glob("model-*")))
    assert shards > 2
    text = (tmp_path / "model.safetensors.index.json").read_text()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.fp16.json").write_text(
        text.replace("model-", "model.fp16-")
    )
    for file in tmp_path.glob("model-*"):
        file.rename(file.with_name(file.name.replace("model-", "model.fp16-")))
    found = open_source(tmp_path).tensors
    assert {t.dtype for t in found.values()} == {np.dtype(np.float16)}
    assert found.keys() == half.keys()
    safetensors.write(tmp_path / "model.safetensors", safetensors.read(bfl))
    found = open_source(tmp_path).tensors
    assert {t.dtype for t in found.values()} == {t.dtype for t in safetensors.read(bfl).values()}
    safetensors.write(tmp_path / "other.safetensors", half)
    with pytest.raises(
        ConfigError, match="holds 2 models .model.safetensors, other.safetensors.*, exp"
    ):
        open_source(tmp_path)


def test_a_shard_alone(bfl, expected, tmp_path):
    """Told as one; the only one of one is a whole model."""
    safetensors.write_sharded(tmp_path, "flux", safetensors.read(bfl), 50_000)
    shards = sorted(tmp_path.glob("*-of-*"))
    said = f"one of {len(shards)} shards of a model; give their folder, or its .*index.json"
    with pytest.raises(ConfigError, match=f"{shards[1].name}: {said}"):
        open_source(shards[1])
    (tmp_path / "flux.safetensors.index.json").unlink()
    said = f"holds {len(shards)} shards of a model .{shards[0].name}, …., expected their .*index"
    with pytest.raises(ConfigError, match=said):
        open_source(tmp_path)
    (tmp_path / "one").mkdir()
    shutil.copy(bfl, tmp_path / "one" / "flux-00001-of-00001.safetensors")
    same({n: p[...] for n, p in open_source(tmp_path / "one").parameters().items()}, expected)


def test_full_disk_while_exporting(expected, tmp_path, monkeypatch):
    import errno

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.os, "fsync", fail)
    for export, name in ((export_bfl, "a.safetensors"), (export_diffusers, "a")):
        with pytest.raises(ConfigError, match=rf"/{name}: the disk is full"):
            export(tmp_path / name, CONFIG, expected)
    assert not list(tmp_path.iterdir())
