"""FLUX.1 (BFL src/flux/model.py) as stacks of equal blocks; dense, MoE and MoB are configs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from d2m_jax.config import FluxConfig, StackConfig
from d2m_jax.models import parameters
from d2m_jax.models.blocks import DoubleStreamBlock, SingleStreamBlock
from d2m_jax.models.layers import (
    Linear,
    Linear32,
    MLPEmbedder,
    Modulation,
    layer_norm,
    modulate,
    rope,
    timestep_embedding,
)
from d2m_jax.models.mob import BlockRouter, choose, run_chosen
from d2m_jax.models.protocol import (
    NOTHING,
    Body,
    Choice,
    Context,
    GroupReport,
    Known,
    Streams,
)
from d2m_jax.models.size import summary
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
            logits = nnx.merge(graphs[1], router)(streams, context)
        probability, chosen, weight = choose(logits, self.config.active)
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


class LastLayer(nnx.Module):
    """Modulated norm and projection to the tokens' channels."""

    def __init__(self, dim: int, channels: int, *, rngs: nnx.Rngs):
        self.adaLN_modulation = Linear(dim, 2 * dim, zero=True, rngs=rngs)
        self.linear = Linear(dim, channels, zero=True, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], vec: Float[Array, "b d"]) -> Float[Array, "b n c"]:
        shift, scale = jnp.split(self.adaLN_modulation(jax.nn.silu(vec))[:, None], 2, axis=-1)
        return self.linear(modulate(layer_norm(x), shift, scale))


