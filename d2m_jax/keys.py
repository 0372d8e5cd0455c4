"""Random keys by name: the same seed and name give the same numbers, whatever else was drawn."""

import zlib

import jax
import numpy as np
from jaxtyping import Array, Key


def named_key(seed: int, name: str) -> Key[Array, ""]:
    """The key of this name."""
    return inner_key(jax.random.key(seed), name)


def inner_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The key of this name among those of one draw."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))


def named_generator(seed: int, name: str) -> np.random.Generator:
    """The same for draws of NumPy."""
    return np.random.default_rng((seed, zlib.crc32(name.encode())))
