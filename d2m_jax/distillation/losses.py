"""The losses of the pipeline (docs/method.md), all float32, and the health of routing that they
rest on; of means over samples (distillation/objective.py)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d2m_jax.config import FluxConfig, LossConfig
from d2m_jax.distillation.objective import Means
from d2m_jax.models.blocks import FFNS
from d2m_jax.models.reports import Body, GroupReport


def mean_square(a: Float[Array, "b n c"], b: Float[Array, "b n c"]) -> Float[Array, ""]:
    """Mean squared difference over samples, tokens and channels."""
    return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean()


def feature_weights(
    distill: Float[Array, ""], feature: Float[Array, " l"], norm: Float[Array, " l"]
) -> Float[Array, " l"]:
    """w_l = |L_distill| / |L_feature^l| · Σ_j ‖f_tea^j‖ / (L · ‖f_tea^l‖), constants for the
    gradient (docs/method.md).

    A feature that is already right to 0.1 % of its norm gains no more weight from being better.
    Zero where nothing is known yet.
    """
    norm = jnp.maximum(norm, 1e-12)
    floor = 1e-6 * jnp.square(norm)
    weights = distill / jnp.maximum(feature, floor) * norm.mean() / norm
    return jax.lax.stop_gradient(weights)


def balance(
    probability: Float[Array, "*l n"],
    whole_load: Float[Array, "*l n"],
    whole_probability: Float[Array, "*l n"] | None = None,
) -> Float[Array, ""]:
    """Switch loss n · Σ_i f_i P_i, mean over layers; 1 when even.

    `probability` are a batch's, f and what makes P a share are the whole's (None: the batch is the
    whole). In a Mixture of Blocks
    a block reports zeros for the samples that skip it, so shares are taken anew; a block that
    nobody ran is weighed little, not infinitely.

    >>> even = jnp.full(4, 0.25)  # of an MoE: report.routing.probability.mean(0), .load.mean(0)
    >>> balance(even, even).item()
    1.0
    """
    f = whole_load / jnp.maximum(whole_load.sum(-1, keepdims=True), 1e-9)
    whole = probability if whole_probability is None else whole_probability
    p = probability / jnp.maximum(whole.sum(-1, keepdims=True), 1e-2)
    return (probability.shape[-1] * (jax.lax.stop_gradient(f) * p).sum(-1)).mean()


def health(load: Float[Array, "l b n"]) -> dict[str, Float[Array, " l"]]:
    """Per layer: entropy of the loads over ln n (1: even), the largest load as a multiple of the
    even one, and how many get less than a twentieth of it ("dead")."""
    f = load.mean(1)
    f = f / jnp.maximum(f.sum(-1, keepdims=True), 1e-9)
    n = f.shape[-1]
    return {
        "entropy": -(f * jnp.log(f + 1e-9)).sum(-1) / jnp.log(n)
        if n > 1
        else jnp.ones_like(f[:, 0]),
        "largest_load": n * f.max(-1),
        "dead_experts": (n * f < 0.05).sum(-1).astype(jnp.float32),
    }


def routing_means(report: Body[GroupReport]) -> Means:
    """Of one forward (models.flux.Flux.run), by layer: what experts and blocks got, and their
    probabilities, means over samples.

    Layers are named like their parameters: `double.0.img_mlp`, `single.1.blocks`.
    """
    found = {}
    for kind, stacks in report.items():
        for i, stack in enumerate(stacks):
            for name, ffn in stack.ffns.items():
                if ffn.routing is not None:
                    load, probability = ffn.routing.load, ffn.routing.probability
                    found[f"{kind}.{i}.{name}"] = {
                        "load": load.mean(-2),
                        "probability": probability.mean(-2),
                    }
            if stack.choice is not None:
                used, probability = stack.choice.used, stack.choice.probability
                found[f"{kind}.{i}.blocks"] = {
                    "load": used.mean(-2),
                    "probability": probability.mean(-2),
                }
    return found


def nothing_routed(config: FluxConfig, top_k: int) -> Means:
    """Zeros in the place of what `routing_means` gives with so many experts per token."""
    found = {}
    for kind, names in FFNS.items():
        for i, stack in enumerate(getattr(config, kind)):
            layers = {}
            if stack.ffn == "moe" and top_k > 0:
                axes = stack.groups, stack.blocks, config.moe.experts
                layers |= dict.fromkeys(names, axes)
            if stack.mixes:
                layers["blocks"] = (stack.groups, stack.blocks)
            for name, axes in layers.items():
                zeros = np.zeros(axes, np.float32)
                found[f"{kind}.{i}.{name}"] = {"load": zeros, "probability": zeros}
    return found


def routing(
    means: Means, whole: Means
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """Balance loss over experts, the same over blocks, each a mean over layers, and metrics by
    layer; of `routing_means`, weighed by those of the whole."""
    terms, metrics = {"experts": [], "blocks": []}, {}
    for name, found in means.items():
        load, mine = found["load"], whole[name]
        kind = "blocks" if name.endswith(".blocks") else "experts"
        terms[kind].append(balance(found["probability"], mine["load"], mine["probability"]))
        of_layers = health(load.reshape(-1, 1, load.shape[-1]))
        if kind == "blocks":
            share = load / jnp.maximum(load.sum(-1, keepdims=True), 1e-9)
            of_layers = {"use": share.reshape(-1), "entropy": of_layers["entropy"]}
        metrics |= {f"{name}/{what}": value for what, value in of_layers.items()}
    return _mean(terms["experts"]), _mean(terms["blocks"]), metrics


def total(
    weights: LossConfig, means: Means, whole: Means
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of distillation and its metrics, linear in the means; `whole` are those that it
    weighs by."""
    output = means["output"]
    value, metrics = weights.output * output, {"output": output}
    if weights.feature:
        norm = jnp.sqrt(whole["square"])
        weighed = feature_weights(whole["output"], whole["feature"], norm) * means["feature"]
        value += weights.feature * weighed.sum()
        metrics["feature"] = means["feature"] / means["square"]
    experts, blocks, health_of_layers = routing(means["routing"], whole["routing"])
    value += weights.balance * experts + weights.block_balance * blocks
    return value, metrics | {"balance": experts, "block_balance": blocks} | health_of_layers


def _mean(terms: list[Array]) -> Array:
    return sum(terms, jnp.float32(0)) / max(1, len(terms))
