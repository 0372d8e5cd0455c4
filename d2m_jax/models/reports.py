"""What blocks read beside their streams, and what they report: the types between a model and the
code that trains, calibrates, samples and measures it.

Those that are trees may hold other leaves than arrays: shapes, or what a map over them gives.

What belongs to a whole body is a `Body`: like its parameters, {"double": [one per stack], "single":
[…]}; arrays of a stack have the leading axes (groups, blocks).
"""

from dataclasses import dataclass, field
from typing import TypeVar, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

T = TypeVar("T")
Streams = tuple[Float[Array, "b _ d"], ...]  # (img, txt) in a double block, (x,) in a single one
Body = dict[str, list[T]]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Known:
    """What a block, or the blocks of a stack, need not compute."""

    # By the name of a modulation: its output (Flux.modulations).
    modulations: dict[str, Float[Array, "*s b o"]] = field(default_factory=dict)
    # By the name of an FFN: what its normal experts added in an earlier step.
    routed: dict[str, Float[Array, "*s b n d"]] = field(default_factory=dict)
    # By the name of an FFN: what to add to its output at Context.tokens; zeros, to be derived by.
    probes: dict[str, Float[Array, "*s b t d"]] = field(default_factory=dict)
    # Of a Mixture of Blocks, whether a block ran in that step: no router is asked again.
    used: Float[Array, "*g b m"] | None = None

    def __or__(self, other: "Known") -> "Known":
        return Known(
            self.modulations | other.modulations,
            self.routed | other.routed,
            self.probes | other.probes,
            self.used if other.used is None else other.used,
        )


NOTHING = Known()


@dataclass(frozen=True)
class Context:
    """What every block of one forward reads beside its streams."""

    vec: Float[Array, "b d"]  # the global vector: timestep + guidance + pooled text
    cond: Float[Array, "b r"]  # of the modulations: silu(vec), or that on the shared basis
    pe: tuple[Float[Array, "i n 1 f"], Float[Array, "i n 1 f"]]  # rotary tables of [txt, img]
    text_tokens: int
    top_k: int | None = None  # normal experts per token; None: the config's
    top_k_each: Int[Array, " b"] | None = None  # those of each sample, top_k at most; None: top_k
    # Of each sample, the image and the text tokens whose FFN inputs are reported; None: of none.
    tokens: tuple[Int[Array, "b p"], Int[Array, "b q"]] | None = None
    # Of each sample, how many text tokens are no padding: these alone count in Routing; None: all.
    text_lengths: Int[Array, " b"] | None = None
    keep_routed: bool = False  # whether to report what the normal experts added
    # Whether to report which experts image tokens chose, and how much blocks changed the streams.
    watched: bool = False
    known: Known = NOTHING  # of the block that reads it

    def counted(self, text: int, image: int) -> Float[Array, "b n"] | None:
        """1 for a token that counts, else 0, of so many text tokens and then image tokens; None
        where all count."""
        if self.text_lengths is None:
            return None
        words = jnp.arange(text) < self.text_lengths[:, None]
        return jnp.pad(words.astype(jnp.float32), ((0, 0), (0, image)), constant_values=1.0)

    def tokens_of(self, ffn: str) -> Int[Array, "b t"] | None:
        """Context.tokens, counted as an FFN of this name does."""
        if self.tokens is None:
            return None
        image, text = self.tokens
        both = jnp.concatenate([text, self.text_tokens + image], axis=1)
        return {"img_mlp": image, "txt_mlp": text}.get(ffn, both)


def alone(x: Float[Array, "b n d"]) -> Context:
    """What a layer reads beside x in another model than ours: no time, no text, no positions."""
    vec, table = jnp.zeros((x.shape[0], x.shape[2])), jnp.zeros((1, 1, 1, 1))
    return Context(vec=vec, cond=vec, pe=(table, table), text_tokens=0)


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """What the gate of an FFN did, per sample, in float32."""

    load: Float[Array, "*s b n"]  # each expert's share of the tokens' choices
    probability: Float[Array, "*s b n"]  # means over tokens


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FFNReport:
    """What an FFN did. In a Mixture of Blocks it is zero for samples that skip the block."""

    routing: Routing | None = None  # None: dense, or no normal expert ran
    routed: Float[Array, "*s b n d"] | None = None  # what these added, under Context.keep_routed
    inputs: Float[Array, "*s b t d"] | None = None  # at Context.tokens; of text before image
    # Under Context.watched, how often each image token chose each expert, 0 or 1; None: sees none.
    choices: Float[Array, "*s b i n"] | None = None


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What the router of a group of blocks did, per sample, in float32."""

    used: Float[Array, "*g b m"]  # 1 for a block that runs, else 0
    probability: Float[Array, "*g b m"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupReport:
    """What a group did, or with leading axes all groups of a stack."""

    ffns: dict[str, FFNReport]  # by the name of the FFN in its block
    choice: Choice | None = None  # None: all its blocks run
    # Under Context.watched, of image and text tokens |x' − x| / |x| over a block, in float32; zero
    # for samples that skip it.
    change: Float[Array, "*s b 2"] | None = None

    def known(self) -> Known:
        """What a later step can take from it, under Context.keep_routed."""
        routed = {name: ffn.routed for name, ffn in self.ffns.items() if ffn.routed is not None}
        return Known(routed=routed, used=self.choice.used if routed and self.choice else None)
