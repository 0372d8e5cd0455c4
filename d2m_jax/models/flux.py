"""FLUX.1 (BFL src/flux/model.py) as stacks of equal blocks; dense, MoE and MoB are configs."""

from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from d2m_jax.config import FluxConfig
from d2m_jax.models import parameters
from d2m_jax.models.blocks import DoubleStreamBlock, SingleStreamBlock
from d2m_jax.models.layers import (
    LastLayer,
    Linear,
    Linear32,
    MLPEmbedder,
    rope,
    timestep_embedding,
)
from d2m_jax.models.reports import NOTHING, Body, Context, GroupReport, Known, Streams
from d2m_jax.models.size import summary
from d2m_jax.models.stack import Stack


class Flux(nnx.Module):
    """The transformer. `dtype` is that of activations; parameters keep theirs.

    >>> sizes = {"hidden_size": 16, "num_heads": 1, "axes_dim": (4, 6, 6), "guidance_embed": False}
    >>> inputs = {"in_channels": 4, "context_in_dim": 8, "vec_in_dim": 8}
    >>> stacks = {"double": (StackConfig(1),), "single": (StackConfig(2),)}
    >>> model = Flux(FluxConfig(**sizes, **inputs, **stacks), rngs=nnx.Rngs(0))
    >>> img, txt, y, time = (jnp.ones(s) for s in ((1, 6, 4), (1, 3, 8), (1, 8), (1,)))
    >>> model(img, flow.image_ids(2, 3), txt, flow.text_ids(3), time, y).shape
    (1, 6, 4)
    """

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
        params = nnx.as_pure(nnx.state(self))  # to_pure_dict leaves cycles that hold the arrays
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
        bodies = {"double": self.double, "single": self.single}
        return {kind: [stack.modulations(cond) for stack in bodies[kind]] for kind in bodies}

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
