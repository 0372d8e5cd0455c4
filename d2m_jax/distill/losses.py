"""The losses of the pipeline (docs/method.md), all float32, and the health of routing that they
rest on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from d2m_jax.models.protocol import Body, GroupReport


def mean_square(a: Float[Array, "b n c"], b: Float[Array, "b n c"]) -> Float[Array, ""]:
    """Mean squared difference over samples, tokens and channels."""
    return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean()


def feature_weights(
    distill: Float[Array, ""], feature: Float[Array, " l"], norm: Float[Array, " l"]
) -> Float[Array, " l"]:
    """w_l = |L_distill| / |L_feature^l| · Σ_j ‖f_tea^j‖ / (L · ‖f_tea^l‖), constants for the
    gradient (docs/method.md).

    A feature that is already right to 0.1 % of its norm gains no more weight from being better.
    """
    floor = 1e-6 * jnp.square(norm)
    weights = distill / jnp.maximum(feature, floor) * norm.mean() / norm
    return jax.lax.stop_gradient(weights)


def balance(load: Float[Array, "*l b n"], probability: Float[Array, "*l b n"]) -> Float[Array, ""]:
    """Switch loss n · Σ_i f_i P_i, mean over layers; 1 when even. f and P are shares over the whole
    batch."""
    f, p = load.mean(-2), probability.mean(-2)
    # In a Mixture of Blocks a block reports zeros for the samples that skip it, so shares are taken
    # anew.
    f, p = (a / jnp.maximum(a.sum(-1, keepdims=True), 1e-9) for a in (f, p))
    return (load.shape[-1] * (jax.lax.stop_gradient(f) * p).sum(-1)).mean()


def health(load: Float[Array, "l b n"]) -> dict[str, Float[Array, " l"]]:
    """Per layer: entropy of the loads over ln n (1: even), the largest load as a multiple of the
    even one, and how many get less than a twentieth of it ("dead")."""
    f = load.mean(1)
    f = f / jnp.maximum(f.sum(-1, keepdims=True), 1e-9)
    n = f.shape[-1]
    return {
        "entropy": -(f * jnp.log(f + 1e-9)).sum(-1) / jnp.log(n),
        "largest_load": n * f.max(-1),
        "dead_experts": (n * f < 0.05).sum(-1).astype(jnp.float32),
    }


def routing(
    report: Body[GroupReport],
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """Balance loss over experts, the same over blocks, and metrics by layer, of one forward
    (models.flux.Flux.run).

    Layers are named like their parameters: `double.0.img_mlp`, `single.1.blocks`.
    """
    experts, blocks, metrics = [], [], {}
    for kind, stacks in report.items():
        for i, stack in enumerate(stacks):
            for name, ffn in stack.ffns.items():
                if ffn.routing is None:
                    continue
                load = ffn.routing.load
                experts.append(balance(load, ffn.routing.probability))
                of_layers = health(load.reshape(-1, *load.shape[-2:]))
                metrics |= {f"{kind}.{i}.{name}/{what}": value for what, value in of_layers.items()}
            if stack.choice is not None:
                used = stack.choice.used
                blocks.append(balance(used, stack.choice.probability))
                share = used.mean(1) / jnp.maximum(used.mean(1).sum(-1, keepdims=True), 1e-9)
                metrics[f"{kind}.{i}.blocks/use"] = share.reshape(-1)
                metrics[f"{kind}.{i}.blocks/entropy"] = health(used)["entropy"]
    return _mean(experts), _mean(blocks), metrics


def _mean(terms: list[Array]) -> Array:
    return sum(terms, jnp.float32(0)) / max(1, len(terms))
