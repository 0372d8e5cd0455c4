"""How large a Flux is and how sparse, from its config and the shapes of its parameters."""

from collections import Counter
from fractions import Fraction
from typing import Any

import jax
from jax.core import Tracer

from d2m_jax.config import KINDS, FluxConfig, StackConfig
from d2m_jax.kernels.quantized import QArray


def activated_share(config: FluxConfig, names: list) -> Fraction:
    """The share of a parameter, by the keys that lead to it, that one token of one sample meets."""
    if names[0] not in KINDS or names[2] == "router":
        return Fraction(1)
    stack = getattr(config, names[0])[names[1]]
    share = Fraction(stack.active, stack.blocks)
    return share * Fraction(config.moe.top_k, config.moe.experts) if "experts" in names else share


def amount(value: float, giga: str = "B") -> str:
    """1234567890 as 1.235 B."""
    for unit, size in (("T", 1e12), (giga, 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return str(value)


def summary(config: FluxConfig, params: Any) -> str:
    """Size, sparsity, types and devices in three lines. `params` are arrays, concrete or not, as
    they are stored: also quantised, or each block's alone. None is read or moved."""
    total, activated, stored, devices = 0, Fraction(0), Counter(), set()
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda a: isinstance(a, QArray))
    for path, leaf in leaves:
        array = leaf.qvalue if isinstance(leaf, QArray) else leaf
        total += array.size
        activated += array.size * activated_share(config, [getattr(k, "key", None) for k in path])
        stored[array.dtype.name] += array.size
        if isinstance(array, jax.Array) and not isinstance(array, Tracer):
            devices |= array.sharding.device_set
    less = f", {amount(int(activated))} activated per token" if activated < total else ""
    types = " and ".join(name for name, _ in stored.most_common())
    return (
        f"{amount(total)} parameters{less}\n"
        f"  double blocks: {_stacks(config.double)}; single blocks: {_stacks(config.single)}"
        f"{_experts(config)}\n"
        f"  stored in {types}, {_place(devices)}"
    )


def _stacks(stacks: tuple[StackConfig, ...]) -> str:
    def of(stack: StackConfig) -> str:
        kind = "MoE" if stack.ffn == "moe" else "dense"
        if not stack.mixes:
            return f"{stack.depth} {kind}"
        return f"{stack.active} of {stack.blocks} {kind} in each of {stack.groups} groups"

    return ", ".join(map(of, stacks))


def _experts(config: FluxConfig) -> str:
    if all(stack.ffn != "moe" for stack in config.stacks):
        return ""
    return f"; MoE: a shared expert and {config.moe.top_k} of {config.moe.experts} normal ones"


def _place(devices: set[jax.Device]) -> str:
    if not devices:
        return "shapes alone"
    kinds = sorted({device.device_kind for device in devices})
    if len(devices) > 1:
        return f"on {len(devices)} × {' and '.join(kinds)}"
    (device,) = devices
    return f"on {device.platform}:{device.id}"
