"""What a model's velocity loses by each block: computed with and without it, per sample."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from d2m_jax.config import KINDS, FluxConfig, check
from d2m_jax.models.flux import Flux, join, model_of
from d2m_jax.models.mob import layer_pool
from d2m_jax.models.reports import Context, Streams
from d2m_jax.sharding import from_parts, in_parts, whole
from d2m_jax.sparsification.groups import align, one_by_one, shapes
from d2m_jax.sparsification.importance import Noisy, first_batches

Blocks = tuple[tuple[str, int], ...]  # kind and number of blocks


@dataclass(frozen=True)
class LeftOut:
    """Samples at random times, and what a model's velocity loses there by a block; float32."""

    costs: Mapping[tuple[str, int], Float[np.ndarray, " n"]]  # mean squared change without it
    pooled: Mapping[tuple[str, int], Float[np.ndarray, "n e"]]  # what a router there would read
    vec: Float[np.ndarray, "n d"]  # the global vector
    timesteps: Float[np.ndarray, " n"]

    @property
    def means(self) -> dict[str, Float[np.ndarray, " m"]]:
        """By kind, the mean costs of its blocks that were left out, in their order."""
        return {
            kind: np.array([costs.mean() for (of, _), costs in self.costs.items() if of == kind])
            for kind in KINDS
        }


def all_blocks(config: FluxConfig) -> Blocks:
    """Every block."""
    return tuple((kind, number) for kind in KINDS for number in range(config.depth(kind)))


def leave_out(
    config: FluxConfig,
    params: dict,
    batches: Iterable[dict],
    noisy: Noisy,
    key: Array,
    *,
    count: int,
    blocks: Blocks | None = None,
    micro_batch: int | None = None,
) -> LeftOut:
    """Of a model whose blocks all run: the costs of `blocks` (None: all), each left out alone, on
    the first `count` batches.

    It takes a forward per block and sample and one more; activations are float32, of `micro_batch`
    samples at a time (None: all of a batch). ConfigError where there are fewer batches.
    """
    blocks = all_blocks(config) if blocks is None else blocks
    apart = one_by_one(config)
    config, params = align(config, jax.tree.map(jnp.asarray, params), shapes(apart))
    found = []
    for i, batch in enumerate(first_batches(batches, count, "leaving out blocks")):
        size = jax.tree.leaves(batch)[0].shape[0]
        mine, parts = jax.random.fold_in(key, i), size // (micro_batch or size)
        with jax.default_matmul_precision("float32"):
            of_batch = measure(params, batch, mine, config, noisy, blocks, parts)
        found.append(jax.tree.map(lambda a: np.array(whole(a)), of_batch))  # off the devices
    check(
        len(found) == count,
        f"costs of blocks: expected {count} batches to measure them on, found {len(found)}",
    )
    costs, pooled, vec, timesteps = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    number = {block: i for i, block in enumerate(all_blocks(config))}
    return LeftOut(
        {block: costs[:, i] for i, block in enumerate(blocks)},
        {block: pooled[:, number[block]] for block in blocks},
        vec,
        timesteps,
    )


@partial(jax.jit, static_argnames=("config", "noisy", "blocks", "parts"))
def measure(
    params: dict,
    batch: dict,
    key: Array,
    config: FluxConfig,
    noisy: Noisy,
    blocks: Blocks,
    parts: int,
) -> tuple[Float[Array, "n k"], Float[Array, "n m e"], Float[Array, "n d"], Float[Array, " n"]]:
    """Of one batch in so many parts, whose samples come in their order: costs of `blocks`, pooled
    streams before every block, the global vector, timesteps."""
    (image, image_ids, txt, text_ids, *others), _ = noisy(batch, key)
    model, everything = model_of(config, params, jnp.float32), all_blocks(config)
    numbers = jnp.array([everything.index(block) for block in blocks])

    def of_part(_: None, part: tuple):
        image, txt, *others = part
        streams, context = model.embed(image, image_ids, txt, text_ids, *others)
        run = partial(_run, model, streams, context)
        full, pooled = run(jnp.ones(len(everything), bool))

        def cost(number: Array):
            return jnp.square(run(jnp.arange(len(everything)) != number)[0] - full).mean((1, 2))

        costs = jax.lax.map(cost, numbers)
        return None, (costs.T, pooled.swapaxes(0, 1), context.vec, others[0])

    return from_parts(jax.lax.scan(of_part, None, in_parts((image, txt, *others), parts))[1])


def _run(
    model: Flux, streams: Streams, context: Context, runs: Bool[Array, " m"]
) -> tuple[Float[Array, "b n c"], Float[Array, "m b e"]]:
    """The velocity where these blocks run, and the pooled streams before each."""
    pooled, first = [], 0
    for kind in KINDS:
        streams = join(streams) if kind == "single" else streams
        for stack in getattr(model, kind):
            graphs, params = stack.split()
            last, body = (
                first + stack.config.depth,
                partial(_block, context, stack.run_group, graphs),
            )
            streams, seen = jax.lax.scan(body, streams, (params, runs[first:last]))
            pooled.append(seen)
            first = last
    return model.final(streams, context), jnp.concatenate(pooled)


def _block(
    context: Context, run_group: Callable, graphs: tuple, streams: Streams, block: tuple
) -> tuple[Streams, Float[Array, "b e"]]:
    params, runs = block
    new, _ = run_group(graphs, params, streams, context)
    seen = layer_pool(streams, context.text_tokens)
    return tuple(jnp.where(runs, *both) for both in zip(new, streams, strict=True)), seen
