"""Our reader and writer against the safetensors library, and against thousands of broken files."""

import errno
import json
import math
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2m_jax import output
from d2m_jax.config import ConfigError
from d2m_jax.weights.files import safetensors

library = pytest.importorskip("safetensors")
torch = pytest.importorskip("torch")
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def drawn(name, shape=(3, 5), seed=0):
    """An array of this type whose every byte is random."""
    dtype = safetensors.DTYPES[name]
    data = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    if name == "BOOL":
        data = bytes(b % 2 for b in data)
    return np.frombuffer(data, dtype).reshape(shape)


def test_reads_what_the_library_writes(tmp_path):
    from safetensors.torch import save_file

    arrays = {name.lower(): drawn(name) for name in TORCH}
    arrays |= {"empty": np.empty((0, 4), np.float32), "scalar": np.asarray(3, np.float32)}
    names = safetensors.NAMES
    state = {
        name: torch.frombuffer(bytearray(bits(a)), dtype=TORCH[names[a.dtype]]).reshape(a.shape)
        if a.size
        else torch.empty(a.shape)
        for name, a in arrays.items()
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = safetensors.read(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(bits(np.asarray(found[name])), bits(array))
    assert safetensors.read_metadata(tmp_path / "a.safetensors") == {"format": "pt"}


def test_writes_what_the_library_reads(tmp_path):
    from safetensors.torch import load_file

    arrays = {name.lower(): drawn(name) for name in TORCH}
    arrays |= {"empty": np.empty((0, 4), np.float32), "scalar": np.asarray(3, np.float32)}
    safetensors.write(tmp_path / "a.safetensors", arrays, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        kind = TORCH[safetensors.NAMES[array.dtype]]
        assert found[name].dtype == kind and tuple(found[name].shape) == array.shape
        if array.size:
            theirs = found[name].reshape(-1).view(torch.uint8).numpy()
            np.testing.assert_array_equal(theirs, bits(array))


def test_unaligned(tmp_path):
    """A header of any length is allowed: the tensors need not lie at multiples of their size."""
    array = drawn("F32")
    header = {"a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}
    for pad in range(4):
        text = json.dumps(header).encode() + b" " * pad
        (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + array.tobytes())
        np.testing.assert_array_equal(bits(safetensors.read(tmp_path / "a")["a"]), bits(array))


ARRAYS = {"a.weight": drawn("BF16", (4, 3)), "a.bias": drawn("F32", (4,)), "b": drawn("F16", (2,))}


def file_of(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def valid():
    """Header and data of a file that is as it should be."""
    header, data = {}, b""
    for name, array in ARRAYS.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": safetensors.NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    return header, data


def changed(name, key, value):
    header, data = valid()
    header[name][key] = value
    return file_of(header, data)


HEADER, DATA = valid()
TEXT = json.dumps(HEADER).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\x01\0\0\0\0\0\0", "7 bytes, expected at least 8"),
        (struct.pack("<Q", 1000) + b"{}", "should have 1000 bytes, 2 are there"),
        (struct.pack("<Q", 2**63 + 5) + b"{}", "should have 9223372036854775813"),
        (file_of(b"not JSON", b""), "no JSON"),
        (file_of(b"\xff\xfe{}", b""), "no JSON"),
        (file_of(b"[" * 100_000, b""), "nested|no JSON"),
        (file_of(b"[]", b""), "no JSON object"),
        (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
        (file_of(TEXT[:-1] + b"," + TEXT[1:], DATA), "'a.weight' is there twice"),
        (changed("b", "dtype", "BF17"), "'b': dtype 'BF17'"),
        (changed("b", "dtype", "F8_E8M0"), r"'b' holds scales of blocks \(MXFP8.*F8_E8M0, which"),
        (changed("b", "dtype", "F4"), "'b' holds 4-bit floats"),
        (changed("b", "dtype", "I4"), "'b' holds 4-bit integers"),
        (changed("b", "dtype", ["F32"]), "'b': dtype"),
        (changed("b", "shape", [-2]), r"'b': shape \[-2\]"),
        (changed("b", "shape", [2.0]), r"'b': shape \[2.0\]"),
        (changed("b", "shape", [True, 2]), "'b': shape"),
        (changed("b", "shape", [1] * 40 + [2]), "at most 32 sizes"),
        (changed("b", "shape", [2**62, 2**62, 2**62]), "'b': 4 bytes, expected"),
        (changed("b", "shape", [0, 2**62, 2**62]), "'b': 4 bytes, expected"),
        (changed("b", "shape", [3]), "'b': 4 bytes, expected 6"),
        (changed("b", "data_offsets", [-4, 0]), "'b': data_offsets"),
        (changed("b", "data_offsets", [40, 2**62]), "truncated or its header is wrong"),
        (changed("b", "data_offsets", [44, 40]), "'b': -4 bytes, expected 4"),
        (changed("b", "data_offsets", [36, 40]), "'b' overlaps the one before it: starts at 36"),
        (changed("b", "extra", 1), "'b': expected dtype, shape and data_offsets"),
        (file_of(HEADER | {"b": 3}, DATA), "'b': expected dtype, shape"),
        (file_of({n: HEADER[n] for n in ("a.weight", "b")}, DATA), "'b' leaves a gap"),
        (file_of(HEADER, DATA[:-1]), "truncated"),
        (file_of(HEADER, DATA + b"x"), "1 bytes after the last tensor"),
    ],
)
def test_broken_headers(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        safetensors.read(tmp_path / "a")
    assert str(error.value).startswith(str(tmp_path / "a")) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_huge_header_is_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: nothing on disk
    with pytest.raises(ConfigError, match="a header of 200000000 bytes, expected at most 1"):
        safetensors.read(tmp_path / "a")


def test_half_downloaded(tmp_path):
    """aria2 gives a file its whole length at once: what has not come is zeros."""
    (tmp_path / "a.safetensors").write_bytes(file_of(HEADER, DATA))
    (tmp_path / "a.safetensors.aria2").write_bytes(b"")
    with pytest.raises(ConfigError, match="a.safetensors: its download did not end, for a.safete"):
        safetensors.read(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors.aria2").unlink()
    assert len(safetensors.read(tmp_path / "a.safetensors")) == 3


def test_no_such_file(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            safetensors.read(path)


WEIRD = [
    *range(-3, 60),
    *(2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)),
    *(None, True, False, 0.5, 4.0, -0.0, math.inf, math.nan),
    *("F32", "BF16", "F8_E4M3", "F64", "f32", "", "a.weight"),
    *([], {}, [4], [2], [4, 3], [3, 4], [12], [2, 2, 3], [1, 4], [0, 24], [24, 40], [40, 44]),
    *([-1, 3], [2**63], [2**32, 2**32], [0, 2**63], [24, 24], [44, 40], [[4]], ["4"], [[]]),
]


def mutated(choose: random.Random) -> bytes:
    """A valid file with some fields of its header or some bytes replaced, cut, or put in."""
    header, data = valid()
    for _ in range(choose.randint(0, 2)):
        name, key = choose.choice(list(ARRAYS)), choose.choice(["dtype", "shape", "data_offsets"])
        if choose.random() < 0.1:
            header[name] = choose.choice(WEIRD)
        elif isinstance(header[name], dict):
            header[name] = header[name] | {key: choose.choice(WEIRD)}
    content = bytearray(file_of(header, data))
    for _ in range(choose.choice([0, 0, 1, 2, 3])):
        start = choose.randint(0, len(content))
        content[start : start + choose.randint(0, 9)] = choose.randbytes(choose.randint(0, 9))
    cut = choose.randint(0, len(content)) if choose.random() < 0.2 else len(content)
    return bytes(content[:cut])


def check_against_the_library(path, content):
    """ConfigError, or the tensors that the library reads: never another answer."""
    path.unlink(missing_ok=True)  # a file cut to 0 bytes and written again is flushed to disk
    path.write_bytes(content)
    try:
        found = safetensors.read(path)
    except ConfigError as error:
        assert len(str(error)) < 1000
        return False
    theirs = dict(library.deserialize(content))
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        array = np.asarray(tensor)
        kind = theirs[name]
        assert safetensors.NAMES[array.dtype] == kind["dtype"]
        assert list(array.shape) == kind["shape"] and array.tobytes() == bytes(kind["data"])
    return True


def test_fuzz(tmp_path):
    whole = []

    @settings(max_examples=120, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def fuzz(seed):
        choose = random.Random(seed)
        for _ in range(40):  # hypothesis itself takes ten times as long per example as the reader
            whole.append(check_against_the_library(tmp_path / "a", mutated(choose)))

    fuzz()
    assert 0.02 < sum(whole) / len(whole) < 0.5  # some stay whole, or become another valid file


def test_every_cut_and_every_flipped_bit(tmp_path):
    content = file_of(HEADER, DATA)
    assert check_against_the_library(tmp_path / "a", content)
    for length in range(len(content)):
        assert not check_against_the_library(tmp_path / "a", content[:length])
    for byte in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[byte] ^= 1 << bit
            check_against_the_library(tmp_path / "a", bytes(flipped))


@pytest.mark.parametrize("shards", [1, 3])
def test_shards(tmp_path, shards):
    arrays = {f"t{i}": drawn("BF16", (10, 10), seed=i) for i in range(5)}
    safetensors.write_sharded(tmp_path, "model", arrays, 400 if shards == 3 else 1000)
    if shards == 1:
        found = safetensors.read(tmp_path / "model.safetensors")
        assert len(list(tmp_path.iterdir())) == 1
    else:
        assert len(list(tmp_path.iterdir())) == 4
        found = safetensors.read_sharded(tmp_path / "model.safetensors.index.json")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(bits(found[name]), bits(array)) for name, array in arrays.items())


def test_broken_index(tmp_path):
    arrays = {f"t{i}": drawn("BF16", (10, 10), seed=i) for i in range(5)}
    safetensors.write_sharded(tmp_path, "m", arrays, 400)
    index = tmp_path / "m.safetensors.index.json"
    content = json.loads(index.read_text())

    def refused(message, change=None):
        if change is not None:
            index.write_text(change if isinstance(change, str) else json.dumps(change))
        with pytest.raises(ConfigError, match=message) as error:
            safetensors.read_sharded(index)
        assert str(index) in str(error.value) and "\n" not in str(error.value)

    places = content["weight_map"]
    refused("t9 should be in m-00001.*, found none", {"weight_map": places | {"t9": places["t0"]}})
    refused("t0 is in m-00001.*, not in m-00003", {"weight_map": places | {"t0": places["t4"]}})
    for bad in ("../m.safetensors", "/etc/passwd", "a/b", ".."):
        refused("expected files of its own folder", {"weight_map": places | {"t0": bad}})
    for bad in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"t0": 3}}', "[" * 100_000):
        refused("damaged, expected JSON with weight_map", bad)
    (tmp_path / places["t2"]).unlink()
    refused(f"names 3 shards, absent are {places['t2']}", content)


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    class Full:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise OSError(errno.ENOSPC, "No space left on device")

    tensors = {"a": np.ones(5, np.float32), "b": Full()}
    (tmp_path / "x.safetensors").write_text("old")
    with pytest.raises(ConfigError, match="x.safetensors: the disk is full"):
        safetensors.write(tmp_path / "x.safetensors", tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_text() == "old"

    usage = output.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="needs 20 bytes on the disk of .*, found 10 bytes free"):
        safetensors.write(tmp_path / "y.safetensors", {"a": np.ones(5, np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
