"""Routers of a Mixture of Blocks that start from what leaving out each block costs
(docs/recipe.md).

Per sample and block of a group, the cost is the mean squared change of the velocity without that
block alone, the others all running (left_out.py). Ridge regression, with a bias, from what the
router reads to the costs' logarithms, centred over the group: a softmax over these logits is each
block's share of the costs, and the blocks that are missed most run.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float

from d2m_jax.config import FluxConfig
from d2m_jax.sparsification.left_out import Blocks, LeftOut

# Kind, number of the stack, of the group in it, and its blocks.
Group = tuple[str, int, int, Blocks]


def groups_of(config: FluxConfig) -> Iterator[Group]:
    """All groups of which some blocks do not run."""
    for kind, i, first, stack in config.named_stacks:
        if stack.mixes:
            for group in range(stack.groups):
                start = first + group * stack.blocks
                yield kind, i, group, tuple((kind, start + n) for n in range(stack.blocks))


def blocks_in_groups(config: FluxConfig) -> Blocks:
    """All blocks of these groups."""
    return tuple(block for *_, blocks in groups_of(config) for block in blocks)


def fit_routers(config: FluxConfig, found: LeftOut) -> dict:
    """Parameters of all routers, {kind: {number of the stack, a string: …}}, with the leading axis
    of groups; float32."""
    routers: dict = {}
    for kind, i, _, blocks in groups_of(config):
        fitted = fit_router(
            found.pooled[blocks[0]],
            found.vec,
            np.stack([found.costs[block] for block in blocks], axis=1),
            config.mob_alpha,
        )
        routers.setdefault(kind, {}).setdefault(str(i), []).append(fitted)
    return {
        kind: {i: _stacked(groups) for i, groups in of_kind.items()}
        for kind, of_kind in routers.items()
    }


def _stacked(groups: list[dict]) -> dict:
    return {
        part: {name: np.stack([group[part][name] for group in groups]) for name in groups[0][part]}
        for part in groups[0]
    }


def fit_router(
    pooled: Float[np.ndarray, "n e"],
    vec: Float[np.ndarray, "n d"],
    costs: Float[np.ndarray, "n m"],
    alpha: float,
) -> dict[str, dict[str, np.ndarray]]:
    """Parameters of a models.mob.BlockRouter, float32."""
    read = np.concatenate([alpha * pooled, (1 - alpha) * vec], axis=1).astype(np.float64)
    wanted = np.log(np.maximum(costs.astype(np.float64), 1e-12))
    wanted = wanted - wanted.mean(1, keepdims=True)
    # A router with α = 0 has no bias.
    mean, of_wanted = (read.mean(0), wanted.mean(0)) if alpha else (0.0, 0.0)
    x, y = read - mean, wanted - of_wanted
    square = x.T @ x
    # As the gates' (deal.py): the mean eigenvalue times features / samples.
    ridge = np.trace(square) / len(x) * np.eye(x.shape[1]) + 1e-12 * np.eye(x.shape[1])
    kernel = np.linalg.solve(square + ridge, x.T @ y)
    # The router's own bias is scaled with its features.
    bias = (of_wanted - mean @ kernel) / alpha if alpha else np.zeros(costs.shape[1])
    features, of_vec = np.split(kernel, [pooled.shape[1]])
    made = {"features": {"kernel": features, "bias": bias}, "vec": {"kernel": of_vec}}
    return {
        part: {name: a.astype(np.float32) for name, a in leaves.items()}
        for part, leaves in made.items()
    }


def logits(
    router: Mapping[str, Mapping[str, np.ndarray]],
    pooled: Float[np.ndarray, "n e"],
    vec: Float[np.ndarray, "n d"],
    alpha: float,
) -> Float[np.ndarray, "n m"]:
    """What a models.mob.BlockRouter with these parameters gives."""
    features, of_vec = router["features"], router["vec"]
    of_features = pooled @ features["kernel"] + features["bias"]
    return alpha * of_features + (1 - alpha) * vec @ of_vec["kernel"]


def with_routers(params: dict, routers: Mapping[str, Mapping[str, dict]]) -> dict:
    """A model's parameters with these routers."""
    return params | {
        kind: params[kind]
        | {int(i): params[kind][int(i)] | {"router": new} for i, new in of_kind.items()}
        for kind, of_kind in routers.items()
    }
