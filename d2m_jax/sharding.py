"""The device mesh, and where every array lives on it: one table of logical axes.

`data` and `fsdp` cut the batch; `fsdp` cuts parameters too, which are gathered block by block.
`expert` cuts the batch like both, and the normal experts; `tensor` cuts heads and FFNs.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array

from d2m_jax.config import ConfigError, FluxConfig, MeshConfig, check

Tree = TypeVar("Tree")
AXES = ("data", "fsdp", "expert", "tensor")
Axes = tuple[str | None, ...]  # logical axes, of RULES

# Logical axis → the mesh axes that cut it.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    # Rows of matrices, where they are stored.
    "rows": ("fsdp", "expert"),
    "expert_rows": ("fsdp",),
    # Rows of matrices that `tensor` cuts too, in storage and in use. (Of queries, keys and values,
    # side by side in one matrix, no cut of columns is one by heads: layers.heads exchanges rows.)
    "inner_rows": ("tensor", "fsdp", "expert"),
    "expert_inner_rows": ("tensor", "fsdp"),
    "expert": ("expert",),
    "inner": ("tensor",),  # heads, neurons of an FFN, outputs of a modulation
}
# Logical axes of a stored parameter → those that it has while a block uses it: what only storage
# cuts (fsdp, expert) is gathered, the cut by `tensor` stays. OWN: the same inside `on_own_part`,
# where normal experts stay cut by `expert`.
USED: dict[str | None, str | None] = {"rows": None, "inner_rows": "inner"}
OWN = USED | {"expert_rows": None, "expert_inner_rows": "inner"}
BY_NAME = "by name"  # in the place of logical axes: parameters, every device wants all of them

# Logical axes of the last dimensions of parameters, by the end of their names.
PARAMETERS: dict[str, Axes] = {
    "qkv.kernel": ("inner_rows", None),
    "proj.kernel": ("inner_rows", None),
    "attn_out.kernel": ("inner_rows", None),
    "in_layer.kernel": ("rows", "inner"),
    "out_layer.kernel": ("inner_rows", None),
    "experts.in_kernel": ("expert", "expert_rows", "inner"),
    "experts.in_bias": ("expert", "inner"),
    "experts.out_kernel": ("expert", "expert_inner_rows", None),
    "lin.kernel": ("rows", "inner"),
    "modulation_basis.kernel": ("rows", None),
    "adaLN_modulation.kernel": ("rows", None),
    "img_in.kernel": ("rows", None),
    "txt_in.kernel": ("rows", None),
    "linear.kernel": ("rows", None),
}
# What every device has whole: biases, scales of norms and of normal experts, gates, block routers.
WHOLE = ("bias", "scale", "gate.kernel", "gate_cond.kernel", "features.kernel", "vec.kernel")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over this job's devices (all, or these); one axis of -1 takes what the others leave.

    Raises ConfigError where the sizes are larger than, or do not divide, the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    devices = jax.devices() if devices is None else devices
    found = len(devices)
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(
                f"MeshConfig.{axis} = {size}: expected at least 1, or -1 for the rest"
            )
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(
            f"MeshConfig.{free[1]} = -1: expected one axis of -1, found {', '.join(free)}"
        )
    used = math.prod(size for size in sizes.values() if size != -1)
    asked = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if size != 1)
    if used > found:
        each = -(-used // jax.process_count())
        cpu = f"; on a CPU, JAX_NUM_CPU_DEVICES={each} in the environment makes so many"
        hint = cpu if devices[0].platform == "cpu" else ""
        raise ConfigError(f"MeshConfig ({asked}): needs {used} devices, found {found}{hint}")
    if found % used:
        raise ConfigError(f"MeshConfig ({asked}): {used} devices do not divide the {found} found")
    if free:
        sizes[free[0]] = found // used
    taken = devices[: math.prod(sizes.values())]
    _check_nobody_is_left(f"MeshConfig ({asked})", devices, len(taken))
    grid = _grid(tuple(sizes.values()), taken)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_nobody_is_left(mesh: str, devices: Sequence[Any], taken: int) -> None:
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[:taken]}
    if idle:
        raise ConfigError(
            f"{mesh}: takes {taken} of {len(devices)} devices and leaves process {min(idle)}"
            " without any; expected all, or an axis of -1"
        )


def _grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the order in which neighbours on an axis of the mesh are near each other.

    Several slices of TPUs, which only a slow network joins, lie along `data`.
    """
    # A mesh axis may take a part of an axis of the torus: 64 of 16 × 16 chips.
    options = {"allow_split_physical_axes": True}
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, **options)
    data, *rest = shape
    if data % slices:
        raise ConfigError(f"MeshConfig.data = {data}: expected a multiple of the {slices} slices")
    within, across = (data // slices, *rest), (slices, *[1] * len(rest))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, **options)


def partition(mesh: Mesh | AbstractMesh, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    """How an array of this shape is cut; `axes` are those of its last dimensions (of RULES, or
    None). What a dimension cannot be divided by does not cut it."""
    return PartitionSpec(*[names or None for names in _cuts(mesh, axes, shape)])


def _cuts(mesh: Mesh | AbstractMesh, axes: Axes, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """The mesh axes that cut each dimension."""
    parts: list[tuple[str, ...]] = [()] * (len(shape) - len(axes))
    for size, axis in zip(shape[len(parts) :], axes, strict=True):
        cut = [name for name in RULES.get(axis, ()) if mesh.shape[name] > 1]
        while size % math.prod(mesh.shape[name] for name in cut):
            cut.pop()
        parts.append(tuple(cut))
    return parts


def axes_of(name: str) -> Axes:
    """Logical axes of the last dimensions of a parameter, or of what an optimizer keeps for it.

    Raises ValueError for an unknown one of a transformer's blocks or routers, which would else lie
    whole on every device in silence.
    """
    end = ".".join(name.split(".")[-2:])
    if end in PARAMETERS:
        return PARAMETERS[end]
    if (".block." in name or ".router." in name) and not end.endswith(WHOLE):
        raise ValueError(f"{name}: expected in PARAMETERS or WHOLE of sharding.py")
    return ()


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a transformer's parameter of this dotted name is stored."""
    return NamedSharding(mesh, partition(mesh, axes_of(name), shape))


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """The same for a tree of arrays, concrete or abstract: parameters, optimizer states."""

    def place(path: KeyPath, leaf: Array | jax.ShapeDtypeStruct):
        return parameter_sharding(mesh, _name(path), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def _name(path: KeyPath) -> str:
    # A state of Flax ends every name with that of the variable's field, and a quantised kernel
    # (kernels/quantized.py) has a field of its own shape; its scales are whole on every device.
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".qvalue").removesuffix(".value")


def gathered(params: Any, dtype: Any) -> Any:
    """A block's parameters for the time of its use, where they are cut over a mesh: in the dtype
    that they are used in, whole but for the expert and the tensor axis (FSDP). Normal experts stay
    as they are stored, for `on_own_part`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return params

    def gather(path: KeyPath, leaf: Array):
        axes = axes_of(_name(path))
        used = tuple(USED.get(axis, axis) for axis in axes)
        stored, used = (partition(mesh, kind, leaf.shape) for kind in (axes, used))
        return leaf if stored == used else _gather(leaf, stored, used, _sent(leaf, dtype))

    return jax.tree_util.tree_map_with_path(gather, params)


def sent(params: Any, dtype: Any) -> Any:
    """Parameters that are cut over a mesh in the dtype that they are used in, for `on_own_part` to
    gather."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return params

    def cast(path: KeyPath, leaf: Array):
        whole = not any(partition(mesh, axes_of(_name(path)), leaf.shape))
        return leaf if whole else leaf.astype(_sent(leaf, dtype))

    return jax.tree_util.tree_map_with_path(cast, params)


def _sent(leaf: Array, dtype: Any) -> Any:
    # What is quantised is sent as it is.
    return leaf.dtype if leaf.dtype.itemsize == 1 else dtype


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(a: Array, stored: PartitionSpec, used: PartitionSpec, dtype: DTypeLike):
    return jax.lax.with_sharding_constraint(a.astype(dtype), used)


def _gather_forward(a: Array, stored: PartitionSpec, used: PartitionSpec, dtype: DTypeLike):
    return _gather(a, stored, used, dtype), jnp.zeros((), a.dtype)


def _gather_backward(
    stored: PartitionSpec, used: PartitionSpec, dtype: DTypeLike, like: Array, gradient: Array
):
    # Cut at once, so that devices sum a part of it each instead of all of it (reduce-scatter).
    return (jax.lax.with_sharding_constraint(gradient, stored).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def constrain(x: Array, *axes: str | None) -> Array:
    """Cut an activation along its logical axes; without axes it is whole on every device; without
    a mesh, x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, axes, x.shape))


def check_mesh(mesh: Mesh, config: FluxConfig) -> None:
    """Raise ConfigError where the mesh does not divide the model's experts, heads and FFNs."""
    sizes = [("tensor", "FluxConfig.num_heads", config.num_heads)]
    for stack in config.stacks:
        if stack.ffn == "moe":
            sizes.append(("expert", "MoEConfig.experts", config.moe.experts))
            sizes.append(("tensor", "the shared expert's width", config.shared_width(stack)))
            sizes.append(("tensor", "a normal expert's width", config.expert_width(stack)))
        else:
            sizes.append(("tensor", "the FFN's width", config.ffn_width(stack)))
    for axis, name, size in sizes:
        parts = mesh.shape[axis]
        check(
            size % parts == 0, f"MeshConfig.{axis} = {parts}: expected a divisor of {name}, {size}"
        )


def local_mesh() -> Mesh:
    """The mesh of this process's devices alone, each with samples of its own."""
    return make_mesh(MeshConfig(), jax.local_devices())


def on_own_part(
    function: Callable, arguments: tuple, axes: tuple[Axes | str, ...], out: Axes
) -> Any:
    """function(*arguments), every device on its own parts alone.

    `axes`, one per argument, and `out` are the logical axes of the first dimensions of all its
    leaves. Weights that are stored in more parts than a device needs (OWN; all, of an argument
    BY_NAME) are gathered inside: so the sum of their gradients is cut at once (reduce-scatter).

    Under `jax.set_mesh` the compiler would else sort, gather and loop over the tokens of
    all devices on each of them, and it cannot divide a kernel. Without a mesh, inside another such
    call, or where something cannot be cut, it is a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return function(*arguments)
    leaves, tree = jax.tree_util.tree_flatten_with_path(arguments)
    specs, gathers = [], []
    for (argument, *rest), leaf in leaves:
        kind, path = axes[argument.idx], tuple(rest)
        if kind == BY_NAME:
            stored, used = axes_of(_name(path)), ()
        else:
            # The scales of a quantised kernel serve all its rows: every device has them whole.
            scales = jax.tree_util.keystr(path) == ".scale"
            sizes = itertools.zip_longest(leaf.shape, kind[: leaf.ndim])
            stored = tuple(None if scales and size == 1 else axis for size, axis in sizes)
            used = tuple(OWN.get(axis, axis) for axis in stored)
            for size, axis in zip(leaf.shape, used, strict=True):
                if size % math.prod(mesh.shape[name] for name in RULES.get(axis, ())):
                    return function(*arguments)
        specs.append(partition(mesh, stored, leaf.shape))
        both = zip(_cuts(mesh, stored, leaf.shape), _cuts(mesh, used, leaf.shape), strict=True)
        gathers.append([cut[len(kept) :] for cut, kept in both])

    def on_own(*own: Array):
        return function(*jax.tree.unflatten(tree, map(_gather_inside, own, gathers)))

    # Kernels do not say over which axes their results vary, hence no check.
    result = PartitionSpec(*[RULES.get(axis) for axis in out])
    mapped = jax.shard_map(on_own, in_specs=tuple(specs), out_specs=result, check_vma=False)
    return mapped(*(leaf for _, leaf in leaves))


def _gather_inside(own: Array, cuts: list[tuple[str, ...]]) -> Array:
    for dimension, names in enumerate(cuts):
        if names:
            own = jax.lax.all_gather(own, names, axis=dimension, tiled=True)
    return own


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put(value: Any, sharding: NamedSharding) -> Array:
    """An array there; one of the host must be the same in all processes."""
    if sharding.is_fully_addressable or (isinstance(value, jax.Array) and value.committed):
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def put_whole(mesh: Mesh, value: Any) -> Array:
    """An array that every device is to hold whole, there; on the host the same in all processes."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(value), replicated(mesh))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    return put(value, replicated(mesh))


def put_parameters(mesh: Mesh, tree: Tree) -> Tree:
    """A tree of parameters where `parameter_sharding` says; what is one array stays one."""
    done: dict[int, Array] = {}

    def place(path: KeyPath, leaf: Array | np.ndarray):
        if id(leaf) not in done:
            sharding = parameter_sharding(mesh, _name(path), np.shape(leaf))
            done[id(leaf)] = put(leaf, sharding)
        return done[id(leaf)]

    return jax.tree_util.tree_map_with_path(place, tree)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Host arrays with the batch as first axis, cut over the mesh; of the whole batch, each
    process has the rows that `own_rows` says."""
    shards, sharding = batch_shards(mesh), batch_sharding(mesh)
    mine = own_rows(mesh, shards)

    def place(leaf: np.ndarray):
        rows = len(leaf) // (mine.stop - mine.start)  # of a shard

        def part(index: tuple[slice, ...] | None):
            start, stop, _ = (index[0] if index else slice(None)).indices(rows * shards)
            return leaf[start - rows * mine.start : stop - rows * mine.start]

        shape = rows * shards, *leaf.shape[1:]
        return jax.make_array_from_callback(shape, sharding, part)

    with jax.transfer_guard("allow"):  # a transfer is what is asked for
        return jax.tree.map(place, batch)


def own_rows(mesh: Mesh, size: int) -> slice:
    """The rows of a batch of `size` that this process's devices need."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    rows = [part[0].indices(size) for part in parts if part]
    return slice(min(start for start, _, _ in rows), max(stop for _, stop, _ in rows))


def whole(array: Array | np.ndarray) -> np.ndarray:
    """All of an array on the host, in every process."""
    place = array.sharding if isinstance(array, jax.Array) else None
    if isinstance(place, NamedSharding) and not place.is_fully_addressable:
        array = jax.jit(lambda a: a, out_shardings=replicated(place.mesh))(array)
    return np.asarray(array)


def in_parts(batch: Tree, parts: int) -> Tree:
    """Micro-batches of a batch, one after the other on a new first axis. Rows i, i + parts, … form
    one, so that every device keeps its own rows."""
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)


def from_parts(parts: Tree) -> Tree:
    """What was found of the micro-batches of `in_parts`, as of the whole batch in its order."""
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), parts)


def over_all_devices(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a frozen array is stored: cut over all devices, along the last axis they divide."""
    for axis in reversed(range(len(shape))):
        if mesh.size > 1 and shape[axis] % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))
    return replicated(mesh)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts into which a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])
