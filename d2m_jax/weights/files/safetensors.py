"""The safetensors format by header and mmap: fp8 too, sharded or not, every header distrusted.

https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, the tensors.
"""

import io
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from d2m_jax.config import ConfigError, first_line, suggestion
from d2m_jax.output import check_space, new_file
from d2m_jax.weights.files import first_bytes

HEADER_LIMIT = 100_000_000  # bytes, as in the reference implementation
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
OTHER_DTYPES = {
    "F4": "4-bit floats (MXFP4 or NVFP4)",
    "F6_E2M3": "6-bit floats (MXFP6)",
    "F6_E3M2": "6-bit floats (MXFP6)",
    "F8_E8M0": "scales of blocks (MXFP8, MXFP6 or MXFP4)",
    "F8_E4M3FNUZ": "AMD's 8-bit floats",
    "F8_E5M2FNUZ": "AMD's 8-bit floats",
    "I4": "4-bit integers",
    "U4": "4-bit integers",
    "C64": "complex numbers",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is made, or read from its file, when np.asarray takes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    take: Callable[[], np.ndarray]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.take()
        return array if dtype is None else array.astype(dtype)


def read(path: Path | str) -> dict[str, Tensor]:
    """The tensors of one file, as views of its pages. ConfigError for whatever is wrong with it."""
    path = Path(path)
    half = path.with_name(f"{path.name}.aria2")
    if half.exists():  # the file has its whole length then, and zeros
        raise ConfigError(f"{path}: its download did not end, for {half.name} is beside it")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _header(path, file, size)
            specs = _specs(path, header, size - start)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise ConfigError(f"{path}: no whole safetensors file: its header is nested") from None
    return {
        name: _view(pages, start + offset, dtype, shape)
        for name, (dtype, shape, offset) in specs.items()
    }


def read_metadata(path: Path | str) -> dict[str, str]:
    """What the file says of itself: the strings of its header's `__metadata__`."""
    path = Path(path)
    with path.open("rb") as file:
        header, _ = _header(path, file, os.fstat(file.fileno()).st_size)
    return header.get("__metadata__", {})


def _view(pages: mmap.mmap, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)

    def take():
        if count == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(pages, dtype, count, offset).reshape(shape)

    return Tensor(shape, dtype, take)


def _header(path: Path, file: io.BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the tensors start."""
    start = file.read(first_bytes.LENGTH)

    def refuse(what: str) -> NoReturn:
        kind = first_bytes.kind(start)
        what = f"no whole safetensors file: {what}" if kind is None else f"no safetensors: {kind}"
        raise ConfigError(f"{path}: {what}")

    if size < 8:
        refuse(f"{size} bytes, expected at least 8")
    file.seek(8)
    (length,) = struct.unpack("<Q", start[:8])
    if length > size - 8:
        refuse(f"its header should have {length} bytes, {size - 8} are there")
    if length > HEADER_LIMIT:
        refuse(f"a header of {length} bytes, expected at most {HEADER_LIMIT}")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        refuse(f"its header is no JSON ({first_line(error)})")
    if not isinstance(header, dict):
        refuse("its header is no JSON object")
    metadata = header.get("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not strings:
        refuse("__metadata__ is no object of strings")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:100]!r} is there twice")
        found[name] = value
    return found


def _specs(
    path: Path, header: dict[str, Any], size: int
) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Name → (dtype, shape, offset); the tensors must fill the file without gap or overlap."""
    specs, spans = {}, []
    for name, value in header.items():
        if name == "__metadata__":
            continue
        where = f"{path}: tensor {name[:200]!r}"
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise ConfigError(f"{where}: expected dtype, shape and data_offsets in the header")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if isinstance(dtype, str) and dtype in OTHER_DTYPES:
            raise ConfigError(
                f"{where} holds {OTHER_DTYPES[dtype]}, {dtype}, which are not read; expected the"
                " model in bf16, fp16, fp32 or fp8"
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ConfigError(f"{where}: dtype {str(dtype)[:40]!r}, expected one of {list(DTYPES)}")
        if not _naturals(shape) or len(shape) > 32:
            raise ConfigError(f"{where}: shape {str(shape)[:80]}, expected at most 32 sizes")
        if not _naturals(offsets) or len(offsets) != 2:
            raise ConfigError(f"{where}: data_offsets {str(offsets)[:80]}, expected start and end")
        start, end = offsets
        if end > size:
            raise ConfigError(
                f"{where}: ends at byte {end} of the data, {size} are there: the file is truncated"
                " or its header is wrong"
            )
        # The sizes beside a zero may be anything, and NumPy refuses the huge ones.
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if end - start != needed or math.prod(filter(None, shape)) >= 2**59:
            raise ConfigError(
                f"{where}: {end - start} bytes, expected {needed} for {dtype} {str(shape)[:80]}"
            )
        specs[name] = DTYPES[dtype], tuple(shape), start
        spans.append((start, end, name))
    last = 0
    for start, end, name in sorted(spans):
        if start != last:
            kind = "overlaps the one before it" if start < last else "leaves a gap before it"
            raise ConfigError(
                f"{path}: tensor {name[:200]!r} {kind}: starts at {start}, not {last}"
            )
        last = end
    if last != size:
        raise ConfigError(f"{path}: {size - last} bytes after the last tensor, expected none")
    return specs


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def read_sharded(index: Path | str) -> dict[str, Tensor]:
    """The tensors of all shards that a `*.safetensors.index.json` names, from its own folder."""
    index = Path(index)
    places = _places(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        for name, tensor in read(index.parent / shard).items():
            if places.get(name) != shard:
                raise ConfigError(f"{index}: {name} is in {shard}, not in {places.get(name)}")
            tensors[name] = tensor
    for name, shard in places.items():
        if name not in tensors:
            near = suggestion(name, tensors)
            raise ConfigError(f"{index}: {name} should be in {shard}, found none{near}")
    return tensors


def shards(index: Path | str) -> list[Path]:
    """The files that an index names."""
    index = Path(index)
    return [index.parent / shard for shard in sorted(set(_places(index).values()))]


def _places(index: Path) -> dict[str, str]:
    """Tensor → the file, of the index's own folder and there, that should hold it."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(shard, str) for shard in places.values()):
            raise TypeError("a shard is no string")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index}: damaged, expected JSON with weight_map, from tensors to files"
            f" ({first_line(error)})"
        ) from None
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or name == "..":
            raise ConfigError(f"{index}: names {name!r}, expected files of its own folder")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ConfigError(
            f"{index}: names {len(names)} shards, absent are {', '.join(absent[:3])}{more}"
        )
    return places


def write(
    path: Path | str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, taking tensor after tensor; it appears whole or not at all."""
    check_space(Path(path), total_bytes(tensors))
    # Wider types first, as the reference implementation has it: every tensor is aligned.
    ordered = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in ordered:
        end = offset + _bytes(tensors[name])
        header[name] = {
            "dtype": NAMES[np.dtype(tensors[name].dtype)],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as new, new.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            array = np.asarray(tensors[name])
            assert array.dtype == tensors[name].dtype and array.shape == tensors[name].shape
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_sharded(
    folder: Path, stem: str, tensors: Mapping[str, Any], shard_bytes: int = 10_000_000_000
) -> None:
    """Write STEM.safetensors, or where that were larger than a shard, shards and their index."""
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return write(folder / f"{stem}.safetensors", tensors, {"format": "pt"})
    check_space(folder / stem, total_bytes(tensors))
    places = {}
    for i, names in enumerate(shards, start=1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(names, file)
        write(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": places}
    with new_file(folder / f"{stem}.safetensors.index.json") as new:
        new.write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, Any], limit: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, tensor in tensors.items():
        if names and size + _bytes(tensor) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(tensor)
    yield names


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def total_bytes(tensors: Mapping[str, Any]) -> int:
    """Bytes of all tensors together."""
    return sum(map(_bytes, tensors.values()))
