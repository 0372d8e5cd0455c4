"""Grouped matmul: rows sorted by group, one weight matrix per group.

Forward, gradient of the rows and gradient of the weights each by the kernel that suits the device,
a GPU or a TPU; where none is there, kernels/tiles.py does without. `jax.lax.ragged_dot` is none of
them: XLA expands it to every group times every row.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from d2m_jax.config import ConfigError
from d2m_jax.kernels.quantized import QArray, dot, per_token, plain
from d2m_jax.kernels.target import failure, gpu_lacks, log_once, target
from d2m_jax.kernels.tiles import chosen_experts
from d2m_jax.kernels.tuning import tuned

INTERPRET = False  # run TPU kernels on a CPU, slowly: for tests


def reference(
    x: Float[Array, "r d"], w: Float[Array, "g d f"], sizes: Int[Array, " g"]
) -> Float[Array, "r f"]:
    """Every group's matrix on every row, the right one selected: the plain form that tests compare
    with."""
    chosen = jax.nn.one_hot(_groups(x, sizes), w.shape[0], dtype=x.dtype)
    return jnp.einsum("rd,gdf,rg->rf", x, w, chosen)


def _groups(x: Float[Array, "r d"], sizes: Int[Array, " g"]) -> Int[Array, " r"]:
    """The group of every row; one more than there are past the last."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")


def grouped_matmul(
    x: Float[Array, "r d"],
    w: Float[Array | QArray, "g d f"],
    sizes: Int[Array, " g"],
    way: str = "auto",
    cut: str | None = None,
) -> Float[Array, "r f"]:
    """The rows of group i times w[i]: in the best way for the device, or one of WAYS or EVERYWHERE
    (see `choose`).

    The first sizes[0] rows are those of group 0, and so on. Rows past the last group give exactly
    zero, and in WAYS cost no work; so does their gradient. With a quantised w there is none, and
    rows are quantised too where the way takes that; `cut` as in kernels/quantized.py's per_token.

    >>> x, w = jnp.ones((5, 3)), jnp.arange(2.0).reshape(2, 1, 1) + jnp.ones((2, 3, 4))
    >>> grouped_matmul(x, w, jnp.array([2, 3]))[:, 0]  # two rows for w[0], three for w[1]
    Array([3., 3., 6., 6., 6.], dtype=float32)
    """
    way = choose(way) if way == "auto" else way
    if way == "reference":
        return reference(x, plain(w, x.dtype) if isinstance(w, QArray) else w, sizes)
    if way == "tiled":
        group, one = _groups(x, sizes)[:, None], jnp.ones((x.shape[0], 1), x.dtype)
        product = partial(_weighed, cut)
        return chosen_experts(product, x, group, one, (w,))
    return _by_kernel(x, w, sizes, way, cut)


def _weighed(
    cut: str | None,
    x: Float[Array, "r d"],
    weight: Float[Array, " r"],
    w: Float[Array | QArray, "d f"],
) -> Float[Array, "r f"]:
    return dot(x * weight[:, None], w, cut)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _by_kernel(
    x: Float[Array, "r d"],
    w: Float[Array | QArray, "g d f"],
    sizes: Int[Array, " g"],
    way: str,
    cut: str | None,
) -> Float[Array, "r f"]:
    a, b = _operands(x, w, way, cut)
    return _only_rows(_alone(WAYS[way].rows, transpose=False)(a, b, sizes), sizes).astype(x.dtype)


def _operands(x: Float[Array, "r d"], w: Float[Array | QArray, "g d f"], way: str, cut: str | None):
    if not isinstance(w, QArray):
        return x, w
    if WAYS[way].quantized:
        return per_token(x, w, cut), w
    cost = "their kernels are made wide again before each product: saves memory, not time"
    log_once(__name__, f"quantised experts: {way} takes none; {cost}", logging.WARNING)
    return x, plain(w, x.dtype)


