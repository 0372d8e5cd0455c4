"""Weights in eight bits, times the scales that lie beside them; other quantised formats by name.

What ComfyUI reads, by its comfy/ops.py and convert_old_quants in comfy/utils.py: a layer has
`weight` in fp8, `weight_scale` (once `scale_weight`), perhaps `input_scale` (once `scale_input`),
which is of activations and counts for fp8 matmuls only, and `comfy_quant`, JSON in bytes that names
the format. The header's `_quantization_metadata` may name it instead, and once `scaled_fp8` said
that all layers with a scale are in fp8.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from d2m_jax.config import ConfigError, check
from d2m_jax.weights.files.safetensors import Tensor
from d2m_jax.weights.keys import recognise

SCALES = (".weight_scale", ".scale_weight")
INPUT_SCALES = (".input_scale", ".scale_input")
MARK = ".comfy_quant"
MARK_OF_ALL = "scaled_fp8"
HEADER = "_quantization_metadata"
# A number times a scale, be it one or one per row.
FORMATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_rowwise",
    "float8_e5m2_rowwise",
)
# Of a mark, what changes no weight: how to multiply by it, and what it was before.
KNOWN = ("format", "full_precision_matrix_mult", "orig_dtype", "orig_shape")
NARROW = ("float8_e4m3fn", "float8_e5m2", "int8")


def multiplied_out(
    where: Any, tensors: Mapping[str, Any], headers: Iterable[Mapping[str, str]] = ()
) -> dict[str, Any]:
    """The tensors with weights in eight bits multiplied, when taken, by their scales.

    `headers` are the metadata of the files that hold them. A scale is one number or one per row of
    the weight (its output). Raises ConfigError that names the format where it is another, and for a
    scale that is damaged, of another shape, or of no weight.
    """
    recognise.refuse(where, tensors, recognise.QUANTISED, recognise.UNQUANTISED)
    marks = _marks(where, tensors, headers)
    for layer, mark in marks.items():
        if f"{layer}.weight" not in tensors:
            continue
        check(
            mark["format"] in FORMATS,
            f"{where}: {layer} is quantised as {mark['format']}, expected {recognise.UNQUANTISED}"
            f" ({', '.join(FORMATS[:2])})",
        )
        more = [f"{key} = {mark[key]!r:.40}" for key in mark if mark[key] and key not in KNOWN]
        check(
            not more,
            f"{where}: {layer} is quantised as {mark['format']} with {', '.join(more)}, which may"
            f" change the weights; expected {mark['format']} alone",
        )
    all_marked = any(_is_mark_of_all(name) for name in tensors)
    found = {name: tensor for name, tensor in tensors.items() if not _is_note(name, tensors)}
    scaled = {}
    for name, scale in tensors.items():
        if not name.endswith(SCALES):
            continue
        layer = name.rpartition(".")[0]
        weight = f"{layer}.weight"
        check(weight in found, f"{where}: {name} is a scale of {weight}, which is not there")
        check(weight not in scaled, f"{where}: {weight} has two scales, expected one")
        marked = layer in marks or (all_marked and name.endswith(".scale_weight"))
        scaled[weight] = _scaled(f"{where}: {name}", found[weight], scale, marked)
    for layer in marks.keys() - {name.removesuffix(".weight") for name in scaled}:
        check(
            f"{layer}.weight" not in found,
            f"{where}: {layer} is marked as {marks[layer]['format']!r}, expected"
            f" {layer}.weight_scale beside it, found none",
        )
    return found | scaled


def _is_mark_of_all(name: str) -> bool:
    return name.split(".")[-1] == MARK_OF_ALL


def _is_note(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether it says something of the weights and is none."""
    mark = name.endswith(MARK) and name.removesuffix(MARK) + ".weight" in tensors
    return mark or name.endswith(SCALES + INPUT_SCALES) or _is_mark_of_all(name)


def _marks(
    where: Any, tensors: Mapping[str, Any], headers: Iterable[Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """What marks or headers state of each layer: its format, and whatever else."""
    marks = {}
    for header in headers:
        if HEADER not in header:
            continue
        try:
            for layer, value in json.loads(header[HEADER])["layers"].items():
                # Its names have the file's prefix, or, of some tools, none.
                marks[recognise.unwrapped(layer)[1]] = _mark(value)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise ConfigError(
                f"{where}: {HEADER} of its header is damaged, expected JSON with layers, from names"
                " to their format"
            ) from None
    for name, tensor in tensors.items():
        if name.endswith(MARK):
            try:
                marks[name.removesuffix(MARK)] = _mark(json.loads(np.asarray(tensor).tobytes()))
            except (ValueError, TypeError, LookupError, RecursionError):
                raise ConfigError(
                    f"{where}: {name} is damaged, expected JSON in bytes that states a format"
                ) from None
    return marks


def _mark(value: Any) -> dict[str, Any]:
    mark = {"format": value} if isinstance(value, str) else dict(value)
    if not isinstance(mark["format"], str):
        raise TypeError("a format is a string")
    return mark


def _scaled(where: str, weight: Any, scale: Any, marked: bool) -> Tensor:
    shape, rows = tuple(scale.shape), tuple(weight.shape)[:1]
    one = math.prod(shape) == 1
    per_row = len(weight.shape) > 1 and shape[:1] == rows and math.prod(shape) == rows[0]
    check(
        one or per_row,
        f"{where} is a scale of shape {list(shape)}, expected one number, or one per row of"
        f" {list(weight.shape)}, [{', '.join(map(str, rows))}]",
    )
    kind, of = np.dtype(scale.dtype).name, np.dtype(weight.dtype).name
    check("float" in kind, f"{where} is a scale in {kind}, expected floating point")
    check("float" in of or of == "int8", f"{where} is a scale of {of}, expected fp8 or int8")
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = np.asarray(scale).astype(np.float32)
    check(
        bool(np.isfinite(numbers).all() and (numbers > 0).all()),
        f"{where} is a scale of 0 or less, NaN or infinity: damaged weights",
    )
    # ComfyUI takes the scale into account where a mark says so, whatever the weight's type, and
    # else leaves it: of a weight in full precision without a mark nobody can tell.
    check(
        marked or of in NARROW or bool((numbers == 1).all()),
        f"{where} is a scale of {of} that nothing marks as quantised, so it may be multiplied"
        " already; expected fp8 or int8",
    )

    def take():
        factor = numbers.reshape(-1, *[1] * (len(weight.shape) - 1))
        return np.asarray(weight).astype(np.float32) * factor

    return Tensor(tuple(weight.shape), np.dtype(np.float32), take)
