"""Depth pruning, the rival of the Mixture of Blocks: some blocks stay, the others are gone.

Which stay: "change", those that change their streams most, the mean square of what a block adds to
them (as FLUX.1-Lite was made); "cost", those without which the velocity changes most, each left out
alone (left_out.py); "even", the first of every stretch of about equal length, nothing
measured (as BK-SDM chooses, and FLUX-Mini pairs blocks). A block that stays stands for itself and
for those behind it that are gone: features are compared at the end of that stretch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d2m_jax.config import KINDS, FluxConfig, SparsifyConfig, StackConfig, check
from d2m_jax.keys import named_key
from d2m_jax.models.cut import BLOCKS, Cut, blocks_left
from d2m_jax.models.flux import join, model_of
from d2m_jax.models.reports import Context, Streams
from d2m_jax.sharding import whole
from d2m_jax.sparsification.groups import align, aligned, one_by_one, shapes
from d2m_jax.sparsification.importance import Noisy
from d2m_jax.sparsification.left_out import leave_out

NONE: Cut = MappingProxyType({})
Kept = Mapping[str, np.ndarray]  # by kind, the numbers of the blocks that stay, in their order


def _wanted(config: FluxConfig, sparsify: SparsifyConfig) -> dict[str, int]:
    """By kind, how many blocks stay. ConfigError for more than there are."""
    result = {}
    for kind in KINDS:
        there, left = config.depth(kind), getattr(sparsify, f"depth_{kind}")
        check(
            left is None or 1 <= left <= there,
            f"SparsifyConfig.depth_{kind} = {left}: expected 1 to {there}, the teacher's {kind}"
            " blocks, or None",
        )
        result[kind] = there if left is None else left
    return result


def even(there: int, left: int) -> Int[np.ndarray, " k"]:
    """The first blocks of `left` stretches of about equal length."""
    return np.arange(left) * there // max(1, left)


def shallower(config: FluxConfig, sparsify: SparsifyConfig) -> FluxConfig:
    """The config with as many blocks as stay, those of "even": which they are tells calibration.
    ConfigError for more than there are."""
    left = _wanted(aligned(config, shapes(config)), sparsify)
    return _without(config, {kind: even(config.depth(kind), left[kind]) for kind in KINDS})


def _without(config: FluxConfig, kept: Kept) -> FluxConfig:
    stacks = {kind: tuple(stack for stack, _ in _parts(config, kept, kind)) for kind in KINDS}
    return replace(config, **stacks)


def without_blocks(
    config: FluxConfig,
    params: dict,
    sparsify: SparsifyConfig,
    batches: Iterable[dict],
    noisy: Noisy,
    seed: int,
    micro_batch: int | None = None,
) -> tuple[FluxConfig, dict, dict[str, np.ndarray]]:
    """The model without the blocks that `sparsify` says are gone, and their order by cut's names:
    those that stay, then the others; {} where all stay. Measures on the first `sparsify.batches`
    of the batches, if it measures, of `micro_batch` samples at a time ("cost" alone)."""
    left = _wanted(config, sparsify)
    if left == {kind: config.depth(kind) for kind in KINDS}:
        return config, params, {}
    kept = {kind: even(config.depth(kind), left[kind]) for kind in KINDS}
    if sparsify.depth_choice != "even":
        key, count = named_key(seed, "depth"), sparsify.batches
        if sparsify.depth_choice == "change":
            found = changes(config, params, islice(batches, count), noisy, key)
        else:
            found = leave_out(
                config, params, batches, noisy, key, count=count, micro_batch=micro_batch
            ).means
        best = {kind: np.argsort(-found[kind], kind="stable")[: left[kind]] for kind in KINDS}
        kept = {kind: np.sort(blocks) for kind, blocks in best.items()}
    params, order = dict(params), {}
    for kind in KINDS:
        parts = _parts(config, kept, kind)
        params[kind] = {
            i: {"block": jax.tree.map(partial(_taken, blocks), params[kind][n]["block"])}
            for i, (n, blocks) in enumerate(of for _, of in parts)
        }
        gone = np.setdiff1d(np.arange(config.depth(kind)), kept[kind])
        order[BLOCKS[kind]] = np.concatenate([kept[kind], gone]).astype(np.int32)
    return _without(config, kept), params, order


def _parts(
    config: FluxConfig, kept: Kept, kind: str
) -> list[tuple[StackConfig, tuple[int, np.ndarray]]]:
    """Of every stack of which blocks stay: what it becomes, its number, and which blocks of it."""
    parts = []
    for _, n, first, stack in (found for found in config.named_stacks if found.kind == kind):
        mine = kept[kind][(kept[kind] >= first) & (kept[kind] < first + stack.depth)] - first
        if len(mine):
            parts.append((replace(stack, groups=len(mine), blocks=1, active=1), (n, mine)))
    return parts


def _taken(blocks: np.ndarray, a: Array | np.ndarray) -> Array | np.ndarray:
    if a.shape[:2] == (len(blocks), 1):
        return a  # all stay: one array for both models
    return a.reshape(-1, *a.shape[2:])[blocks][:, None]


def changes(
    config: FluxConfig, params: dict, batches: Iterable[dict], noisy: Noisy, key: Array
) -> dict[str, Float[np.ndarray, " n"]]:
    """By kind, the mean square of what every block adds to its streams, in float32, over the
    batches at random times. ConfigError for no batch."""
    apart = shapes(one_by_one(config))
    config, params = align(config, jax.tree.map(jnp.asarray, params), apart)
    parts = []
    for i, batch in enumerate(batches):
        mine = jax.random.fold_in(key, i)
        with jax.default_matmul_precision("float32"):
            found = _changes(params, batch, mine, config=config, noisy=noisy)
        parts.append(jax.tree.map(whole, found))
    check(len(parts) > 0, "calibration: expected at least one batch, found none")
    return jax.tree.map(lambda *a: np.mean(a, axis=0), *parts)


@partial(jax.jit, static_argnames=("config", "noisy"))
def _changes(
    params: dict, batch: dict, key: Array, *, config: FluxConfig, noisy: Noisy
) -> dict[str, Float[Array, " n"]]:
    inputs, _ = noisy(batch, key)
    model = model_of(config, params, jnp.float32)
    streams, context = model.embed(*inputs)
    found = {}
    for kind in KINDS:
        streams, of_kind = join(streams) if kind == "single" else streams, [jnp.zeros(0)]
        for stack in getattr(model, kind):
            graphs, groups = stack.split()
            body = partial(_change, partial(stack.run_group, graphs), context)
            streams, squares = jax.lax.scan(body, streams, groups)
            of_kind.append(squares)
        found[kind] = jnp.concatenate(of_kind)
    return found


def _change(
    run: Callable, context: Context, old: Streams, params: tuple
) -> tuple[Streams, Float[Array, ""]]:
    new, _ = run(params, old, context)
    both = (jnp.concatenate(streams, axis=1) for streams in (new, old))
    return new, jnp.square(jnp.subtract(*both)).mean()


def meeting(
    teacher: FluxConfig, student: FluxConfig, cut: Cut = NONE, teachers_cut: Cut = NONE
) -> FluxConfig:
    """The teacher's config in the stacks in which lockstep meets the student: of every group of the
    student all blocks that it stands for, equal ones in a stack.

    The cuts say which blocks of the dense model each of them has; without them a student of fewer
    blocks is taken to have kept evenly. Raises what `aligned` raises.
    """
    met = {}
    for kind in KINDS:
        there, left = teacher.depth(kind), student.depth(kind)
        check(
            left <= there,
            f"lockstep: the student has {left} {kind} blocks, expected at most {there}, the"
            " teacher's",
        )
        kept = even(there, left)
        if left < there and BLOCKS[kind] in cut:
            of_teacher = blocks_left(teacher, teachers_cut, kind)
            mine = blocks_left(student, cut, kind)
            kept = np.array([of_teacher.index(block) for block in mine])
        ends = np.append(kept[1:], there)  # of what each block stands for, the first from 0
        met[kind], last, block = [], 0, 0
        for stack in getattr(student, kind):
            lengths = []
            for _ in range(stack.groups):
                block += stack.blocks
                lengths.append(int(ends[block - 1]) - last)
                last = int(ends[block - 1])
            met[kind] += [(len(list(same)), length) for length, same in groupby(lengths)]
    return aligned(teacher, met)
