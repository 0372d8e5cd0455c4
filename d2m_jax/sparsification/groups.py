"""Blocks in other stacks: MoB groups for a student, and the same shape for its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from d2m_jax.config import KINDS, FluxConfig, GroupsConfig, StackConfig, check
from d2m_jax.keys import named_key
from d2m_jax.models.mob import BlockRouter
from d2m_jax.models.stack import over_axes

Shapes = Mapping[
    str, Sequence[tuple[int, int]]
]  # (groups, blocks) of the stacks, per kind of block


def shapes(config: FluxConfig) -> Shapes:
    """(groups, blocks) of every stack, per kind of block."""
    return {kind: [(s.groups, s.blocks) for s in getattr(config, kind)] for kind in KINDS}


def aligned(config: FluxConfig, shapes: Shapes) -> FluxConfig:
    """The same model's config in stacks of these (groups, blocks), all blocks active.

    ConfigError where depths differ, a router would be lost, or a stack would mix kinds of FFN.
    """
    for stack in config.stacks:
        check(not stack.mixes, f"align: expected a model whose blocks all run, found {stack}")
    stacks = {}
    for kind in KINDS:
        depth, wanted = len(_ffns(config, kind)), sum(g * b for g, b in shapes[kind])
        check(depth == wanted, f"align: the model has {depth} {kind} blocks, expected {wanted}")
        new = [StackConfig(groups, blocks, blocks) for groups, blocks in shapes[kind]]
        stacks[kind] = tuple(_with_ffns(config, kind, new, "align: (groups, blocks)"))
    return replace(config, **stacks)


def one_by_one(config: FluxConfig) -> FluxConfig:
    """The model's config with every block a group of its own. Raises what `aligned` raises."""
    stacks = {kind: [(stack.depth, 1) for stack in getattr(config, kind)] for kind in KINDS}
    return aligned(config, stacks)


def align(config: FluxConfig, params: dict, shapes: Shapes) -> tuple[FluxConfig, dict]:
    """The model in stacks of these (groups, blocks): how a teacher meets its student.

    Raises what `aligned` raises.
    """
    new = aligned(config, shapes)
    return new, _rearrange(config, params, new)


def grouped(config: FluxConfig, groups: GroupsConfig) -> FluxConfig:
    """The model's config with its blocks in MoB groups.

    ConfigError where groups do not fit the depth or would mix kinds of FFN, and for a model that
    leaves out blocks already: its routers would be lost.
    """
    check(
        not any(stack.mixes for stack in config.stacks),
        "GroupsConfig: the model's blocks are in groups already, of which it leaves some out;"
        " expected groups in one stage alone",
    )
    stacks = {}
    for kind in KINDS:
        keep, last, blocks, active = (
            getattr(groups, name)
            for name in (f"keep_{kind}", f"keep_last_{kind}", f"{kind}_blocks", f"{kind}_active")
        )
        depth = len(_ffns(config, kind))
        check(
            0 <= keep <= depth,
            f"GroupsConfig.keep_{kind} = {keep}: expected 0 to {depth}, the model's {kind} blocks",
        )
        check(
            0 <= last <= depth - keep,
            f"GroupsConfig.keep_last_{kind} = {last}: expected 0 to {depth - keep}, the {kind}"
            f" blocks that keep_{kind} = {keep} leaves of {depth}",
        )
        inside = depth - keep - last
        check(
            blocks >= 1 and inside % blocks == 0,
            f"GroupsConfig.{kind}_blocks = {blocks}: expected a divisor of {inside}, the {kind}"
            f" blocks that keep_{kind} = {keep} and keep_last_{kind} = {last} leave of {depth}",
        )
        check(
            1 <= active <= blocks,
            f"GroupsConfig.{kind}_active = {active}: expected 1 to {kind}_blocks = {blocks}",
        )
        outside, group = StackConfig(1), StackConfig(1, blocks, active)
        single_groups = [outside] * keep + [group] * (inside // blocks) + [outside] * last
        single_groups = _with_ffns(config, kind, single_groups, f"GroupsConfig.{kind}_blocks")
        stacks[kind] = tuple(
            replace(stack, groups=len(list(equal))) for stack, equal in groupby(single_groups)
        )
    return replace(config, mob_choice=groups.choice, **stacks)


def regroup(
    config: FluxConfig, params: dict, groups: GroupsConfig, seed: int
) -> tuple[FluxConfig, dict]:
    """The model with its blocks in MoB groups: all parameters of blocks stay, routers are fresh.

    Raises what `grouped` raises.
    """
    new = grouped(config, groups)
    params = _rearrange(config, params, new)
    for kind in KINDS:
        for i, stack in enumerate(getattr(new, kind)):
            if stack.mixes:
                params[kind][i]["router"] = _router(new, stack, f"{kind}.{i}", seed)
    return new, params


def _ffns(config: FluxConfig, kind: str) -> list[tuple[str, float]]:
    """Kind and expansion of every block's FFN."""
    return [(s.ffn, s.mlp_ratio) for s in getattr(config, kind) for _ in range(s.depth)]


def _with_ffns(
    config: FluxConfig, kind: str, stacks: list[StackConfig], where: str
) -> list[StackConfig]:
    """The stacks with the FFNs that the model has at their places."""
    found, result = _ffns(config, kind), []
    ends = accumulate(stack.depth for stack in stacks)
    for stack, end in zip(stacks, ends, strict=True):
        mine = set(found[end - stack.depth : end])
        check(
            len(mine) == 1,
            f"{where}: {kind} blocks {end - stack.depth} to {end - 1} would be together and have"
            f" different FFNs, {sorted(mine)} (kind, mlp_ratio); expected equal ones",
        )
        ffn, mlp_ratio = mine.pop()
        result.append(replace(stack, ffn=ffn, mlp_ratio=mlp_ratio))
    return result


def _rearrange(config: FluxConfig, params: dict, new: FluxConfig) -> dict:
    """The parameters with their blocks, in their order, in the new config's stacks; no routers."""
    params = dict(params)
    for kind in KINDS:
        old = [(s, params[kind][i]["block"]) for i, s in enumerate(getattr(config, kind))]
        params[kind] = {
            found.number: {"block": _blocks(old, found.stack, found.first)}
            for found in new.named_stacks
            if found.kind == kind
        }
    return params


def _blocks(old: list[tuple[StackConfig, dict]], stack: StackConfig, start: int) -> dict:
    """The parameters of a stack that begins with block `start` of the old ones.

    A stack that stays as it was shares its arrays.
    """
    parts, begin = [], 0
    for source, block in old:
        if begin == start and (source.groups, source.blocks) == (stack.groups, stack.blocks):
            return block
        low, high = max(start - begin, 0), min(start + stack.depth - begin, source.depth)
        if low < high:
            parts.append(jax.tree.map(lambda a, i=low, j=high: _flat(a)[i:j], block))
        begin += source.depth

    def join(*parts: Array | np.ndarray):
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return whole.reshape(stack.groups, stack.blocks, *whole.shape[1:])

    return jax.tree.map(join, *parts)


def _flat(a: Array | np.ndarray):
    return a.reshape(-1, *a.shape[2:])


def _router(config: FluxConfig, stack: StackConfig, name: str, seed: int) -> dict:
    key = named_key(seed, f"{name}.router")

    def create(rngs: nnx.Rngs):
        return BlockRouter(config.hidden_size, stack.blocks, config.mob_alpha, rngs=rngs)

    @jax.jit
    def initialise(key: Array) -> dict:
        return nnx.to_pure_dict(nnx.state(over_axes(create, (stack.groups,), nnx.Rngs(key))))

    return initialise(key)
