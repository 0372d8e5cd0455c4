"""Rectified flow: noisy input, velocity target, schedule, packing into tokens, position ids."""

from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

Times = TypeVar("Times", Array, np.ndarray)


def mix(
    data: Float[Array, "b n c"], noise: Float[Array, "b n c"], t: Float[Array, " b"]
) -> Float[Array, "b n c"]:
    """x_t = (1 − t)·data + t·noise; t in [0, 1], 1 is pure noise."""
    t = t[:, None, None]
    return (1 - t) * data + t * noise


def velocity(data: Float[Array, "b n c"], noise: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    """The target dx_t/dt = noise − data."""
    return noise - data


def shift(t: Float[Times, " s"], factor: float) -> Float[Times, " s"]:
    """s·t / (1 + (s − 1)·t): more times near 1, where an image's layout is decided.

    A factor s of 1 leaves times as they are (FLUX.1 [schnell]), 3 is usual (SD3); FLUX.1 [dev]'s
    is ModelConfig.shift_at (BFL sampling.time_shift).
    """
    return factor * t / (1 + (factor - 1) * t)


def schedule(steps: int, factor: float) -> Float[np.ndarray, " s"]:
    """`steps` + 1 shifted times from 1 to 0 (BFL sampling.get_schedule)."""
    return shift(np.linspace(1, 0, steps + 1), factor).astype(np.float32)


def pack(image: Float[Array, "b H W c"], patch: int = 2) -> Float[Array, "b n k"]:
    """Image or latent to tokens, channels outermost within a token (BFL's layout); k = c ·
    patch²."""
    return rearrange(image, "b (h ph) (w pw) c -> b (h w) (c ph pw)", ph=patch, pw=patch)


def unpack(
    tokens: Float[Array, "b n k"], height: int, width: int, patch: int = 2
) -> Float[Array, "b H W c"]:
    """The inverse of pack for an image of height × width."""
    h, w = height // patch, width // patch
    return rearrange(tokens, "b (h w) (c ph pw) -> b (h ph) (w pw) c", h=h, w=w, ph=patch, pw=patch)


def image_ids(rows: int, columns: int) -> Float[Array, "1 n 3"]:
    """Position ids (0, row, column) of an image's tokens in float32; one row serves a whole
    batch."""
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    ids = jnp.stack([jnp.zeros_like(row), row, column], axis=-1)
    return ids.reshape(1, rows * columns, 3).astype(jnp.float32)


def text_ids(tokens: int) -> Float[Array, "1 n 3"]:
    """Position ids of text tokens: all zero."""
    return jnp.zeros((1, tokens, 3), jnp.float32)
