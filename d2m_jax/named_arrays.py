"""Trees of arrays by dotted name, and a fingerprint that finds every flipped bit."""

import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped, UInt32


def names(tree: Any) -> dict[str, Any]:
    """The leaves by dotted path, in the tree's order: {"single.0.block.qkv.kernel": array, …}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def restructure(like: Any, named: dict[str, Any]) -> Any:
    """A tree with the structure of `like` and the leaves of `named`."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in names(like)])


def nested(named: dict[str, Any]) -> dict:
    """The dicts whose leaves have these dotted names."""
    tree: dict = {}
    for name, leaf in named.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = leaf
    return tree


def shapes(tree: Any) -> dict[str, str]:
    """Name → "float32[2, 3]" of every leaf; leaves may be abstract."""
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in names(tree).items()}


def sizes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of every leaf; leaves are whatever has one."""
    return {name: tuple(a.shape) for name, a in names(tree).items()}


class Fingerprint:
    """Eight hex digits over names, shapes, types and bits of arrays, which come part by part."""

    def __init__(self):
        self._total, self._array = 0, None

    def begin(self, name: str, dtype: Any, shape: Sequence[int]) -> None:
        """The next array, in the order of names."""
        self._end()
        self._total = zlib.crc32(f"{name} {dtype}{list(shape)}".encode(), self._total)
        self._array, self._sum, self._position = name, 0, 0

    def add(self, part: np.ndarray, known_finite: bool = False) -> None:
        """The array's next elements. FloatingPointError for a NaN or an infinity among them."""
        checked = jnp.issubdtype(part.dtype, jnp.floating) and not known_finite
        words = np.ascontiguousarray(part).reshape(-1).view(_word(part.dtype))
        for start in range(0, words.size, CHUNK):
            chunk = words[start : start + CHUNK]
            if checked and not _finite(chunk, part.dtype):
                raise FloatingPointError(f"{self._array} is not finite")
            self._sum += _sum(chunk, self._position)
            self._position += chunk.size

    def add_sum(self, total: int) -> None:
        """What `add` would sum up for the array, computed elsewhere."""
        self._sum += total

    def _end(self) -> None:
        if self._array is not None:
            self._total = zlib.crc32((self._sum % 2**32).to_bytes(4, "little"), self._total)
            self._array = None

    def hex(self) -> str:
        """The digits for what came until now."""
        self._end()
        return f"{self._total:08x}"


def fingerprint(tree: Any) -> str:
    """The fingerprint of all arrays of a tree: the same on every mesh and number of processes.

    What lies in this process's main memory is summed there, all else where it lies. Raises
    FloatingPointError that names the first array which holds a NaN or an infinity.
    """
    named = sorted(names(tree).items())
    # One after the other: programs that wait for another process must run in one order on CPUs.
    sums = {name: jax.device_get(_device_sum(array)) for name, array in named if _elsewhere(array)}
    total = Fingerprint()
    for name, array in named:
        total.begin(name, array.dtype, array.shape)
        if name not in sums:
            total.add(np.asarray(array))
            continue
        value, finite = sums[name]
        if not finite:
            raise FloatingPointError(f"{name} is not finite")
        total.add_sum(int(value))
    return total.hex()


def _elsewhere(array: Any) -> bool:
    """Whether an array is on accelerators, or in the memory of other processes too."""
    if not isinstance(array, jax.Array):
        return False
    host = all(device.platform == "cpu" for device in array.sharding.device_set)
    return not (host and array.is_fully_addressable)


def _word(dtype: Any) -> np.dtype:
    """The unsigned numbers as which an element's bits are read; of eight bytes there are two."""
    return np.dtype({1: np.uint8, 2: np.uint16}.get(np.dtype(dtype).itemsize, np.uint32))


def finite(array: np.ndarray) -> bool:
    """Whether an array of floats holds neither NaN nor infinity."""
    words = np.ascontiguousarray(array).reshape(-1).view(_word(array.dtype))
    starts = range(0, words.size, CHUNK)
    return all(_finite(words[start : start + CHUNK], array.dtype) for start in starts)


def _finite(words: np.ndarray, dtype: Any) -> bool:
    if dtype == jnp.bfloat16:  # NumPy would take its numbers one by one
        return bool((words & 0x7FFF).max() < 0x7F80)
    return bool(np.isfinite(words.view(dtype)).all())


# An array's part of the fingerprint is the sum, modulo 2^32, of mix(bits) · factor over its
# elements, where `factor` is an odd number that follows from the element's place. So it can be
# summed up over blocks and devices in any order. Where one element changes, the sum changes for
# certain: mix is a bijection, and what is multiplied by an odd number can be divided again. Where
# several change, or two change places, it stays by chance: once in 2^32.


Words = TypeVar("Words", Array, np.ndarray)


def _mix(x: UInt32[Words, "..."]) -> UInt32[Words, "..."]:
    """A bijection of 32-bit numbers: every bit of x turns half of the result's (`lowbias32`)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


CHUNK = 2**16  # elements: they stay in the cache
PLACES = _mix(np.arange(CHUNK, dtype=np.uint32)) | 1  # the first factor; the second is the chunk's


def _sum(words: np.ndarray, position: int) -> int:
    """Of at most CHUNK words, of which the first is the array's element `position`."""
    total, head = 0, CHUNK - position % CHUNK
    for part in (words[:head], words[head:]):
        if part.size:
            chunk, place = divmod(position, CHUNK)
            mixed = _mix(part.astype(np.uint32)) * PLACES[place : place + part.size]
            of_chunk = int(_mix(~np.array([chunk], np.uint32))[0]) | 1
            total += int(mixed.sum(dtype=np.uint32)) * of_chunk
            position += part.size
    return total


@jax.jit
def _device_sum(array: Shaped[Array, "..."]) -> tuple[UInt32[Array, ""], Bool[Array, ""]]:
    """The sum of a whole array, which may be cut over devices, and whether it is finite."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _word(array.dtype)).astype(jnp.uint32)
    position, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        position += index * np.uint32(stride % 2**32)
        stride *= array.shape[axis]
    place, chunk = position % CHUNK, position // CHUNK
    mixed = _mix(words) * (_mix(place) | 1) * (_mix(~chunk) | 1)
    finite = jnp.issubdtype(array.dtype, jnp.floating)
    return mixed.sum(dtype=jnp.uint32), jnp.isfinite(array).all() if finite else jnp.bool_(True)
