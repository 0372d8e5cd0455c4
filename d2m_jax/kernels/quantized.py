"""Inference in int8 or fp8, by qwix: kernels are quantised once, activations as they come.

A quantised kernel is a qwix.QArray, with one float32 scale per output channel; activations get one
per token. Scales are symmetric, of the largest number. Both are multiplied as they are, summed in
int32 or float32, and scaled after. There are no gradients: train first, then quantise.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from qwix import QArray

from d2m_jax.config import check
from d2m_jax.kernels.target import log_once, target

KINDS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# The large matrices of blocks, by the end of their names. All else is small and sensitive: gates
# and block routers decide, modulations scale whole streams, embedders and the last layer meet the
# data; norms and biases are no matrices.
LAYERS = (
    "qkv.kernel",
    "proj.kernel",
    "attn_out.kernel",
    "in_layer.kernel",
    "out_layer.kernel",
    "experts.in_kernel",
    "experts.out_kernel",
)
STAYS = ("lin.kernel", "gate.kernel", "gate_cond.kernel")  # of a block's matrices


def check_kind(kind: str | None) -> None:
    """Raise ConfigError for what is neither None nor one of KINDS."""
    expected = f"expected {' or '.join(KINDS)}, or None"
    check(kind is None or kind in KINDS, f"quantize = {kind}: {expected}")


def quantized(params: Any, kind: str, release: bool = False) -> Any:
    """A transformer's parameters, the kernels of LAYERS as QArrays of a kind of KINDS.

    On the devices that have them, cut as they are, one after the other; with `release` the memory
    of each original is given back at once. ConfigError for an unknown kind, ValueError for a
    matrix of a block that is in neither LAYERS nor STAYS.
    """
    check_kind(kind)
    if kind == "fp8" and (lack := _lacks_fp8()):
        cost = "XLA multiplies in a wider type, which saves memory but no time"
        log_once(__name__, f"quantize = fp8: {lack}; {cost}", logging.WARNING)

    def choose(path: KeyPath, leaf: Array):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if ".block." not in name or not name.endswith("kernel") or name.endswith(STAYS):
            return leaf
        if not name.endswith(LAYERS):
            raise ValueError(f"{name}: expected in LAYERS or STAYS of kernels/quantized.py")
        new = _quantized(leaf, KINDS[kind])
        if release:
            leaf.delete()
        return new

    return jax.tree_util.tree_map_with_path(choose, params)


@partial(jax.jit, static_argnums=1)
def _quantized(w: Float[Array, "*n i o"], dtype: DTypeLike) -> QArray:
    kept = [axis for axis in range(w.ndim) if axis != w.ndim - 2]
    return _symmetric(w.astype(jnp.float32), dtype, kept)


def _symmetric(x: Float[Array, "..."], dtype: DTypeLike, kept: Sequence[int]) -> QArray:
    # qwix puts the largest number of int8 half way between two steps, 127.5, where the last bit of
    # a float32 decides between -127 and -128: so would every device and every order of sums.
    factor = 127.5 / 127 if dtype == jnp.int8 else 1
    return qwix.quantize(x, dtype, channelwise_axes=kept, calibration_method=f"absmax,{factor}")


def per_token(x: Float[Array, "*n i"], w: QArray, cut: str | None = None) -> QArray:
    """Activations in the type of the kernel that they will meet, with one scale per token.

    Inside shard_map, `cut` is the mesh axis that cuts the last axis of x, or None: a token has the
    same scale on all of its devices, as on one device.
    """
    x, kept = x.astype(jnp.float32), range(x.ndim - 1)
    if cut is None:
        return _symmetric(x, w.qtype, kept)
    # qwix takes no scale: the largest number of all devices lies beside those of this one.
    largest = jax.lax.pmax(jnp.abs(x).max(-1, keepdims=True), cut)
    y = _symmetric(jnp.append(x, largest, -1), w.qtype, kept)
    return replace(y, qvalue=y.qvalue[..., :-1])


def product(x: Array | QArray, w: Array | QArray) -> Array:
    """The last axis of x with the first of w: of two arrays in their type, of two QArrays in
    float32."""
    if isinstance(x, QArray) or isinstance(w, QArray):
        axes = ((x.ndim - 1,), (0,)), ((), ())
        return qwix.dot_general(x, w, axes, preferred_element_type=jnp.float32)
    return jnp.tensordot(x, w, 1)


def dot(
    x: Float[Array, "*n i"], w: Float[Array | QArray, "i ..."], cut: str | None = None
) -> Array:
    """x w in the dtype of x, over the last axis of x and the first of w; `cut` as in per_token."""
    if isinstance(w, QArray):
        return product(per_token(x, w, cut), w).astype(x.dtype)
    return product(x, w.astype(x.dtype))


def cast(w: Array | QArray, dtype: DTypeLike) -> Array | QArray:
    """An array in a dtype; what is quantised stays so, and its scales stay float32."""
    return w if isinstance(w, QArray) else w.astype(dtype)


def plain(w: QArray, dtype: DTypeLike) -> Array:
    """What is quantised as an array."""
    return qwix.dequantize(w).astype(dtype)


def _lacks_fp8() -> str:
    """Why the device at hand does not multiply fp8, or nothing."""
    device, first = target(), jax.devices()[0]
    if device == "gpu":
        found = getattr(first, "compute_capability", "none")
        new = re.fullmatch(r"[\d.]+", found) and float(found) >= 8.9
        return "" if new else f"needs compute capability 8.9, found {found}"
    generation = re.search(r"\d+", first.device_kind) if device == "tpu" else None
    if generation and int(generation[0]) >= 6:
        return ""
    return f"needs a GPU or a TPU of generation 6, found {first.device_kind}"
