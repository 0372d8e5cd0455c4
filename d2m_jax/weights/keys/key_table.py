"""How a torch layout maps to our parameters: a table of small entries that reads both ways.

Sources are mappings from torch's names to anything with `shape` and `dtype` that np.asarray takes:
tensors of a safetensors file (read when taken), NumPy arrays.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2m_jax.config import SHOWN, ConfigError, listed, suggestion
from d2m_jax.named_arrays import finite

Layout = Literal["same", "linear", "conv", "pointwise"]
TILE = 2**21  # elements that are transposed at a time


class Part(NamedTuple):
    """The indices start to stop of one axis."""

    axis: int
    start: int
    stop: int

    @property
    def index(self) -> slice:
        """What takes them out of the axis."""
        return slice(self.start, self.stop)


class Picked(NamedTuple):
    """Some indices of one axis, in an order of their own, none of them `stop` or more."""

    axis: int
    index: np.ndarray
    stop: int


@dataclass(frozen=True)
class Entry:
    """`theirs`, or a part of it, in our layout is `ours[index]`, or a part of that.

    layout: "linear" is [out, in] ↔ [in, out], "conv" [out, in, h, w] ↔ [h, w, in, out],
    "pointwise" [out, in, 1, 1] ↔ [in, out]. A part's axis counts in the owner's own layout, in ours
    without the axes that `index` takes. Fused and swapped tensors are several entries. With
    `through` ours is that matrix (or row) times theirs in our layout, which cannot be written back.
    """

    theirs: str
    ours: str
    layout: Layout = "same"
    index: tuple[int, ...] = ()  # of our leading axes: (groups, blocks) or (layers,)
    their_part: Part | Picked | None = None
    our_part: Part | None = None
    through: np.ndarray | None = None

    def piece_of_theirs(self, x: np.ndarray) -> np.ndarray:
        """What of a whole torch tensor this entry is about, in our layout: a view where nothing is
        picked or multiplied."""
        if self.their_part is not None:
            x = x[_slices(self.their_part, x.ndim)]
        if self.through is not None:
            return self.through @ x.T
        if self.layout == "linear":
            return x.T
        if self.layout == "conv":
            return x.transpose(2, 3, 1, 0)
        if self.layout == "pointwise":
            return x[:, :, 0, 0].T
        return x

    def put(self, x: np.ndarray, piece: np.ndarray) -> None:
        """Write a piece in our layout to its place in a whole torch tensor."""
        assert self.through is None
        if self.layout == "conv":
            piece = piece.transpose(3, 2, 0, 1)
        elif self.layout != "same":
            piece = piece.T[:, :, None, None] if self.layout == "pointwise" else piece.T
        x[... if self.their_part is None else _slices(self.their_part, x.ndim)] = piece

    def box(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Where the piece lies in our parameter of this shape."""
        box = [slice(i, i + 1) for i in self.index]
        box += [slice(0, size) for size in shape[len(self.index) :]]
        if self.our_part is not None:
            axis = self.our_part.axis % (len(shape) - len(self.index))
            box[len(self.index) + axis] = slice(self.our_part.start, self.our_part.stop)
        return tuple(box)

    def their_least_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The smallest shape of the torch tensor that holds this piece of our `shape`."""
        piece = tuple(s.stop - s.start for s in self.box(shape))[len(self.index) :]
        if self.through is not None:
            piece = piece[-1], self.through.shape[-1]
        elif self.layout == "linear":
            piece = piece[1], piece[0]
        elif self.layout == "conv":
            piece = piece[3], piece[2], piece[0], piece[1]
        elif self.layout == "pointwise":
            piece = piece[1], piece[0], 1, 1
        if self.their_part is not None:
            piece = list(piece)
            piece[self.their_part.axis] = self.their_part.stop
        return tuple(piece)


def _slices(part: Part | Picked, axes: int) -> tuple[slice | np.ndarray, ...]:
    slices: list[slice | np.ndarray] = [slice(None)] * axes
    slices[part.axis] = part.index
    return tuple(slices)


def by_name(table: Iterable[Entry], side: Literal["ours", "theirs"]) -> dict[str, list[Entry]]:
    """The entries of each name of one side, in the table's order."""
    found: dict[str, list[Entry]] = {}
    for entry in table:
        found.setdefault(getattr(entry, side), []).append(entry)
    return found


