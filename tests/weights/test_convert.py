"""From torch to a model directory and back, by the script: bits, memory, bad input."""

import errno

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert_torch_weights
from d2m_jax import command_line
from d2m_jax.config import ConfigError
from d2m_jax.named_arrays import fingerprint, names
from d2m_jax.weights import convert
from d2m_jax.weights.directory import model_directory, orbax_blocks
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.keys.key_table import Parameter
from d2m_jax.weights.torch_files.diffusers_folder import (
    FOLDERS,
    INDEX,
    copy_encoders,
    encoder_files,
)
from tests.seed import generator
from tests.weights import toy

CONFIG = toy.config(1, 2)


def run(*arguments):
    return command_line.run(convert_torch_weights.main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def bfl(tmp_path_factory):
    """A file in BFL's layout, bfloat16, with the axes that nothing says otherwise."""
    file = tmp_path_factory.mktemp("bfl") / "flux.safetensors"
    safetensors.write(file, toy.random_state("bfl", CONFIG, ml_dtypes.bfloat16))
    return file


def test_there_and_back(bfl, tmp_path, capfd):
    assert run(bfl, tmp_path / "model") == 0
    config, params = model_directory.load(tmp_path / "model", dtype=None)
    assert config.transformer.double == CONFIG.double and config.shift is None
    assert {a.dtype for a in names(params).values()} == {jnp.dtype("bfloat16")}
    assert run(tmp_path / "model", tmp_path / "back.safetensors", "--export", "bfl") == 0
    assert run(tmp_path / "model", tmp_path / "folder", "--export", "diffusers") == 0
    assert run(tmp_path / "folder", tmp_path / "again.safetensors", "--export", "bfl") == 0
    assert "again.safetensors written" in capfd.readouterr().out
    source = safetensors.read(bfl)
    for name in ("back.safetensors", "again.safetensors"):
        found = safetensors.read(tmp_path / name)
        assert found.keys() == source.keys()
        for key, tensor in source.items():
            assert np.asarray(found[key]).tobytes() == np.asarray(tensor).tobytes(), key


def test_types_and_loras(bfl, tmp_path, capfd):
    up, down = np.ones((32, 1), np.float32), np.full((1, 32), 2**-12, np.float32)
    tensors = {
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": up,
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": down,
    }
    file = tmp_path / "lora.safetensors"
    safetensors.write(file, tensors)
    for model in ("bare", "merged"):
        lora = () if model == "bare" else ("--lora", f"{file}:0.5", "--lora", file)
        assert run(bfl, tmp_path / model, "--dtype", "float32", *lora) == 0
    said = capfd.readouterr().err
    for strength in ("0.5", "1"):
        assert f"{file}: merged into 1 layer, rank 1, at a strength of {strength}\n" in said
    # from a model directory too
    assert run(tmp_path / "bare", tmp_path / "later", *lora) == 0
    bare, merged, later = (
        names(model_directory.load(tmp_path / model, dtype=None)[1])
        for model in ("bare", "merged", "later")
    )
    for name, array in merged.items():
        np.testing.assert_array_equal(later[name], array)
    for name, array in bare.items():
        expected = 1.5 * 2**-12 if name == "double.0.block.img_attn.proj.kernel" else 0
        assert array.dtype == np.float32
        # numbers of size 3 have steps of 2.4e-7 in float32, and are rounded once
        np.testing.assert_allclose(merged[name] - array, expected, atol=3e-7)


def test_blocks(tmp_path, monkeypatch):
    """Large arrays go block by block, and the checkpoint is like any other."""
    monkeypatch.setattr(orbax_blocks, "WHOLE", 500)
    monkeypatch.setattr(orbax_blocks, "IN_FLIGHT", 1000)
    rng = generator()
    arrays = {
        "b": rng.normal(size=(3, 2, 8, 5)).astype(np.float32),
        "a": rng.normal(size=(40, 20)).astype(ml_dtypes.bfloat16),
        "c": np.asarray(3, np.float32),
    }
    asked, told = [], []

    def take(region):
        asked.append(region)
        return arrays["b"][region]

    params = arrays | {"b": Parameter((3, 2, 8, 5), np.dtype(np.float32), take)}
    orbax_blocks.save(tmp_path / "params", params, told.append)
    assert len(asked) == 6 and sum(told) == sum(a.nbytes for a in arrays.values())
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "params")
        note = checkpointer.metadata(tmp_path / "params").custom_metadata
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array)
    assert note["fingerprint"] == fingerprint(arrays) == fingerprint(found)


