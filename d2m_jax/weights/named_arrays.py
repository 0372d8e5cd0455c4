"""Trees of arrays by dotted name, and a fingerprint that finds every flipped bit."""

import zlib
from collections.abc import Sequence
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


def sizes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of every leaf; leaves are whatever has one."""
    return {name: tuple(a.shape) for name, a in names(tree).items()}


class Fingerprint:
    """Eight hex digits over names, shapes, types and bytes of arrays, which come part by part."""

    def __init__(self):
        self._total, self._name = 0, ""

    def begin(self, name: str, dtype: Any, shape: Sequence[int]) -> None:
        """The next array, in the order of names."""
        self._name = name
        self._total = zlib.crc32(f"{name} {dtype}{list(shape)}".encode(), self._total)

    def add(self, part: np.ndarray) -> None:
        """The array's next bytes. FloatingPointError for a NaN or an infinity among them."""
        part = np.ascontiguousarray(part)
        if not _finite(part):
            raise FloatingPointError(f"{self._name} is not finite")
        self._total = zlib.crc32(part.reshape(-1).view(np.uint8), self._total)

    def hex(self) -> str:
        """The digits for what came until now."""
        return f"{self._total:08x}"


def _finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    flat = array.reshape(-1)
    # Part by part: fresh memory for what is computed on the way costs more than the work.
    parts = (flat[i : i + 2**18] for i in range(0, flat.size, 2**18))
    if array.dtype == jnp.bfloat16:  # NumPy would take its numbers one by one
        return all(((part.view(np.uint16) & 0x7F80) != 0x7F80).all() for part in parts)
    return all(np.isfinite(part).all() for part in parts)


def fingerprint(tree: Any) -> str:
    """The fingerprint of all arrays of a tree, computed on the host.

    Raises FloatingPointError that names the first array which holds a NaN or an infinity.
    """
    total = Fingerprint()
    for name, array in sorted(names(tree).items()):
        total.begin(name, array.dtype, array.shape)
        total.add(np.asarray(array))
    return total.hex()
