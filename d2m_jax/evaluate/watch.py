"""A model watched while it draws: which experts, which blocks, how much each block changes.

Every step of the sampler is a forward that reports where its tokens and samples went. Kept are sums
over samples, whose size does not depend on the number of prompts:

    prompts        [c]            prompts drawn, by group
    samples        [t c]          samples seen: a prompt in each of its steps; t are bins of the
                                  steps, from noise to data
    ran            [l t c]        those that ran layer l, an MoE FFN
    load           [l t c n]      shares of its experts, summed over samples
    load_dealt     [l c n]        the same with prompts dealt anew to groups of these sizes: chance
    entropy        [l t]          of each sample's own shares, over ln n
    maps           [i t c h w n]  how often tokens of a cell chose an expert, of the layers that see
                                  the image
    used           [g t c m]      blocks of Mixture of Blocks g that ran
    used_dealt     [g c m]
    probability    [g t c m]      of its router
    block_ran      [b t c]        samples that ran block b
    change         [b t c 2]      |x' − x| / |x| over a block, of image and of text tokens
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from d2m_jax import flow
from d2m_jax.config import ModelConfig, check
from d2m_jax.evaluate.routing import SIDES
from d2m_jax.keys import named_generator
from d2m_jax.models.flux import model_of
from d2m_jax.models.reports import Body, GroupReport
from d2m_jax.progress import bar
from d2m_jax.sampling.denoise import Text
from d2m_jax.sampling.noise import noise_of
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.sharding import put_batch, whole

GROUPS = 32  # of prompts at most: maps are kept for each
Sums = dict[str, np.ndarray]


@dataclass(frozen=True)
class Names:
    """What the first axes of the sums count."""

    layers: list[str]
    maps: list[str]
    mixtures: list[str]
    sizes: list[int]  # of the mixtures: blocks beyond that are none
    blocks: list[str]
    groups: list[str]  # of prompts


def names_of(config: ModelConfig, groups: Sequence[str], top_k: int | None = None) -> Names:
    """Of a model, in the order of its blocks."""
    found = Names([], [], [], [], [], list(groups))
    k = config.transformer.moe.top_k if top_k is None else top_k
    for kind, _, first, stack in config.transformer.named_stacks:
        for start in range(first, first + stack.depth, stack.blocks):
            if stack.mixes:
                found.mixtures.append(f"{kind} {start} to {start + stack.blocks - 1}")
                found.sizes.append(stack.blocks)
        for block in range(first, first + stack.depth):
            found.blocks.append(f"{kind} {block}")
            if stack.ffn == "moe" and k > 0:
                sides = ("img_mlp", "txt_mlp") if kind == "double" else ("mlp",)
                found.layers.extend(f"{kind} {block}{SIDES.get(side, '')}" for side in sides)
    found.maps.extend(name for name in found.layers if not name.endswith(SIDES["txt_mlp"]))
    return found


def watch(
    pipe: Pipeline,
    prompts: Sequence[tuple[str, str]],
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    max_sequence_length: int | None = None,
    batch_size: int | None = None,
    top_k: int | None = None,
    bins: int = 8,
    places: int = 32,
) -> tuple[Sums, Names]:
    """Draw this process's share of the prompts, each with the name of its group, and watch.

    The noise of prompt i depends on the seed and i alone. Maps have at most `places` cells either
    way. ConfigError for more than GROUPS groups.
    """
    config = pipe.config
    grid = rows, columns = config.grid(height, width)
    steps = config.sample_steps if steps is None else steps
    bins = min(bins, steps)
    cells = min(places, rows), min(places, columns)
    groups = list(dict.fromkeys(group for _, group in prompts))
    check(
        len(groups) <= GROUPS, f"found {len(groups)} groups of prompts, expected {GROUPS} at most"
    )
    names = names_of(config, groups, top_k)
    of = np.array([groups.index(group) for _, group in prompts])
    dealt = named_generator(seed, "groups").permutation(of)
    sums = _zeros(config, names, bins, cells)
    mine = np.arange(len(prompts))[jax.process_index() :: jax.process_count()]
    if not len(mine):
        return sums, names
    size = pipe.batch_size(len(mine), rows * columns, batch_size)
    times = flow.schedule(steps, config.shift_at(rows * columns))
    strength = np.float32(config.guidance if guidance is None else guidance)
    program = partial(_step, config, pipe.encoders.dtype, grid, cells, top_k, pipe.params)
    captions = [prompt for prompt, _ in prompts]
    pipe.tell({"prompts": captions}, guidance, length=max_sequence_length)
    length = () if max_sequence_length is None else (max_sequence_length,)
    with bar(len(mine) * steps, "routing", "steps", "compiling …") as advance:
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            filled = part[np.arange(size) % len(part)]  # one program for all batches
            noise = noise_of(seed, filled, rows * columns, config.transformer.in_channels)
            ids = pipe.encoders.tokenizer.ids([captions[i] for i in filled], *length)
            ids, x = put_batch(pipe.mesh, (ids, np.asarray(noise)))
            np.add.at(sums["prompts"], of[part], 1)
            with jax.set_mesh(pipe.mesh):
                text = pipe.encoders.text(ids)
                for step in range(steps):
                    x, seen = program(x, text, times[step], times[step + 1], strength)
                    seen = {name: whole(a)[:, : len(part)] for name, a in seen.items()}
                    _count(sums, seen, step * bins // steps, of[part], dealt[part])
                    advance(len(part))
    return sums, names


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _step(
    config: ModelConfig,
    dtype: DTypeLike,
    grid: tuple[int, int],
    cells: tuple[int, int],
    top_k: int | None,
    params: dict,
    x: Float[Array, "b n c"],
    text: Text,
    time: Float[Array, ""],
    after: Float[Array, ""],
    guidance: Float[Array, ""],
):
    """x after one step (sampling.denoise has the same), and what was seen, samples on axis 1."""
    model, (txt, y) = model_of(config.transformer, params, dtype), text
    ids = flow.image_ids(*grid), flow.text_ids(txt.shape[1])
    of_samples = (jnp.full(len(x), value, jnp.float32) for value in (time, guidance))
    times, strength = of_samples
    asked = x, ids[0], txt, ids[1], times, y, strength, top_k
    velocity, report = model.run(*model.embed(*asked, watched=True))
    return x + (after - time) * velocity, _seen(config, report, grid, cells)


def _seen(
    config: ModelConfig,
    report: Body[GroupReport],
    grid: tuple[int, int],
    cells: tuple[int, int],
) -> dict[str, Float[Array, "_ b ..."]]:
    """Of a report: load [l b n], maps [i b h w n], used and probability [g b m], change [b b 2]; of
    blocks that samples skip all is zero."""
    found = {name: [] for name in ("load", "maps", "used", "probability", "change")}
    most = max((s.blocks for s in config.transformer.stacks if s.mixes), default=1)
    for kind, i, _, stack in config.transformer.named_stacks:
        mine = report[kind][i]
        assert mine.change is not None  # for it is watched
        found["change"].append(mine.change.reshape(stack.depth, *mine.change.shape[2:]))
        if mine.choice is not None:
            wider = [(0, 0), (0, 0), (0, most - stack.blocks)]
            found["used"].append(jnp.pad(mine.choice.used, wider))
            found["probability"].append(jnp.pad(mine.choice.probability, wider))
        routed = [ffn for _, ffn in sorted(mine.ffns.items()) if ffn.routing is not None]
        if not routed:
            continue
        loads = jnp.stack([ffn.routing.load for ffn in routed if ffn.routing], axis=2)
        found["load"].append(loads.reshape(-1, *loads.shape[3:]))
        for ffn in routed:
            if ffn.choices is not None:
                choices = ffn.choices.reshape(stack.depth, ffn.choices.shape[2], *grid, -1)
                found["maps"].append(_cells(choices, cells))
    return {name: jnp.concatenate(parts) for name, parts in found.items() if parts}


def _cells(
    choices: Float[Array, "l b rows columns n"], cells: tuple[int, int]
) -> Float[Array, "l b h w n"]:
    """Sums over cells, tokens of an axis being shared out over them in order."""
    rows, columns = (
        jax.nn.one_hot(jnp.arange(size) * count // size, count)
        for size, count in zip(choices.shape[2:4], cells, strict=True)
    )
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("lbrcn,rh,cw->lbhwn", choices, rows, columns, precision=exact)


def _zeros(config: ModelConfig, names: Names, bins: int, cells: tuple[int, int]) -> Sums:
    groups, experts = len(names.groups), config.transformer.moe.experts
    layers, maps, mixtures = len(names.layers), len(names.maps), len(names.mixtures)
    most, blocks = max(names.sizes, default=1), len(names.blocks)
    shapes = {
        "prompts": (groups,),
        "samples": (bins, groups),
        "ran": (layers, bins, groups),
        "load": (layers, bins, groups, experts),
        "load_dealt": (layers, groups, experts),
        "entropy": (layers, bins),
        "maps": (maps, bins, groups, *cells, experts),
        "used": (mixtures, bins, groups, most),
        "used_dealt": (mixtures, groups, most),
        "probability": (mixtures, bins, groups, most),
        "block_ran": (blocks, bins, groups),
        "change": (blocks, bins, groups, 2),
    }
    small = {name: np.zeros(shape, np.float64) for name, shape in shapes.items() if name != "maps"}
    return small | {"maps": np.zeros(shapes["maps"], np.float32)}


def _count(sums: Sums, seen: Sums, t: int, of: np.ndarray, dealt: np.ndarray) -> None:
    """Add what was seen of samples, which belong to groups `of`, in one step of bin t."""
    experts = sums["load"].shape[-1]
    for sample, (c, other) in enumerate(zip(of, dealt, strict=True)):
        mine = {name: a[:, sample] for name, a in seen.items()}
        sums["samples"][t, c] += 1
        sums["block_ran"][:, t, c] += mine["change"].sum(-1) > 0
        sums["change"][:, t, c] += mine["change"]
        if "load" in mine:
            sums["ran"][:, t, c] += mine["load"].sum(-1) > 0
            sums["load"][:, t, c] += mine["load"]
            sums["load_dealt"][:, other] += mine["load"]
            sums["entropy"][:, t] += entropy(mine["load"]) / math.log(max(2, experts))
            sums["maps"][:, t, c] += mine["maps"]
        if "used" in mine:
            sums["used"][:, t, c] += mine["used"]
            sums["used_dealt"][:, other] += mine["used"]
            sums["probability"][:, t, c] += mine["probability"]


def entropy(shares: Float[np.ndarray, "*s n"]) -> Float[np.ndarray, "*s"]:
    """In nats, of what need not sum to 1; 0 of nothing."""
    p = shares / np.maximum(shares.sum(-1, keepdims=True), 1e-30)
    return np.asarray(-(p * np.log(np.maximum(p, 1e-30))).sum(-1))


def information(sums: Float[np.ndarray, "k n"]) -> float:
    """How much k tells of n, in nats: the entropy of n less its mean entropy given k."""
    weight = sums.sum(-1) / max(sums.sum(), 1e-30)
    return float(entropy(sums.sum(0)) - (weight * entropy(sums)).sum())
