"""A stack of equal blocks: groups that run one after the other, whole or as a Mixture of Blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models import parameters
from d2m_jax.models.layers import Modulation
from d2m_jax.models.mob import BlockRouter, choose, run_chosen
from d2m_jax.models.reports import NOTHING, Choice, Context, GroupReport, Known, Streams
from d2m_jax.sharding import constrain, gathered, sent


class Stack(nnx.Module):
    """Groups of equal blocks; every parameter has the leading axes (groups, blocks), one scan runs
    them all."""

    def __init__(self, kind: type, config: FluxConfig, stack: StackConfig, *, rngs: nnx.Rngs):
        def create(rngs: nnx.Rngs):
            return kind(config, stack, rngs=rngs)

        self.block = over_axes(create, (stack.groups, stack.blocks), rngs)
        if stack.mixes:

            def create_router(rngs: nnx.Rngs):
                return BlockRouter(config.hidden_size, stack.blocks, config.mob_alpha, rngs=rngs)

            self.router = over_axes(create_router, (stack.groups,), rngs)
        self.config = stack
        self.choice: Literal["any", "adjacent"] = config.mob_choice

    def split(self) -> tuple[Any, Any]:
        """What run_group needs: the program of one group, and parameters with the leading axis of
        groups."""
        block = nnx.split(self.block)
        router = nnx.split(self.router) if self.config.mixes else (None, ())
        return (block[0], router[0]), (block[1], router[1])

    def run_group(
        self,
        graphs: tuple,
        params: tuple,
        streams: Streams,
        context: Context,
        known: Known = NOTHING,
    ) -> tuple[Streams, GroupReport]:
        """One group, given its slice of the parameters and of what is known; what its FFNs report
        comes back as [blocks, b, …]."""
        block, router = params

        def run_block(block: Any, streams: Streams, context: Context):
            block = gathered(block, streams[0].dtype)
            streams = tuple(constrain(x, "batch", None, None) for x in streams)
            new, reports = nnx.merge(graphs[0], block)(streams, context)
            return new, (reports, change(streams, new, context) if context.watched else None)

        if not self.config.mixes:

            def step(streams: Streams, mine: tuple[Any, Known]):
                return run_block(mine[0], streams, replace(context, known=mine[1]))

            streams, (reports, changes) = parameters.scan(step, streams, (block, known))
            return streams, GroupReport(reports, change=changes)
        # Samples choose on their own devices, which must then have all blocks of the group.
        if parameters.is_unstacked(block):
            block = tuple(parameters.part(block, i) for i in range(self.config.blocks))
        block = sent(block, streams[0].dtype)
        # What normal experts added is known of the blocks that ran then: they run again.
        logits = known.used
        if logits is None:
            chooses = nnx.merge(graphs[1], router)
            logits = chooses(streams, context.vec, context.text_tokens)
        probability, chosen, weight = choose(logits, self.config.active, self.choice)
        known = replace(known, used=None)
        asked = streams, context, chosen, weight, known
        streams, (reports, changes) = run_chosen(run_block, block, *asked)
        used = jax.nn.one_hot(chosen, self.config.blocks).sum(1)
        return streams, GroupReport(reports, Choice(used, probability), changes)

    def __call__(
        self, streams: Streams, context: Context, known: Known = NOTHING, *, remat: bool = False
    ) -> tuple[Streams, GroupReport]:
        """All groups."""
        graphs, params = self.split()

        def body(streams: Streams, group: tuple[tuple, Known]):
            params, known = group
            return self.run_group(graphs, params, streams, context, known)

        if remat:
            body = jax.checkpoint(body, prevent_cse=False)
        return parameters.scan(body, streams, (params, known))

    def modulations(self, cond: Float[Array, "*s b r"]) -> Known:
        """The modulations of all blocks (Flux.modulations)."""

        def of(lin: dict):
            kernel, bias = jax.tree.map(
                lambda a: a.astype(cond.dtype), (lin["kernel"], lin["bias"])
            )
            if not parameters.is_unstacked(kernel):
                return jnp.einsum("...br,gmro->...gmbo", cond, kernel) + bias[:, :, None]
            pairs = [zip(*group, strict=True) for group in zip(kernel, bias, strict=True)]
            groups = [[cond @ k + b for k, b in group] for group in pairs]
            return jnp.stack([jnp.stack(group, -3) for group in groups], -4)

        found = {
            name: of(nnx.to_pure_dict(nnx.state(module.lin)))
            for name, module in vars(self.block).items()
            if isinstance(module, Modulation)
        }
        return Known(modulations=found)


def over_axes(
    create: Callable[[nnx.Rngs], nnx.Module], axes: tuple[int, ...], rngs: nnx.Rngs
) -> nnx.Module:
    """A module whose parameters have extra leading axes, each element initialised with its own
    key."""
    for _ in axes:
        create = nnx.vmap(create, in_axes=0, out_axes=0)
    return create(rngs.split(axes))


def change(old: Streams, new: Streams, context: Context) -> Float[Array, "b 2"]:
    """|new − old| / |old| of a block, over its image and over its text tokens, float32."""

    def norms(streams: Streams):
        text = context.text_tokens
        img, txt = streams if len(streams) == 2 else (streams[0][:, text:], streams[0][:, :text])
        return jnp.stack([jnp.linalg.norm(x, axis=(1, 2)) for x in (img, txt)], axis=-1)

    exact = tuple(x.astype(jnp.float32) for x in old)
    moved = tuple(b.astype(jnp.float32) - a for a, b in zip(exact, new, strict=True))
    return norms(moved) / jnp.maximum(norms(exact), 1e-9)