class Flux(nnx.Module):
    """The transformer. `dtype` is that of activations; parameters keep theirs."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        dim = config.hidden_size
        self.config, self.dtype = config, dtype
        self.img_in = Linear(config.in_channels, dim, rngs=rngs)
        self.txt_in = Linear(config.context_in_dim, dim, rngs=rngs)
        self.time_in = MLPEmbedder(256, dim, rngs=rngs)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim, rngs=rngs)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, dim, rngs=rngs)
        if config.modulation_rank is not None:
            self.modulation_basis = Linear32(dim, config.modulation_rank, bias=False, rngs=rngs)
        self.double = nnx.List(
            [Stack(DoubleStreamBlock, config, s, rngs=rngs) for s in config.double]
        )
        self.single = nnx.List(
            [Stack(SingleStreamBlock, config, s, rngs=rngs) for s in config.single]
        )
        self.final_layer = LastLayer(dim, config.in_channels, rngs=rngs)

    def __repr__(self) -> str:
        # By vars: it may be asked for before there is a config, where an error is told.
        if "final_layer" not in vars(self):
            return object.__repr__(self)
        params = nnx.to_pure_dict(nnx.state(self))
        return f"Flux: {summary(self.config, params)}; computes in {jnp.dtype(self.dtype)}"

    __str__ = __repr__

    def __call__(
        self,
        img: Float[Array, "b n c"],
        img_ids: Float[Array, "i n 3"],
        txt: Float[Array, "b l e"],
        txt_ids: Float[Array, "i l 3"],
        timesteps: Float[Array, " b"],
        y: Float[Array, "b v"],
        guidance: Float[Array, " b"] | None = None,
        top_k: int | None = None,
    ) -> Float[Array, "b n c"]:
        """Velocity in float32. timesteps in [0, 1]; ids with one row serve the whole batch; `top_k`
        normal experts per token, 0 to n (None: the config's)."""
        streams, context = self.embed(img, img_ids, txt, txt_ids, timesteps, y, guidance, top_k)
        return self.run(streams, context)[0]

    def condition(
        self,
        timesteps: Float[Array, " b"],
        y: Float[Array, "b v"],
        guidance: Float[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b d"], Float[Array, "b r"]]:
        """The global vector, and what modulations read of it."""
        vec = self.time_in(timestep_embedding(timesteps))
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("guidance: this model has a guidance embedding, found none")
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        vec = vec + self.vector_in(y)
        cond = jax.nn.silu(vec)
        if self.config.modulation_rank is not None:
            cond = self.modulation_basis(cond)
        return vec, cond.astype(self.dtype)

    def embed(
        self,
        img: Float[Array, "b n c"],
        img_ids: Float[Array, "i n 3"],
        txt: Float[Array, "b l e"],
        txt_ids: Float[Array, "i l 3"],
        timesteps: Float[Array, " b"],
        y: Float[Array, "b v"],
        guidance: Float[Array, " b"] | None = None,
        top_k: int | None = None,
        **asked: Any,
    ) -> tuple[Streams, Context]:
        """The streams (img, txt) at the entry of the first block, and what all blocks read;
        `asked` are the fields of Context that say what blocks hand out."""
        vec, cond = self.condition(timesteps, y, guidance)
        ids = jnp.concatenate([txt_ids, img_ids], axis=1)
        context = Context(
            vec=vec,
            cond=cond,
            pe=rope(ids, self.config.axes_dim, self.config.theta),
            text_tokens=txt.shape[1],
            top_k=top_k,
            **asked,
        )
        return (self.img_in(img.astype(self.dtype)), self.txt_in(txt.astype(self.dtype))), context

    def run(
        self, streams: Streams, context: Context, *known: Body[Known], remat: bool = False
    ) -> tuple[Float[Array, "b n c"], Body[GroupReport]]:
        """Blocks and last layer: the velocity, and what every stack reports. `known` is what
        `modulations` and `known_of` gave."""
        report = {"double": [], "single": []}
        for kind in report:
            if kind == "single":
                streams = join(streams)
            for i, stack in enumerate(getattr(self, kind)):
                # All that is known of this stack, in one.
                mine = reduce(or_, (body[kind][i] for body in known), NOTHING)
                streams, of_stack = stack(streams, context, mine, remat=remat)
                report[kind].append(of_stack)
        return self.final(streams, context), report

    def modulations(self, cond: Float[Array, "*s b r"]) -> Body[Known]:
        """The modulations of all blocks, for `run`: weights are read once, for however many steps,
        whose axes come first."""

        def of(lin: dict):
            kernel, bias = jax.tree.map(
                lambda a: a.astype(cond.dtype), (lin["kernel"], lin["bias"])
            )
            if not parameters.is_unstacked(kernel):
                return jnp.einsum("...br,gmro->...gmbo", cond, kernel) + bias[:, :, None]
            pairs = [zip(*group, strict=True) for group in zip(kernel, bias, strict=True)]
            groups = [[cond @ k + b for k, b in group] for group in pairs]
            return jnp.stack([jnp.stack(group, -3) for group in groups], -4)

        def of_stack(stack: Stack) -> Known:
            lins = {
                name: nnx.to_pure_dict(nnx.state(module.lin))
                for name, module in vars(stack.block).items()
                if isinstance(module, Modulation)
            }
            return Known(modulations={name: of(lin) for name, lin in lins.items()})

        bodies = {"double": self.double, "single": self.single}
        return {kind: [of_stack(stack) for stack in stacks] for kind, stacks in bodies.items()}

    def final(self, streams: Streams, context: Context) -> Float[Array, "b n c"]:
        """Velocity of the image tokens, float32."""
        x = streams[0][:, context.text_tokens :]
        return self.final_layer(x, context.vec.astype(self.dtype)).astype(jnp.float32)


def known_of(report: Body[GroupReport]) -> Body[Known]:
    """Of a report under Context.keep_routed, what a later step can take as known: what the normal
    experts added, and in a Mixture of Blocks which blocks ran."""
    return {kind: [stack.known() for stack in stacks] for kind, stacks in report.items()}


def join(streams: Streams) -> Streams:
    """(img, txt) of the double blocks as the single blocks' (x,): text first."""
    img, txt = streams
    return (jnp.concatenate([txt, img], axis=1),)


# (config, seed) → fresh parameters; (config) → their shapes; (config, params, dtype) → the model
initialise = partial(parameters.initialise, Flux)
abstract = partial(parameters.abstract, Flux)
model_of = partial(parameters.model_of, Flux)
