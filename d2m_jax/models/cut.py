"""Where a student's FFNs and modulations lie in the dense model that it was cut from.

A Cut holds, by name, for every FFN that was cut ("double.3.img_mlp", blocks counted through all
stacks) the order of the dense model's hidden neurons, int32 [its width]: of an MoE first those of
the shared expert, then those of every normal one; of a pruned FFN those that are left. Then the
others, of an MoE where its teacher was pruned. Under BLOCKS, by kind, a model that lost blocks has
the order of the dense model's: those that are left, then the others. MODULATION, float32
[rank + 1, D], is Q and below it what was lost of the mean: a factor is Q W and its bias b + rest ·
W (sparsification/modulation.py). It stays true in training, which moves no neuron, and whatever
groups blocks are in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from d2m_jax.config import KINDS, FluxConfig, StackConfig, check
from d2m_jax.models.blocks import FFNS

Cut = Mapping[str, np.ndarray]
MODULATION = "modulation"
BLOCKS = {kind: f"{kind}.blocks" for kind in KINDS}


def ffns(config: FluxConfig) -> Iterator[tuple[str, StackConfig]]:
    """The name of every FFN, and the stack that it is in."""
    for kind in KINDS:
        block = 0
        for stack in getattr(config, kind):
            for _ in range(stack.depth):
                for name in FFNS[kind]:
                    yield f"{kind}.{block}.{name}", stack
                block += 1


def check_cut(where: Any, config: FluxConfig, cut: Cut) -> None:
    """Raise ConfigError for a cut that is none of this model's."""
    mine, dim = dict(ffns(config)), config.hidden_size
    for name, array in cut.items():
        if name == MODULATION:
            expected = (1 + (config.modulation_rank or 0), dim)
            check(
                array.shape == expected,
                f"{where}: {name} is {list(array.shape)}, expected {list(expected)}",
            )
            continue
        if name in BLOCKS.values():
            kind, whole = name.split(".")[0], array.size
            fits = _is_order(array) and whole >= config.depth(kind)
            check(fits, f"{where}: {name} is no order of blocks of which this model has some")
            continue
        check(name in mine, f"{where}: {name}, expected names of this model's FFNs")
        whole, width = array.size, config.ffn_width(mine[name])
        check(
            _is_order(array) and whole >= width,
            f"{where}: {name} is no order of the neurons of an FFN that {width} of are left",
        )


def _is_order(array: np.ndarray) -> bool:
    return array.ndim == 1 and np.array_equal(np.sort(array), np.arange(array.size))


def blocks_left(config: FluxConfig, cut: Cut, kind: str) -> list[int]:
    """The number that every block of a kind had in the dense model."""
    count = config.depth(kind)
    return cut.get(BLOCKS[kind], np.arange(count))[:count].tolist()


def composed(first: Cut, then: Cut, config: FluxConfig) -> dict[str, np.ndarray]:
    """The cut of a student with this config whose teacher, by `first`, was cut itself: pruned, or
    of low rank. `then` is the student's, from its teacher."""
    whole = (MODULATION, *BLOCKS.values())
    result = {name: first[name] for name in whole if name in first}
    for kind in KINDS:
        for now, before in enumerate(blocks_left(config, then, kind)):
            for name in FFNS[kind]:
                order = first.get(f"{kind}.{before}.{name}")
                if order is not None:
                    result[f"{kind}.{now}.{name}"] = order
    for name, order in then.items():
        before = result.get(name)
        if before is not None:
            order = np.concatenate([before[: order.size][order], before[order.size :]])
        result[name] = order
    return result


def dense_config(config: FluxConfig, cut: Cut) -> FluxConfig:
    """The dense model's config, in the student's stacks; FFNs that `cut` does not know keep their
    width."""
    orders = {name: array.size for name, array in cut.items()}
    stacks: dict[str, list[StackConfig]] = {kind: [] for kind in KINDS}
    for kind, _, first, stack in config.named_stacks:
        width = orders.get(f"{kind}.{first}.{FFNS[kind][0]}", config.ffn_width(stack))
        ratio = width / config.hidden_size
        dense = replace(stack, ffn="dense", active=stack.blocks, mlp_ratio=ratio)
        stacks[kind].append(dense)
    whole = {kind: tuple(found) for kind, found in stacks.items()}
    return replace(config, modulation_rank=None, **whole)
