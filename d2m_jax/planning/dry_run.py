"""A run without the run: every stage's step, compiled for chips that need not be there."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from d2m_jax import hosts
from d2m_jax.command_line import load_config
from d2m_jax.config import (
    SHIPPED,
    AutoencoderConfig,
    ConfigError,
    FluxConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    check,
    suggestion,
    teacher_path,
)
from d2m_jax.planning import hardware
from d2m_jax.planning.plan import plan, table
from d2m_jax.planning.programs import Lowered, calibration, lower
from d2m_jax.sharding import make_mesh
from d2m_jax.sparsification.student import measures, micro_batch
from d2m_jax.weights.directory import model_directory


def dry_run(
    config: RunConfig,
    topology: str,
    output: Path | None = None,
    rival: str | None = None,
) -> None:
    """Print the plan of calibration and of every stage on a topology (hardware.parse), and write it
    as JSON; calibration's is called `start`, as the model that it makes. Of the main student, or of
    a rival.

    To be called before JAX is asked for its devices. A teacher that is not there yet is taken from
    the config of its name in configs/. ConfigError for a rival that the config does not have, and
    for what a run would refuse.
    """
    config = _student_of(config, rival)
    chips = hardware.parse(topology)
    hardware.prepare(chips)
    teacher = None if config.teacher is None else _teacher(config.teacher)
    mesh = make_mesh(config.mesh, hardware.devices(chips))
    plans, known = {}, {}
    for one in _all(config, teacher, mesh):
        others = dict(one.others())
        what = "calibration" if one.stage == "start" else f"stage {one.stage}"
        count = f"{1 + len(others)} programs" if others else "a program"
        hosts.say(f"{what}: {count}; where a model is large the compiler takes minutes for each")
        found = plan(
            *(one.program, chips, mesh, one.parts, one.flops, one.recomputed),
            beside=one.beside,
            others=others,
            name="calibration" if one.stage == "start" else "step",
            known=known,
        )
        print(f"{config.name}, {_settings(config, one.stage, mesh)}")
        print(table(found), flush=True)
        plans[one.stage] = found.to_json()
        if output is not None:
            output.write_text(json.dumps(plans, indent=1) + "\n")


def _student_of(config: RunConfig, rival: str | None) -> RunConfig:
    """The run of this student alone."""
    names = list(config.rivals)
    if rival is None:
        if names:
            print(f"of the main student; of a rival with --rival {' or '.join(names)}")
        return replace(config, rivals={})
    known = f"expected {', '.join(names)}" if names else "the config has no rivals"
    check(rival in names, f"--rival {rival}: no such rival{suggestion(rival, names)} ({known})")
    student = config.rivals[rival]
    name, (sparsify, stages) = f"{config.name}, rival {rival}", (student.sparsify, student.stages)
    return replace(config, name=name, sparsify=sparsify, stages=stages, rivals={})


def _all(config: RunConfig, teacher: ModelConfig | None, mesh: Mesh) -> Iterator[Lowered]:
    stages = lower(config, teacher, mesh)
    first = next(stages)  # what is wrong with any stage is told before the first compilation
    if teacher is not None and measures(config.sparsify):
        yield calibration(config, teacher, mesh)
    yield first
    yield from stages


def _settings(config: RunConfig, name: str, mesh: Mesh) -> str:
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    if name == "start":
        said, size, dtype = "calibration", config.sparsify.batch_size, "float32"
        parts = size // micro_batch(config.sparsify, config.stages)
    else:
        stage = config.stages[name]
        said, size, dtype = f"stage {name}", stage.batch_size, stage.dtype
        parts = stage.optimizer.accumulate
    micro = f" in {parts} parts" if parts > 1 else ""
    return f"{said}, batch {size}{micro}, {dtype}, {axes or 'one device'}"


def _teacher(path: str) -> ModelConfig:
    preset = SHIPPED / "configs" / f"{Path(path).name}.py"
    try:
        place = teacher_path(path)
    except ConfigError:
        if not preset.exists():
            raise
    else:
        return model_directory.load_config(place)
    print(f"{path} is not there: planned with {preset.relative_to(SHIPPED)}")
    config = load_config(preset)
    if isinstance(config, FluxConfig):
        config = ModelConfig(config, PromptsConfig(), AutoencoderConfig(), shift=None)
    return config
