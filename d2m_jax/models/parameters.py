"""A model's parameters as a pure dict, and the model around such a dict: for jit, Orbax, optax."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array

Model = TypeVar("Model", bound=nnx.Module)


@partial(jax.jit, static_argnums=(0, 1))
def _initialise(kind: type, config: Any, key: Array) -> dict:
    # Made pure in here: it leaves cycles, which would hold the arrays until they are looked for.
    return nnx.to_pure_dict(nnx.split(kind(config, rngs=nnx.Rngs(key)))[1])


def initialise(kind: type, config: Any, seed: int) -> dict:
    """Fresh parameters of kind(config, rngs=…) as a pure dict, made in one compiled call."""
    return _initialise(kind, config, jax.random.key(seed))


def abstract(kind: type, config: Any) -> dict:
    """Shapes and types of what `initialise` gives, without computing any."""
    return nnx.to_pure_dict(nnx.from_flat_state(_skeleton(kind, config, jnp.dtype(jnp.float32))[1]))


def model_of(
    kind: Callable[..., Model], config: Any, params: dict, dtype: DTypeLike = jnp.float32
) -> Model:
    """The module with these parameters; `dtype` is that of activations."""
    graph, state = _skeleton(kind, config, jnp.dtype(dtype))
    found = [(path, variable.replace(_at(params, path))) for path, variable in state]
    given = jax.tree.leaves(params, is_leaf=lambda part: not isinstance(part, dict))
    if len(found) != len(given):
        raise ValueError(f"{len(given)} parameters, expected {len(found)}")
    # Flat: of a nested state nnx.merge makes a flat one, and leaves cycles behind, which would hold
    # the parameters until they are looked for.
    return nnx.merge(graph, nnx.FlatState(found, sort=False))


def _at(params: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        params = params[name if name in params else str(name)]
    return params


@functools.lru_cache(64)
def _skeleton(kind: Callable[..., nnx.Module], config: Any, dtype: jnp.dtype) -> tuple[Any, Any]:
    """The module's program, and the shapes of its parameters: once, for it takes longer than all
    else that model_of does."""
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(model)
    return graph, nnx.to_flat_state(state)


def unstacked(params: dict, release: bool = False) -> dict:
    """A Flux's parameters with every block's arrays alone: leaves of blocks become lists over
    groups of lists over blocks. With `release` each array given is deleted once it is copied.

    A program over them has no loop over blocks (see `scan`). On a GPU such a loop copies each
    block's weights out of the stack before it uses them: as much traffic again as twice the model,
    per step. It takes longer to compile.
    """

    def replace(path: KeyPath, a: Array):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if ".block." not in name:
            return a
        parts = _split(a)
        if release:
            a.delete()
        return parts

    return jax.tree_util.tree_map_with_path(replace, params)


def stacked(params: dict) -> dict:
    """What `unstacked` took apart, in stacks again; what is in stacks stays the same arrays."""

    def join(leaf: Array | list):
        return jnp.stack([jnp.stack(group) for group in leaf]) if _is_list(leaf) else leaf

    return jax.tree.map(join, params, is_leaf=_is_list)


@jax.jit
def _split(a: Array):
    return [list(group) for group in a]


def is_unstacked(tree: Any) -> bool:
    """Whether the leaves of a stack are lists."""
    return bool(_lists(tree))


def part(tree: Any, i: int) -> Any:
    """Element i of each leaf of a stack, be it an array or a list."""
    return jax.tree.map(lambda a: a[i], tree, is_leaf=_is_list)


def scan(body: Callable, carry: Any, stack: Any) -> tuple[Any, Any]:
    """jax.lax.scan; over leaves that are lists the loop is written out."""
    lists = _lists(stack)
    if not lists:
        return jax.lax.scan(body, carry, stack)
    results = []
    for i in range(len(lists[0])):
        carry, result = body(carry, part(stack, i))
        results.append(result)
    return carry, jax.tree.map(lambda *a: jnp.stack(a), *results)


def _lists(tree: Any) -> list[list]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_list) if _is_list(leaf)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
