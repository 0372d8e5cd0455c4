"""The MoE FFN (docs/method.md): y = MLP_s(x) + scale · Σ_TopK g_i · MLP_i(x), dropless."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from d2m_jax.config import MoEConfig
from d2m_jax.models.experts import Experts
from d2m_jax.models.layers import FFN, Linear32, broadcast
from d2m_jax.models.reports import Context, FFNReport, Routing, alone


class MoE(nnx.Module):
    """Shared expert, normal experts and gate in the place of one FFN.

    `shared` and `expert` are the hidden widths of the shared expert and of each normal one. Of
    `config` it reads how many experts there are and how its gate chooses. In a model of your own:

    >>> moe = MoE(16, shared=16, expert=8, config=MoEConfig(experts=4, top_k=1), rngs=nnx.Rngs(0))
    >>> y, report = moe(jnp.ones((2, 3, 16)))
    >>> y.shape, report.routing.load.shape  # what each sample's tokens chose, for a balance loss
    ((2, 3, 16), (2, 4))
    """

    def __init__(
        self,
        dim: int,
        shared: int,
        expert: int,
        config: MoEConfig = MoEConfig(),
        *,
        out_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.shared = FFN(dim, shared, out_bias=out_bias, rngs=rngs)
        self.experts = Experts(config.experts, dim, expert, rngs=rngs)
        self.gate = Linear32(dim, config.experts, rngs=rngs)
        if config.router_input == "unmodulated":
            self.gate_cond = Linear32(dim, config.experts, bias=False, zero=True, rngs=rngs)
        self.scale = nnx.Param(
            jnp.ones(())
        )  # of the normal experts' sum; 0 when they enter after stage 1

    def __call__(
        self,
        x: Float[Array, "b n d"],
        unmodulated: Float[Array, "b n d"] | None = None,
        context: Context | None = None,
        routed: Float[Array, "b n d"] | None = None,
        counted: Float[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b n d"], FFNReport]:
        """Output and report. Outside a transformer of ours x is all that it reads. `routed`, what
        the normal experts added in an earlier step (FFNReport.routed), is added again without
        computing it. `counted` says which tokens the report's Routing is of; all are computed."""
        unmodulated = x if unmodulated is None else unmodulated
        context = alone(x) if context is None else context
        k, each = self.config.top_k if context.top_k is None else context.top_k, context.top_k_each
        y, routing, choices = self.shared(x), None, None
        if routed is None and k > 0:
            with jax.named_scope("gate"):
                logits = self.logits(x, unmodulated, context.vec)
                probability, chosen, weight = route(self.config, logits, k, each)
            with jax.named_scope("experts"):
                routed = broadcast(self.scale[...], x) * self.experts(x, chosen, weight)
            choices = jax.nn.one_hot(chosen, self.config.experts).sum(2)
            if counted is None:
                load, probability = choices.sum(1), probability.mean(1)
            else:
                load = (choices * counted[..., None]).sum(1)
                probability = (probability * counted[..., None]).sum(1)
                probability /= jnp.maximum(counted.sum(1, keepdims=True), 1)
            load = load / jnp.maximum(load.sum(-1, keepdims=True), 1)
            routing = Routing(load, probability)
        kept = None
        if context.keep_routed:
            kept = jnp.zeros_like(y) if routed is None else routed
        choices = choices if context.watched else None
        y = y if routed is None else y + routed
        return y, FFNReport(routing, kept, choices=choices)

    def logits(
        self,
        x: Float[Array, "b n d"],
        unmodulated: Float[Array, "b n d"],
        vec: Float[Array, "b d"],
    ) -> Float[Array, "b n e"]:
        """Gate logits in float32. With router_input "unmodulated" the timestep enters beside the
        token."""
        if self.config.router_input == "modulated":
            return self.gate(x)
        cond = self.gate_cond(jax.nn.silu(vec.astype(jnp.float32)))[:, None]
        return self.gate(unmodulated) + cond


def route(
    config: MoEConfig, logits: Float[Array, "b n e"], k: int, each: Int[Array, " b"] | None = None
) -> tuple[Float[Array, "b n e"], Int[Array, "b n k"], Float[Array, "b n k"]]:
    """Probabilities over experts (for balance), the chosen experts, and their weights.

    "renormalised": k'·s_i / Σ_{top k'} s with s = softmax and k' the number of experts that
    train, so that a uniform gate gives every weight 1, and an expert weighs the same whatever
    k is. "softmax": n·s_i, "sigmoid": 2·sigmoid, scaled likewise to 1 at zero logits. Where
    `each` is given, a sample has that many of the k, and n stands for no expert.
    """
    probability, trained = jax.nn.softmax(logits, axis=-1), config.trained
    top, chosen = jax.lax.top_k(logits, max(k, trained))
    whole = jax.nn.logsumexp(top[..., :trained], axis=-1, keepdims=True)
    top, chosen = top[..., :k], chosen[..., :k]
    p = jnp.take_along_axis(probability, chosen, axis=-1)
    if config.gate == "renormalised":
        weight = trained * jnp.exp(top - whole)
        if trained == 1:
            # Whatever the logits, the first weighs 1: they learn straight through, as the
            # router of a Mixture of Blocks does (models/mob.py).
            first = 1 + (p[..., :1] - jax.lax.stop_gradient(p[..., :1]))
            weight = jnp.concatenate([first, weight[..., 1:]], axis=-1)
    elif config.gate == "softmax":
        weight = logits.shape[-1] * p
    else:
        weight = 2 * jax.nn.sigmoid(top)
    if each is not None:
        runs = jnp.arange(k) < each[:, None, None]
        chosen = jnp.where(runs, chosen, logits.shape[-1])
        weight = jnp.where(runs, weight, 0)
    return probability, chosen, weight
