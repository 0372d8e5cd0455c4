"""Where tokens and samples go: loads of experts and use of blocks, by timestep and by place."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from d2m_jax.distillation.losses import health
from d2m_jax.evaluate.noisy import Inputs, Program, arguments, on_mesh_of
from d2m_jax.models.flux import model_of

SIDES = {"img_mlp": " image", "txt_mlp": " text"}  # of a double block's FFNs
BINS = 8  # of the timestep, from 0 (data) to 1 (noise)


@dataclass(frozen=True)
class Layer:
    """The experts of one MoE layer; shares sum to 1 over experts, or are 0 where no sample came."""

    name: str
    by_time: Float[np.ndarray, "t n"]
    by_place: Float[np.ndarray, "h w n"] | None  # None: sees no image
    health: dict[str, float]  # of losses.health


@dataclass(frozen=True)
class Group:
    """The blocks of one Mixture of Blocks; shares of the samples that run each."""

    name: str
    by_time: Float[np.ndarray, "t m"]


def measure(
    program: Program, params: dict, batches: Iterable[Inputs]
) -> tuple[list[Layer], list[Group]]:
    """The routing of a model on noisy examples; layers are named by the number of their block.

    Of images of several sizes, places are those of the first batch's.
    """
    config, results, times, grids = program.config, [], [], []
    for inputs in batches:
        grids.append(inputs["img"].shape[1:3])
        with on_mesh_of(inputs):
            results.append(jax.device_get(_route(program, params, inputs)))
        times.append(np.asarray(inputs["timesteps"]))
    bins = bins_of(np.concatenate(times))
    loads, places, used = (
        {name: [result[i][name] for result in results] for name in results[0][i]} for i in range(3)
    )
    layers, groups = [], []
    for kind, i, block, stack in config.transformer.named_stacks:
        for group in range(stack.groups):
            first = block + group * stack.blocks
            if (kind, i) in used:
                use = np.concatenate([u[group] for u in used[kind, i]])
                name = f"{kind} {first} to {first + stack.blocks - 1}"
                groups.append(Group(name, _by_time(use, bins)))
            for b in range(stack.blocks):
                for key in [key for key in loads if key[:2] == (kind, i)]:
                    load = np.concatenate([a[group, b] for a in loads[key]])
                    place = None
                    if key in places:
                        alike = [
                            a[group, b]
                            for a, grid in zip(places[key], grids, strict=True)
                            if grid == grids[0]
                        ]
                        place = _shares(reduce(np.add, alike)).reshape(*grids[0], -1)
                    values = {n: float(v[0]) for n, v in health(jnp.asarray(load[None])).items()}
                    name = f"{kind} {first + b}{SIDES.get(key[2], '')}"
                    layers.append(Layer(name, _shares(_by_time(load, bins)), place, values))
    return layers, groups


def compile_routing(program: Program, params: dict, inputs: Inputs) -> None:
    """Compile what `measure` runs, for parameters that may be abstract; it finds it in JAX's
    cache."""
    with on_mesh_of(inputs):
        _route.lower(program, params, inputs).compile()


@partial(jax.jit, static_argnums=0)
def _route(program: Program, params: dict, inputs: Inputs) -> tuple[dict, dict, dict]:
    """By (kind, stack, FFN): loads [g, m, b, n], and choices by image token [g, m, tokens, n].

    By (kind, stack): blocks used [g, b, m].
    """
    config, transformer = program.config, program.config.transformer
    model = model_of(transformer, params, jnp.dtype(program.dtype))
    _, report = model.run(*model.embed(*arguments(config, inputs), watched=True))
    loads, places, used = {}, {}, {}
    for kind, i, *_ in transformer.named_stacks:
        stack = report[kind][i]
        if stack.choice is not None:
            used[kind, i] = stack.choice.used
        for name, ffn in stack.ffns.items():
            if ffn.routing is None:
                continue
            loads[kind, i, name] = ffn.routing.load
            if ffn.choices is not None:
                places[kind, i, name] = ffn.choices.sum(2)
    return loads, places, used


def bins_of(timesteps: Float[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
    """The bin of each timestep."""
    return np.minimum((timesteps * BINS).astype(int), BINS - 1)


def _by_time(values: Float[np.ndarray, "b n"], bins: np.ndarray) -> Float[np.ndarray, "t n"]:
    """Means over the samples of each bin, zero where there are none."""
    return np.stack(
        [values[bins == t].mean(0) if (bins == t).any() else 0 * values[0] for t in range(BINS)]
    )


def _shares(values: Float[np.ndarray, "*s n"]) -> Float[np.ndarray, "*s n"]:
    return values / np.maximum(values.sum(-1, keepdims=True), 1e-9)
