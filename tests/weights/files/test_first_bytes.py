"""Files that are something else than safetensors, as their own writers write them."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import first_bytes, safetensors
from d2m_jax.weights.keys import recognise
from d2m_jax.weights.lora import lora
from d2m_jax.weights.torch_files import torch_import
from tests.weights import toy

LFS = """version https://git-lfs.github.com/spec/v1
oid sha256:4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7
size 23802932552
"""


def written(write, *arguments, **options):
    """What a function writes into the file that is its first argument."""
    file = io.BytesIO()
    write(file, *arguments, **options)
    return file.getvalue()


def packed(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("flux.txt", "flux")
    else:
        with tarfile.open(fileobj=file, mode=kind) as archive:
            archive.addfile(tarfile.TarInfo("flux"), io.BytesIO())
    return file.getvalue()


def torch_saved(legacy):
    torch = pytest.importorskip("torch")
    weights = {"img_in.weight": torch.zeros(2, 2)}
    return written(
        lambda file: torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
    )


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (lambda: b"", "an empty file"),
        (lambda: bytes(4000), "a download that did not end"),
        (lambda: bytes(5), "a download that did not end"),
        (lambda: b"GGUF" + struct.pack("<IQQ", 3, 780, 30) + bytes(64), "GGUF"),
        (lambda: torch_saved(legacy=False), r"a pickle file \(torch.save\)"),
        (lambda: torch_saved(legacy=True), "a pickle file"),
        (lambda: pickle.dumps({"a": np.ones(3)}, protocol=2), "a pickle file"),
        (lambda: pickle.dumps({"a": np.ones(3)}, protocol=5), "a pickle file"),
        (lambda: written(np.save, np.ones(3)), "NumPy's .npy"),
        (lambda: written(np.savez, a=np.ones(3)), "NumPy's .npz"),
        (lambda: packed("zip"), "a zip archive"),
        (lambda: packed("w:"), "a compressed or packed archive"),
        (lambda: packed("w:gz"), "a compressed or packed archive"),
        (lambda: packed("w:xz"), "a compressed or packed archive"),
        (lambda: gzip.compress(b"flux", mtime=0), "a compressed or packed archive"),
        (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "ONNX"),
        (lambda: LFS.encode(), "a Git LFS pointer.*git lfs pull"),
        (lambda: b"<!DOCTYPE html>\n<html><head>" + bytes(20), "an HTML page"),
        (lambda: b"\xef\xbb\xbf\n <!doctype html><html>", "an HTML page"),
        (lambda: b"<HTML><title>502</title></HTML>", "an HTML page"),
        (lambda: b"Invalid username or password.", "text.*Invalid username or password"),
        (lambda: json.dumps({"error": "Repository not found"}).encode(), "text.*not found"),
        (lambda: ("Zugriff verweigert – ü" * 40).encode(), "text.*Zugriff verweigert"),
    ],
)
def test_what_it_is(tmp_path, content, kind):
    file = tmp_path / "flux.safetensors"
    file.write_bytes(content())
    with pytest.raises(ConfigError, match=f"flux.safetensors: no safetensors: .*{kind}") as error:
        safetensors.read(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_shard_that_is_none(tmp_path):
    state = toy.random_state("bfl", toy.config(1, 1))
    safetensors.write_sharded(tmp_path, "flux", state, 50_000)
    shard = sorted(tmp_path.glob("*-of-*"))[1]
    shard.write_bytes(LFS.encode())
    with pytest.raises(ConfigError, match=f"{shard.name}: no safetensors: a Git LFS pointer"):
        safetensors.read_sharded(tmp_path / "flux.safetensors.index.json")


@pytest.mark.parametrize("length", [0x0280, 0x088B1F, 0x120808, 0x4B50])
def test_a_damaged_safetensors_file_is_called_one(tmp_path, length):
    """Lengths of headers whose bytes begin as those of pickle, gzip, ONNX and zip do."""
    text = b'{"__metadata__": {"a": ' + b" " * 600
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + text)
    assert first_bytes.kind((tmp_path / "a").read_bytes()[: first_bytes.LENGTH]) is None
    with pytest.raises(ConfigError, match="a: no whole safetensors file: its header"):
        safetensors.read(tmp_path / "a")


@pytest.mark.parametrize("name", ["a", "a.gguf", "A.PT", "a.bin", "a.ckpt", "a.part"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (LFS.encode(), "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><head>", "an HTML page"),
        (b"GGUF" + bytes(64), "GGUF"),
        (pickle.dumps({"a": 1}), "a pickle file, |a pickle file .torch.save., which can"),
    ],
)
def test_any_name_is_looked_into(tmp_path, name, content, kind):
    """As a model, as a LoRA, as a teacher; what is safetensors is read under any name."""
    file = tmp_path / name
    file.write_bytes(content)
    config = toy.config(1, 1)
    for read in (torch_import.open_source, model_directory.load, lambda f: lora.read(f, config)):
        with pytest.raises(ConfigError, match=f"{name}: ({kind}).*; expected ") as error:
            read(file)
        assert "\n" not in str(error.value)
    safetensors.write(file, toy.random_state("bfl", config))
    assert torch_import.open_source(file).layout == "bfl"


@pytest.mark.parametrize("name", ["a.bin", "a.ckpt", "a.pt", "a.pth", "A.PT", "a.gguf"])
def test_endings_where_bytes_do_not_tell(tmp_path, name):
    for content in (b"", b"\x01\xff" * 20):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}: (a pickle file|GGUF), which .*; expected"):
            recognise.refuse_other(tmp_path / name)