def _forward_rule(
    x: Float[Array, "r d"],
    w: Float[Array | QArray, "g d f"],
    sizes: Int[Array, " g"],
    way: str,
    cut: str | None,
):
    return _by_kernel(x, w, sizes, way, cut), (x, w, sizes)


def _backward_rule(
    way: str, cut: str | None, residuals: tuple[Array, Array, Array], dy: Float[Array, "r f"]
):
    x, w, sizes = residuals
    dx = _only_rows(_alone(WAYS[way].rows, transpose=True)(dy, w, sizes), sizes)
    dw = _alone(WAYS[way].weights)(x, dy, sizes)
    # A kernel may leave a group without rows as it found the memory.
    dw = jnp.where((sizes > 0)[:, None, None], dw, 0)
    return dx, dw.astype(w.dtype), None


_by_kernel.defvjp(_forward_rule, _backward_rule)


def _alone(kernel: Callable, **options: bool) -> Callable:
    """Under vmap (the samples of a Mixture of Blocks) one after the other: kernels have no
    batch."""
    return jax.custom_batching.sequential_vmap(partial(kernel, **options))


def _only_rows(y: Float[Array, "r f"], sizes: Int[Array, " g"]):
    """y with zeros where a kernel left rows of no group as it found the memory."""
    return jnp.where(jnp.arange(y.shape[0])[:, None] < sizes.sum(), y, 0)


def _megablox(
    x: Float[Array, "r d"], w: Float[Array, "g a b"], sizes: Int[Array, " g"], transpose: bool
):
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    padded = _padded(x)
    tiling = _tiling(padded, x.shape[1], w.shape[1 if transpose else 2])
    y = kernels.gmm(padded, w, sizes, x.dtype, tiling, transpose_rhs=transpose, interpret=INTERPRET)
    return y[: x.shape[0]]


def _megablox_weights(x: Float[Array, "r d"], dy: Float[Array, "r f"], sizes: Int[Array, " g"]):
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    x, dy = _padded(x), _padded(dy)
    tiling = _tiling(x, x.shape[1], dy.shape[1])
    return kernels.tgmm(x.T, dy, sizes, x.dtype, tiling, interpret=INTERPRET)


def _padded(x: Float[Array, "r d"]):
    """x with as many rows as whole tiles have."""
    return jnp.pad(x, ((0, -x.shape[0] % _row_tile(x)), (0, 0)))


def _row_tile(x: Float[Array, "r d"]) -> int:
    return 512 if x.shape[0] >= 512 else 128


def _tiling(x: Float[Array, "r d"], inner: int, outer: int) -> tuple[int, int, int]:
    """Rows, inner and outer columns of a tile: the largest that divide evenly and leave room for
    double buffers in 16 MB of VMEM, which of float32 hold half as much."""
    widest = 512 if x.dtype == jnp.float32 else 1024

    def columns(size: int) -> int:
        fitting = (t for t in (1024, 768, 512, 384, 256) if t <= widest and size % t == 0)
        return next(fitting, min(size, 128))

    return _row_tile(x), columns(inner), columns(outer)


def _tokamax(
    kernel: str,
    x: Float[Array | QArray, "r d"],
    w: Float[Array | QArray, "g a b"],
    sizes: Int[Array, " g"],
    transpose: bool,
):
    contracted = ([1], [2 if transpose else 1]), ([], [])
    return _tokamax_dot(kernel, x, w, sizes, lax.RaggedDotDimensionNumbers(contracted, [0], [0]))


def _tokamax_weights(
    kernel: str, x: Float[Array, "r d"], dy: Float[Array, "r f"], sizes: Int[Array, " g"]
):
    contracted = ([0], [0]), ([], [])
    return _tokamax_dot(kernel, x, dy, sizes, lax.RaggedDotDimensionNumbers(contracted, [0], []))


