"""Transformers out of torch's files: one file or shards, BFL's layout, diffusers' or ours."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from d2m_jax import hosts
from d2m_jax.config import ConfigError, FluxConfig, ModelConfig, check, listed
from d2m_jax.models.flux import Flux, abstract, model_of
from d2m_jax.named_arrays import names, restructure, sizes
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import hub, safetensors
from d2m_jax.weights.keys import flux_keys, key_table, recognise, sparse_keys
from d2m_jax.weights.keys.key_table import Entry, Parameter
from d2m_jax.weights.torch_files import scales, torch_export


@dataclass(frozen=True)
class Source:
    """A transformer in torch's files, checked and not read yet."""

    where: Path
    layout: flux_keys.Layout | Literal["torch"]
    config: FluxConfig
    table: list[Entry]
    tensors: dict[str, Any]  # by torch's names
    model: ModelConfig | None = None  # what an export of ours says beside the transformer
    axes_told: bool = True  # whether how a head is divided stands there

    def tell_axes(self) -> None:
        """A line where the division of heads that are not FLUX.1's was assumed."""
        head = sum(self.config.axes_dim)
        if not self.axes_told and head != sum(FluxConfig().axes_dim):
            hosts.say(
                f"{self.where}: does not tell how the {head} elements of a head are divided among"
                " the axes of positions; taken as in FLUX.1, where they are 128: axes_dim ="
                f" {self.config.axes_dim}"
            )

    def parameters(self, dtype: Any = None) -> dict[str, Parameter]:
        """Ours by dotted name, read when indexed; None is the narrowest type that holds them.

        What is read is finite, or ConfigError names the tensor that is not.
        """
        dtype = stored_dtype(self.tensors) if dtype is None else dtype
        shapes = sizes(abstract(self.config))
        return key_table.parameters(self.table, self.tensors, shapes, dtype, self.where)


def open_source(source: Path | str) -> Source:
    """The transformer in a file, a folder of diffusers or of --export torch, or a repository of
    Hugging Face.

    Raises ConfigError that says what is wrong with it, or what else it is; all tensors that do not
    fit are listed. One line on stderr each tells of names that were read without what a tool put
    into them, and of tensors that were ignored.
    """
    path = hub.local(source)
    if path.is_dir() and (path / "transformer").is_dir():
        path = path / "transformer"
    if torch_export.is_torch_export(path):
        model = model_directory.load_config(path)
        tensors, config = read_tensors(path), model.transformer
        return _checked(Source(path, "torch", config, sparse_keys.keys(config), tensors, model))
    value = _diffusers_config(path / "config.json") if path.is_dir() else {}
    stored, headers = _read(path)
    layout, stored = recognise.transformer(path, stored)
    tensors = scales.multiplied_out(path, stored, headers)
    axes = value.get("axes_dims_rope")
    config = flux_keys.config_of(path, layout, tensors, axes and tuple(axes))
    table, told = flux_keys.keys(layout, config), axes is not None
    return _checked(Source(path, layout, config, table, tensors, axes_told=told))


def _checked(source: Source) -> Source:
    known = {entry.theirs for entry in source.table}
    ignored = [n for n, t in source.tensors.items() if n not in known and _is_no_weight(n, t)]
    if ignored:
        which = f"{len(ignored)} tensors that are no weights: {listed(ignored)}"
        hosts.say(f"{source.where}: ignored {which}")
    tensors = {name: t for name, t in source.tensors.items() if name not in ignored}
    for name in filter(known.__contains__, tensors):
        found = np.dtype(tensors[name].dtype).name
        which = {"int8": "int8 without a scale", "uint8": "uint8, as packed 4-bit weights are"}
        check(
            "float" in found,
            f"{source.where}: {name} is {which.get(found, found)}, expected floating point",
        )
    shapes = sizes(abstract(source.config))
    key_table.check_fit(source.where, source.table, tensors, shapes)
    return replace(source, tensors=tensors)


def _is_no_weight(name: str, tensor: Any) -> bool:
    """Whether an unknown tensor is a mark or a count that a tool left: ComfyUI's
    `__index_timestep_zero__`, an EMA's number of steps."""
    number = math.prod(tensor.shape) == 1 and "float" not in np.dtype(tensor.dtype).name
    mark = re.fullmatch(r"__\w+__", name.split(".")[-1]) or name.endswith(scales.MARK)
    return bool(mark) or 0 in tensor.shape or number


def read_tensors(path: Path) -> dict[str, Any]:
    """The floating-point tensors of a .safetensors file, an index of shards, or the only one of
    either in a folder; scaled fp8 is multiplied out when taken."""
    return scales.multiplied_out(path, *_read(path))


