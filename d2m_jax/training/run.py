"""A whole run: a teacher from scratch, or a student and its rivals from one, stage after stage."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from jax.sharding import Mesh

from d2m_jax.config import (
    ROOT,
    LossConfig,
    ModelConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
    StudentConfig,
    WordsConfig,
)
from d2m_jax.data import icons
from d2m_jax.distill.stages import distill_loss, flow_loss, noisy_inputs
from d2m_jax.models.flux import initialise
from d2m_jax.sampling import grid
from d2m_jax.sampling.encoders import Encoders
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.sharding import make_mesh
from d2m_jax.sparsify.groups import align, grouped, regroup, shapes
from d2m_jax.sparsify.importance import Noisy
from d2m_jax.sparsify.student import make_student, student_config
from d2m_jax.training.checkpoint import open_run
from d2m_jax.training.loop import train_stage
from d2m_jax.training.metrics import say
from d2m_jax.weights import model_directory

SAMPLED_PROMPTS = 36  # in the grids that a training draws

# FLOPs of one example's forward: (config, image tokens, text tokens) → count.
Flops = Callable[..., int]


@dataclass(frozen=True)
class _Work:
    """What all trainings of one run share."""

    config: RunConfig
    mesh: Mesh
    flops: Flops
    encoders: Encoders
    noisy: Noisy | None = None  # for calibration; one object, so that it is compiled once


def run(config: RunConfig, run_directory: Path | str, flops: Flops) -> None:
    """Train what `config` says into `run_directory`, going on where an earlier start stopped.

    Leaves `model/`, and `models/<stage>/` after each stage (`models/start/` before the first); a
    rival has the same in `rivals/<name>/`. `flops(config, image_tokens, text_tokens)` counts a
    forward, for utilisation.
    """
    run_directory = open_run(run_directory, config)
    mesh = make_mesh(config.mesh)
    if config.teacher is None:
        model = config.model
        if isinstance(model.text, WordsConfig):
            vocabulary = icons.vocabulary(config.data, model.image)
            model = replace(model, text=replace(model.text, vocabulary=vocabulary))
        params = initialise(model.transformer, config.seed)
        encoders = Encoders(model, mesh=mesh)
        _train(_Work(config, mesh, flops, encoders), run_directory, (model, params), config.stages)
        return
    teacher = model_directory.load(ROOT / config.teacher)
    _check_students(config, teacher[0])
    encoders = Encoders(teacher[0], mesh=mesh)
    noisy = partial(noisy_inputs, teacher[0], LossConfig())
    work = _Work(config, mesh, flops, encoders, noisy)
    for name, rival in config.rivals.items():
        say(f"rival {name}")
        start = partial(_cut, work, teacher, rival.sparsify)
        _train(work, run_directory / "rivals" / name, start, rival.stages, teacher)
    start = partial(_cut, work, teacher, config.sparsify)
    _train(work, run_directory, start, config.stages, teacher)


def _check_students(config: RunConfig, teacher: ModelConfig) -> None:
    """Raise ConfigError for a student that cannot be cut or grouped, before anything trains."""
    main = StudentConfig(config.sparsify, config.stages)
    for student in (main, *config.rivals.values()):
        transformer = student_config(teacher.transformer, student.sparsify)
        for stage in student.stages.values():
            if stage.groups is not None:
                transformer = grouped(transformer, stage.groups)


def _cut(work: _Work, teacher: tuple[ModelConfig, dict], sparsify: SparsifyConfig):
    """The student before any training."""
    config, (model, params) = work.config, teacher
    encoders = work.encoders
    batches = map(
        encoders.encode,
        icons.batches(
            config.data, encoders.tokenizer, model.image, sparsify.batch_size, config.seed
        ),
    )
    return make_student(model, params, sparsify, batches, work.noisy, config.seed, say)


def _train(
    work: _Work,
    directory: Path,
    start,
    stages: Mapping[str, StageConfig],
    teacher: tuple[ModelConfig, dict] | None = None,
) -> None:
    """All stages of one model. `start` is (config, params), or a function that makes them."""
    models = directory / "models"
    if not (models / "start").exists():
        model, params = start() if callable(start) else start
        model_directory.save(models / "start", model, params)
    before = "start"
    for name, stage in stages.items():
        if not (models / name).exists():
            model, params = model_directory.load(models / before)
            if stage.groups is not None:
                transformer, params = regroup(
                    model.transformer, params, stage.groups, work.config.seed
                )
                model = replace(model, transformer=transformer)
            params = _train_stage(work, directory, name, stage, model, params, teacher)
            model_directory.save(models / name, model, params)
        before = name
    if not (directory / "model").exists():
        model_directory.save(directory / "model", *model_directory.load(models / before))


def _train_stage(
    work: _Work,
    directory: Path,
    name: str,
    stage: StageConfig,
    model: ModelConfig,
    params: dict,
    teacher: tuple[ModelConfig, dict] | None,
) -> dict:
    config, encoders = work.config, work.encoders
    make_batches = partial(
        icons.batches, config.data, encoders.tokenizer, model.image, stage.batch_size
    )
    count = partial(work.flops, image_tokens=math.prod(model.grid()), text_tokens=model.text.length)
    flops = 3 * count(model.transformer)
    if teacher is None:
        loss, constants = flow_loss(model, stage), ()
    else:
        # Lockstep pairs the stacks of teacher and student one to one.
        transformer, constants = align(
            teacher[0].transformer, teacher[1], shapes(model.transformer)
        )
        loss = distill_loss(replace(teacher[0], transformer=transformer), model, stage)
        flops += count(transformer)
    return train_stage(
        name,
        stage,
        loss=loss,
        params=params,
        constants=constants,
        batches=make_batches(config.seed),
        held_out=list(
            islice(make_batches(config.seed, split="validation"), config.held_out_batches)
        ),
        encode=encoders.encode,
        run_directory=directory,
        seed=config.seed,
        flops_per_example=flops,
        sample=partial(_sample, work, model, directory / "samples", name),
        keep=config.keep_checkpoints,
        mesh=work.mesh,
    )


def _sample(
    work: _Work, model: ModelConfig, folder: Path, stage: str, params: dict, step: int
) -> None:
    """The grid of fixed prompts and fixed noise at this step."""
    config = work.config
    prompts = icons.prompts(config.data, model.image, SAMPLED_PROMPTS)
    pipe = Pipeline(model, params, encoders=work.encoders)
    images = pipe([prompt.caption for prompt in prompts], seed=config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    grid.grid(images).save(folder / f"{stage}_{step:06d}.png")
