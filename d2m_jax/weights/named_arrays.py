"""Trees of arrays by dotted name, and a fingerprint that finds every flipped bit."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def names(tree: Any) -> dict[str, Any]:
    """The leaves by dotted path, in the tree's order: {"single.0.block.qkv.kernel": array, …}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def restructure(like: Any, named: dict[str, Any]) -> Any:
    """A tree with the structure of `like` and the leaves of `named`."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in names(like)])


def shapes(tree: Any) -> dict[str, str]:
    """Name → "float32[2, 3]" of every leaf; leaves may be abstract."""
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in names(tree).items()}


def fingerprint(tree: Any) -> str:
    """Eight hex digits over names, shapes, types and bytes of all arrays, computed on the host.

    Raises FloatingPointError that names the first array which holds a NaN or an infinity.
    """
    total, kinds = 0, shapes(tree)
    for name, array in sorted(names(tree).items()):
        array = np.ascontiguousarray(array)
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            raise FloatingPointError(f"{name} is not finite")
        total = zlib.crc32(f"{name} {kinds[name]}".encode(), total)
        total = zlib.crc32(array.reshape(-1).view(np.uint8), total)
    return f"{total:08x}"
