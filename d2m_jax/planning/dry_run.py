"""A run without the run: every stage's step, compiled for chips that need not be there."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from d2m_jax.command_line import load_config
from d2m_jax.config import (
    KINDS,
    ROOT,
    AutoencoderConfig,
    ConfigError,
    FluxConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    StageConfig,
    Timesteps,
    teacher_path,
)
from d2m_jax.data.source import largest_size
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import names, restructure
from d2m_jax.planning import hardware
from d2m_jax.planning.plan import plan, table
from d2m_jax.sharding import (
    batch_sharding,
    make_mesh,
    parameter_sharding,
    replicated,
)
from d2m_jax.sparsify.groups import aligned, shapes
from d2m_jax.sparsify.student import student_config
from d2m_jax.training.optimizer import split
from d2m_jax.training.run import check_stages, models_of, objective
from d2m_jax.training.step import Step
from d2m_jax.weights.directory import model_directory


def dry_run(
    config: RunConfig,
    topology: str,
    output: Path | None = None,
) -> None:
    """Print the plan of every stage on a topology (hardware.parse), and write it as JSON.

    To be called before JAX is asked for its devices. A teacher that is not there yet is taken from
    the config of its name in configs/.
    """
    chips = hardware.parse(topology)
    hardware.prepare(chips)
    teacher = None if config.teacher is None else _teacher(config.teacher)
    mesh = make_mesh(config.mesh, hardware.devices(chips))
    plans = {}
    for one in lower(config, teacher, mesh):
        found = plan(one.program, chips, mesh, one.parts, one.flops, one.recomputed)
        print(f"{config.name}, stage {one.stage}, {_settings(config.stages[one.stage], mesh)}")
        print(table(found), flush=True)
        plans[one.stage] = found.to_json()
        if output is not None:
            output.write_text(json.dumps(plans, indent=1) + "\n")


def _settings(stage: StageConfig, mesh: Mesh) -> str:
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    parts = stage.optimizer.accumulate
    micro = f" in {parts} parts" if parts > 1 else ""
    return f"batch {stage.batch_size}{micro}, {stage.dtype}, {axes or 'one device'}"


def _teacher(path: str) -> ModelConfig:
    preset = ROOT / "configs" / f"{Path(path).name}.py"
    try:
        place = teacher_path(path)
    except ConfigError:
        if not preset.exists():
            raise
    else:
        return model_directory.load_config(place)
    print(f"{path} is not there: planned with {preset.relative_to(ROOT)}")
    config = load_config(preset)
    if isinstance(config, FluxConfig):
        config = ModelConfig(config, PromptsConfig(), AutoencoderConfig(), shift=None)
    return config


@dataclass(frozen=True)
class Lowered:
    """A stage's step. `parts` are its arguments by what they are, none twice; FLOPs are those of a
    step on all devices, `recomputed` what rematerialisation adds."""

    stage: str
    program: jax.stages.Lowered
    parts: Mapping[str, Any]
    flops: int
    recomputed: int


def lower(config: RunConfig, teacher: ModelConfig | None, mesh: Mesh) -> Iterator[Lowered]:
    """Every stage of a run's student, or of the model that it trains from scratch.

    What is frozen is taken to be stored in the stage's dtype, or in float32 after it has trained;
    frozen parameters that have never trained and that the teacher has too are the teacher's arrays.
    """
    start, trained = config.model, set()
    if teacher is not None:
        transformer = student_config(teacher.transformer, config.sparsify)
        start = replace(teacher, transformer=transformer)
    assert start is not None  # a run has a teacher or a model (RunConfig)
    check_stages("", config.stages, start, mesh, config.timesteps, teacher)
    for name, stage, model in models_of(config.stages, start):
        size = largest_size(config.data, model)
        yield _lower(name, stage, model, teacher, trained, mesh, config.timesteps, size)
        training, _ = split(abstract(model.transformer), stage.train, stage.freeze)
        trained |= {_of_any_stack(path) for path in names(training)}


def _of_any_stack(path: str) -> str:
    """A parameter's name without the number of its stack, which regrouping blocks changes."""
    kind, *rest = path.split(".")
    return ".".join([kind, *rest[1:]]) if kind in KINDS else path


def _lower(
    name: str,
    stage: StageConfig,
    model: ModelConfig,
    teacher: ModelConfig | None,
    trained: set[str],
    mesh: Mesh,
    timesteps: Timesteps,
    image_size: tuple[int, int],
) -> Lowered:
    def placed(tree: dict, trained: set[str]) -> dict:
        def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            dtype = jnp.float32 if _of_any_stack(path) in trained else stage.dtype
            sharding = parameter_sharding(mesh, path, leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

        return restructure(tree, {path: place(path, leaf) for path, leaf in names(tree).items()})

    params, constants = placed(abstract(model.transformer), trained), {}
    if teacher is not None:
        same = aligned(teacher.transformer, shapes(model.transformer))
        constants = placed(abstract(same), set())
        theirs = names(constants)
        shared = {
            path: theirs[path] if theirs.get(path) == leaf else leaf
            for path, leaf in names(params).items()
        }
        params = restructure(params, shared)
    grid = model.grid(*image_size)
    loss, count, again = objective(model, stage, teacher, timesteps, math.prod(grid))
    program = Step(stage, loss, params, constants, mesh)
    batch = _batch(model, stage, mesh, grid)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    signals = jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=everywhere)
    state = program.state()
    with jax.set_mesh(mesh):
        lowered = program.train().lower(state, program.frozen, constants, batch, key, signals)
    parts = {
        "teacher": constants,
        "student, frozen": program.frozen,
        "student, trains": state["trainable"],
        "optimizer": {n: part for n, part in state.items() if n != "trainable"},
        "batch": batch,
    }
    size = stage.batch_size
    return Lowered(name, lowered, parts, size * count, size * again)


def _batch(
    model: ModelConfig, stage: StageConfig, mesh: Mesh, grid: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """An encoded batch (Encoders.encode)."""
    transformer, size, place = model.transformer, stage.batch_size, batch_sharding(mesh)

    def of(*shape: int, dtype: DTypeLike = stage.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=place)

    return {
        "latents": of(*grid, transformer.in_channels, dtype=jnp.float32),
        "txt": of(model.text.length, transformer.context_in_dim),
        "y": of(transformer.vec_in_dim),
    }