def test_bad_input_is_one_line(bfl, tmp_path, capfd):
    (tmp_path / "flux.pt").write_bytes(b"")
    (tmp_path / "mine").write_text("mine")
    for arguments, message in (
        ((tmp_path / "absent", "out"), "absent: no such file or folder"),
        ((tmp_path / "flux.pt", "out"), "a pickle file"),
        ((bfl, tmp_path / "mine"), "mine: exists; expected a free name, or --overwrite"),
        ((bfl, tmp_path / "mine", "--overwrite"), "exists and is no model directory"),
        ((bfl, bfl, "--export", "bfl"), "another place than the source's"),
        ((bfl, tmp_path / "out", "--export", "bfl"), "a name that ends in .safetensors"),
        ((bfl, tmp_path / "out", "--dtype", "int8"), "dtype"),
        ((bfl, tmp_path / "out", "--lora", tmp_path / "absent:0.5"), "absent: no such file"),
        ((bfl, tmp_path / "out", "--typo", "1"), "--typo: unknown option, did you mean"),
    ):
        assert run(*arguments) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and message in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flux.pt", "mine"]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("export", [None, "bfl", "diffusers", "torch"])
def test_damaged_numbers(tmp_path, export):
    """On every way out: the tensor's name in the file, and nothing is left behind."""
    state = toy.random_state("diffusers", CONFIG)
    file = tmp_path / "a.safetensors"
    out = tmp_path / ("out.safetensors" if export == "bfl" else "out")
    for number, said in ((np.nan, "holds NaN"), (-np.inf, "holds infinity")):
        name = "single_transformer_blocks.1.attn.to_v.bias"
        safetensors.write(file, state | {name: np.full(32, number, np.float32)})
        with pytest.raises(ConfigError, match=f"a.safetensors: {name} {said}"):
            convert.convert(file, out, export=export)
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    # Finite numbers of which a LoRA makes infinities have no other name than the output's.
    # BFL's layout has it in one tensor with others that are finite.
    layer = "single_transformer_blocks.0.attn.to_q"
    safetensors.write(file, state)
    safetensors.write(
        tmp_path / "lora.safetensors",
        {
            f"transformer.{layer}.lora_A.weight": np.full((1, 32), 1e30, np.float32),
            f"transformer.{layer}.lora_B.weight": np.full((32, 1), 1e30, np.float32),
        },
    )
    with pytest.raises(ConfigError, match="(linear1|qkv|to_q).* is not finite"):
        convert.convert(file, out, export=export, loras=[(tmp_path / "lora.safetensors", 1.0)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "lora.safetensors"]


@pytest.mark.parametrize("export", [None, "bfl", "diffusers", "torch"])
def test_what_is_there_is_replaced_on_demand_only(bfl, tmp_path, capfd, export):
    out = tmp_path / ("out.safetensors" if export == "bfl" else "out")
    how = () if export is None else ("--export", export)
    assert run(bfl, out, *how) == 0

    def stored():
        return {f: f.stat().st_mtime_ns for f in (out, *out.rglob("*")) if f.is_file()}

    before = stored()
    assert run(bfl, out, *how) == 2 and stored() == before
    assert "expected a free name, or --overwrite" in capfd.readouterr().err
    assert run(bfl, out, *how, "--overwrite") == 0 and stored() != before


@pytest.mark.parametrize("name", ["OUT.SAFETENSORS", "out.Sft"])
def test_endings_in_capitals(bfl, tmp_path, name):
    assert run(bfl, tmp_path / name, "--export", "bfl") == 0
    assert run(tmp_path / name, tmp_path / "model") == 0


def test_full_disk(bfl, tmp_path, monkeypatch):
    def fail(directory, params, progress):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(orbax_blocks, "save", fail)
        with pytest.raises(ConfigError, match="out: the disk is full; nothing was written"):
            convert.convert(bfl, tmp_path / "out")
    usage = convert.output.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert.output.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"out: needs .* kB on the disk of .*, found 1.0 kB free"):
        convert.convert(bfl, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_copied_of_a_pipeline_is_not_its_transformer(tmp_path):
    """Nor counted, where the room on the disk is checked."""
    for name in (*FOLDERS, "transformer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 10)
        (tmp_path / name / "model.bin").write_bytes(b"x" * 1000)
    (tmp_path / INDEX).write_text("{}")
    files = encoder_files(tmp_path)
    assert sum(file.stat().st_size for file in files) == 10 * len(FOLDERS) + 2
    copy_encoders(tmp_path, tmp_path / "copy")
    found = {file.relative_to(tmp_path / "copy") for file in (tmp_path / "copy").rglob("*.*")}
    assert found == {file.relative_to(tmp_path) for file in files}
