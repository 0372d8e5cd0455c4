"""Attention without a mask, float32 softmax: a kernel where the device has one, else plain JAX that
keeps its scores small."""

import functools
import importlib
import logging
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from d2m_jax.kernels.target import failure, gpu_lacks, log_once, target

INTERPRET = False  # run the TPU kernel on a CPU, slowly: for tests
# Scores of all heads at once below this, else head by head, and the queries of a head in parts of
# this many bytes of scores: they should stay in the cache.
SCORE_BYTES = 4 * 2**20
SPLASH_TOKENS = 512  # fewer are not worth a kernel on a TPU


def attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
) -> Float[Array, "b n h d"]:
    """softmax(q kᵀ / √d) v for every head, by the device that the program being traced is for:
    cuDNN on NVIDIA in half precision, splash on a TPU, else XLA."""
    device, half = target(), q.dtype in (jnp.bfloat16, jnp.float16)
    tokens, width = q.shape[1], q.shape[-1]
    if device == "gpu" and half:
        if lack := _cudnn_lacks(width):
            message = f"attention: cuDNN cannot run ({lack}); scores go through memory"
            log_once(__name__, message, logging.WARNING)
        else:
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if device == "tpu" and tokens >= SPLASH_TOKENS:
        if width % 128 == 0:
            return splash(q, k, v)
        message = f"attention: splash needs heads of 128, found {width}; scores go through memory"
        log_once(__name__, message, logging.WARNING)
    if 4 * q.shape[0] * q.shape[2] * tokens**2 <= SCORE_BYTES:
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return by_head(q, k, v)


@functools.cache
def _cudnn_lacks(width: int) -> str:
    """Why cuDNN's kernel cannot run for heads of this width, or nothing."""
    if lack := gpu_lacks():
        return lack
    x = jax.ShapeDtypeStruct((1, 128, 1, width), jnp.bfloat16)
    return failure(partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)


def by_head(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
) -> Float[Array, "b n h d"]:
    """The same one head after the other, queries in parts; recomputed in the backward pass, so that
    no scores are kept."""
    batch, tokens, _, width = q.shape
    parts = -(-4 * batch * tokens**2 // SCORE_BYTES)
    rows = -(-tokens // parts)

    @jax.checkpoint
    def part(q: Float[Array, "b n d"], k: Float[Array, "b m d"], v: Float[Array, "b m d"]):
        scores = jnp.einsum("bnd,bmd->bnm", q, k, preferred_element_type=jnp.float32)
        scores = scores * width**-0.5
        e = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        y = jnp.einsum("bnm,bmd->bnd", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (y / e.sum(-1, keepdims=True)).astype(v.dtype)

    def head(qkv: tuple[Array, Array, Array]):
        q, k, v = qkv
        if parts == 1:
            return part(q, k, v)
        q = jnp.pad(q, ((0, 0), (0, parts * rows - tokens), (0, 0)))
        q = q.reshape(batch, parts, rows, width).swapaxes(0, 1)
        y = jax.lax.map(lambda q: part(q, k, v), q)
        return y.swapaxes(0, 1).reshape(batch, parts * rows, width)[:, :tokens]

    y = jax.lax.map(head, tuple(a.transpose(2, 0, 1, 3) for a in (q, k, v)))
    return y.transpose(1, 2, 0, 3)


def splash(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
) -> Float[Array, "b n h d"]:
    """JAX's splash attention for TPUs. Tokens are filled up to a multiple of 512, heads' width must
    be one of 128."""
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")
    tokens, heads = q.shape[1:3]
    filled = tokens + -tokens % 512
    # In float32, in which a calibration computes, larger ones do not fit the core's memory.
    sizes = (512,) if q.dtype == jnp.float32 else (1536, 1024, 512)
    block = next(size for size in sizes if filled % size == 0)
    names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    blocks = kernels.BlockSizes(**{f"block_{name}": block for name in names}, block_kv_compute=512)
    mask = kernels.MultiHeadMask([kernels.FullMask((filled, filled))] * heads)
    run = kernels.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=INTERPRET)
    segments = None
    if filled > tokens:  # the added ones see, and are seen by, one another alone
        added = (jnp.arange(filled) >= tokens).astype(jnp.int32)
        segments = kernels.SegmentIds(q=added, kv=added)

    def one(q: Float[Array, "n h d"], k: Float[Array, "n h d"], v: Float[Array, "n h d"]):
        q, k, v = (
            jnp.pad(a, ((0, filled - tokens), (0, 0), (0, 0))).swapaxes(0, 1)
            for a in (q * q.shape[-1] ** -0.5, k, v)
        )
        return run(q, k, v, segment_ids=segments).swapaxes(0, 1)[:tokens]

    return jax.vmap(one)(q, k, v)