def _read(path: Path) -> tuple[dict[str, safetensors.Tensor], list[dict[str, str]]]:
    """The tensors as stored, and the metadata of their files."""
    if path.is_dir():
        path = _weights_in(path)
    if hub.INDEX.search(path.name):
        files = safetensors.shards(path)
        tensors = safetensors.read_sharded(path)
    else:
        if path.suffix.lower() not in hub.WEIGHTS:
            recognise.refuse_other(path)
        hub.refuse_shard(str(path))
        files = [path]
        tensors = safetensors.read(path)
    return tensors, [safetensors.read_metadata(file) for file in files]


def _weights_in(folder: Path) -> Path:
    """The index or the only file of a folder's weights; lighter copies beside it do not count."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    files = [file for file in files if file.name != model_directory.CUT]
    whole = [f for f in files if re.search(r"\.(safetensors|sft)$", f.name, re.IGNORECASE)]
    parts = [f for f in whole if hub.SHARD.search(f.name)]
    whole = [f for f in whole if f not in parts]
    indices = [f for f in files if hub.INDEX.search(f.name)]
    plain = [[f for f in some if not hub.variant(f.name)] for some in (indices, whole)]
    for found in (*plain, indices, whole):
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:3])
            raise ConfigError(
                f"{folder}: holds {len(found)} models ({names}), expected one; name the file itself"
            )
        if found:
            return found[0]
    if parts:
        raise ConfigError(
            f"{folder}: holds {len(parts)} shards of a model ({parts[0].name}, …), expected their"
            " *.safetensors.index.json beside them"
        )
    for file in files:
        if file.is_file() and file.suffix.lower() in recognise.ENDINGS:
            recognise.refuse_other(file)
    raise ConfigError(f"{folder}: holds no .safetensors file, expected a model")


def _diffusers_config(file: Path) -> dict[str, Any]:
    """What diffusers wrote beside the weights; {} without it."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
        kind, axes = value.get("_class_name"), value.get("axes_dims_rope")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file}: damaged, expected a JSON object ({error})") from None
    known = "FluxTransformer2DModel"
    check(kind in (None, known), f"{file}: _class_name = {kind!r}, expected {known!r}")
    whole = isinstance(axes, list) and all(type(n) is int and n > 0 for n in axes)
    check(axes is None or whole, f"{file}: axes_dims_rope = {axes!r}, expected a list of sizes")
    return value


def stored_dtype(tensors: Mapping[str, Any]) -> np.dtype:
    """The narrowest of bfloat16 and float32 that holds these tensors' numbers."""
    narrow = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
    wide = any(np.dtype(tensor.dtype).name not in narrow for tensor in tensors.values())
    return np.dtype(jnp.float32 if wide else jnp.bfloat16)


def dtype_of(dtype: Any) -> np.dtype:
    """A floating-point type, by its name, short or long, or as JAX and NumPy have it."""
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    try:
        found = jnp.dtype(short.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ConfigError(f"dtype = {dtype!r}: expected bfloat16 or float32 (short: bf16, fp32)")
    return found


def load(
    params: Mapping[str, Parameter],
    like: dict,
    sharding: model_directory.Sharding | None = None,
) -> dict:
    """The tree `like` (abstract arrays) filled array after array.

    `sharding` says where each goes, as in model_directory.load: every device's part is then read by
    itself.
    """
    named, place = {}, None if sharding is None else model_directory.placement(sharding)
    for name in names(like):
        param = params[name]
        if place is None:
            named[name] = jnp.asarray(param[...])
        else:
            there = place(name, param.shape)
            named[name] = jax.make_array_from_callback(param.shape, there, param.__getitem__)
    return restructure(like, named)


def load_model(
    path: Path | str, dtype: Any = jnp.float32, sharding: model_directory.Sharding | None = None
) -> Flux:
    """The transformer of a model directory, a BFL or ComfyUI file, a folder of diffusers or of
    --export torch, or a Hugging Face repository.

    Parameters and activations are in `dtype`; `sharding` says where parameters go
    (model_directory.load). ConfigError for whatever else is there.
    """
    path, dtype = hub.local(path), dtype_of(dtype)
    if model_directory.is_model_directory(path):
        config, params = model_directory.load(path, dtype, sharding)
        return model_of(config.transformer, params, dtype)
    source = open_source(path)
    params = load(source.parameters(dtype), abstract(source.config), sharding)
    source.tell_axes()
    return model_of(source.config, params, dtype)