def their_shapes(
    table: Iterable[Entry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of all torch tensors of a table, given those of our parameters."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in table:
        least = entry.their_least_shape(shapes[entry.ours])
        found[entry.theirs] = tuple(map(max, least, found.get(entry.theirs, least)))
    return found


def check_fit(
    where: Any,
    table: Sequence[Entry],
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise one ConfigError that lists every tensor that is missing, misshapen or unknown.

    `shapes` are those of our parameters; `where` names the source.
    """
    for ours, entries in by_name(table, "ours").items():
        boxes = [[s.stop - s.start for s in entry.box(shapes[ours])] for entry in entries]
        assert sum(map(np.prod, boxes)) == np.prod(shapes[ours]), f"table fills {ours} in part"
    absent = shapes.keys() - {entry.ours for entry in table}
    assert not absent, f"table lacks {sorted(absent)}"
    expected = their_shapes(table, shapes)
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    found = []
    if missing:
        found.append(f"{len(missing)} missing: {listed(missing)}")
    if misshapen:
        found.append(f"{len(misshapen)} misshapen: {listed(misshapen)}")
    if unknown:
        near = [name + suggestion(name, missing or expected) for name in unknown[:SHOWN]]
        found.append(f"{len(unknown)} unknown: {listed(near + unknown[SHOWN:])}")
    if found:
        raise ConfigError(f"{where}: tensors do not fit this model; {'; '.join(found)}")


@dataclass(frozen=True)
class Parameter:
    """One of our parameters that is read, or made, where it is indexed with slices."""

    shape: tuple[int, ...]
    dtype: np.dtype
    take: Callable[[tuple[slice, ...]], np.ndarray]
    finite: bool = False  # whether `take` refuses NaN and infinity, so that nobody else need look

    @property
    def size(self) -> int:
        """Elements in all."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.size * self.dtype.itemsize

    def astype(self, dtype: Any) -> "Parameter":
        """The same, cast where it is read."""
        return Parameter(self.shape, np.dtype(dtype), lambda region: self[region].astype(dtype))

    def __getitem__(self, region: Any) -> np.ndarray:
        """A region; `...` is all of it."""
        region = (slice(None),) * len(self.shape) if region is ... else region
        pairs = zip(region, self.shape, strict=True)
        return self.take(tuple(slice(*part.indices(size)[:2]) for part, size in pairs))


def parameters(
    table: Iterable[Entry],
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    where: Any = "weights",
) -> dict[str, Parameter]:
    """Our parameters by name, to be read from torch's tensors as `dtype`.

    Reading raises ConfigError that names `where` and the tensor for NaN, infinity, and what is too
    large for `dtype`.
    """
    entries, dtype = by_name(table, "ours"), np.dtype(dtype)

    def take(name: str):
        return lambda region: read(entries[name], tensors, shapes[name], dtype, region, where)

    return {name: Parameter(tuple(shapes[name]), dtype, take(name), finite=True) for name in shapes}


def read(
    entries: Sequence[Entry],
    tensors: Mapping[str, Any],
    shape: Sequence[int],
    dtype: Any,
    region: tuple[slice, ...],
    where: Any = "weights",
) -> np.ndarray:
    """A region of one of our parameters from torch's tensors; `entries` are all of its."""
    out = np.empty([part.stop - part.start for part in region], dtype)
    pieces = []
    for entry in entries:
        box = entry.box(shape)
        common = overlap(box, region)
        if common is not None:
            at = relative(common, region)
            pieces.append((entry.theirs, at))
            piece = entry.piece_of_theirs(np.asarray(tensors[entry.theirs]))
            piece = piece[relative(common, box)[len(entry.index) :]]
            _copy(piece[(None,) * len(entry.index)], out[at])
    if not finite(out):
        name = next(name for name, at in pieces if not finite(out[at]))
        raise ConfigError(f"{where}: {name} {_damage(np.asarray(tensors[name]), out.dtype)}")
    return out


def _damage(array: np.ndarray, dtype: np.dtype) -> str:
    """Why some number of an array is not finite as `dtype`."""
    with np.errstate(invalid="ignore"):
        array = array.astype(np.float64)
    bad = array[~np.isfinite(array)]
    if bad.size:
        return f"holds {'NaN' if np.isnan(bad[0]) else 'infinity'}: damaged weights"
    return f"holds {array.flat[np.abs(array).argmax()]:.3g}, too large for {dtype}"


def _copy(view: np.ndarray, out: np.ndarray) -> None:
    """out[...] = view, cast. XLA transposes and casts ten times as fast as NumPy does."""
    plain = view.ndim < 2 or view.dtype.itemsize > 4 or not jnp.issubdtype(out.dtype, jnp.floating)
    try:
        cpu = None if plain else jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS left no CPU
        cpu = None
    if cpu is None:
        # `read` looks for what has become infinite.
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = view
        return
    # Part by part, in memory that is used again.
    step = max(1, TILE * view.shape[-1] // view.size)
    for i in range(0, view.shape[-1], step):
        part = jax.device_put(view[..., i : i + step], cpu)
        out[..., i : i + step] = part.astype(out.dtype)


def overlap(a: Sequence[slice], b: Sequence[slice]) -> tuple[slice, ...] | None:
    """What two regions have in common; None for nothing."""
    pairs = zip(a, b, strict=True)
    common = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in pairs)
    return None if any(part.start >= part.stop for part in common) else common


def relative(inner: Sequence[slice], outer: Sequence[slice]) -> tuple[slice, ...]:
    """A region within another, counted from the start of that."""
    pairs = zip(inner, outer, strict=True)
    return tuple(slice(x.start - y.start, x.stop - y.start) for x, y in pairs)


def write(
    entries: Sequence[Entry], params: Mapping[str, Any], shape: Sequence[int], dtype: Any
) -> np.ndarray:
    """The inverse of `read`: one of torch's tensors; `entries` are all of its."""
    out = np.empty(shape, dtype)
    for entry in entries:
        ours = params[entry.ours]
        piece = np.asarray(ours[entry.box(ours.shape)])
        entry.put(out, piece.reshape(piece.shape[len(entry.index) :]))
    return out