def _tokamax_dot(
    kernel: str,
    a: Float[Array | QArray, "r d"],
    b: Float[Array | QArray, "..."],
    sizes: Int[Array, " g"],
    dimensions: lax.RaggedDotDimensionNumbers,
):
    dot = importlib.import_module("tokamax").ragged_dot_general
    with tuned():
        return dot(a, b, sizes, ragged_dot_dimension_numbers=dimensions, implementation=kernel)


@dataclass(frozen=True)
class Way:
    """Kernels: `rows(x, w, sizes, transpose)` for forward and the gradient of the rows,
    `weights(x, dy, sizes)` for that of the weights."""

    device: str
    rows: Callable
    weights: Callable
    tokamax: tuple[str, ...] = ()  # which of its kernels must be there
    quantized: bool = False  # whether `rows` multiplies QArrays, without transpose


def _of_tokamax(device: str, rows: str, weights: str, quantized: bool = True) -> Way:
    kernels = partial(_tokamax, rows), partial(_tokamax_weights, weights)
    return Way(device, *kernels, tokamax=(rows, weights), quantized=quantized)


WAYS = {
    "megablox": Way("tpu", _megablox, _megablox_weights),
    "triton": _of_tokamax("gpu", "triton", "triton"),
    # Mosaic's own gradient of the weights reaches a quarter of Triton's rate (tokamax's timings on
    # an H100).
    # On an H100 its rows must be bfloat16.
    "mosaic_gpu": _of_tokamax("gpu", "mosaic_gpu", "triton", quantized=False),
    "mosaic_tpu": _of_tokamax("tpu", "mosaic_tpu", "mosaic_tpu"),
}
BEST = {"tpu": "megablox", "gpu": "triton"}
EVERYWHERE = "reference", "tiled"  # what works without a grouped matmul (models/experts.py)
EXPERTS = "D2M_JAX_EXPERTS"  # in the environment: the way in which a model's experts are computed


def choose(way: str) -> str:
    """A way of WAYS or EVERYWHERE, for the device that the program being traced is for.

    "auto" is the best that is there, and one logged line says what is missing; a way by name that
    cannot work is a ConfigError that lists what can.
    """
    device = target()
    if way in EVERYWHERE:
        return way
    if way == "auto":
        best = BEST.get(device, "tiled")
        if best in WAYS and (lack := lacks(best, device)):
            cost = (
                "tiles in plain XLA instead: up to an eighth more rows, small products for the rest"
            )
            log_once(__name__, f"grouped matmul: {best} {lack}; {cost}", logging.WARNING)
            return "tiled"
        log_once(__name__, f"grouped matmul: {best}")
        return best
    lack = lacks(way, device) if way in WAYS else "unknown"
    if lack:
        works = ["auto", *EVERYWHERE, *(name for name in WAYS if not lacks(name, device))]
        raise ConfigError(f"{EXPERTS} = {way}: {lack}; here work {', '.join(works)}")
    return way


def lacks(name: str, device: str) -> str:
    """Why a way cannot work on a device ("cpu", "gpu", "tpu"), or nothing."""
    way = WAYS[name]
    if way.device != device:
        return f"is for {way.device}, found {device}"
    if way.device == "gpu" and (lack := gpu_lacks()):
        return lack
    return next(filter(None, map(_tokamax_lacks, way.tokamax)), "")


@functools.cache
def _tokamax_lacks(kernel: str) -> str:
    def small_product(x: Float[Array, "r d"], w: Float[Array, "g d f"], sizes: Int[Array, " g"]):
        return importlib.import_module("tokamax").ragged_dot(x, w, sizes, implementation=kernel)

    kinds = ((128, 128), jnp.bfloat16), ((1, 128, 128), jnp.bfloat16), ((1,), jnp.int32)
    why = failure(small_product, *(jax.ShapeDtypeStruct(*kind) for kind in kinds))
    return why and f"needs tokamax with its kernel {kernel} ({why})"
