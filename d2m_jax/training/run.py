"""A whole run: a teacher from scratch, or a student and its rivals from one, stage after stage."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from d2m_jax import grid, hosts, progress
from d2m_jax.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    StageConfig,
    StudentConfig,
    Timesteps,
    at_path,
    check,
    differences,
    teacher_path,
    to_json,
)
from d2m_jax.data.protocol import Batches, Data, Split
from d2m_jax.data.source import open_data, with_vocabulary
from d2m_jax.distill.fixed_times import fixed_times
from d2m_jax.distill.objective import Objective
from d2m_jax.distill.stages import distill_loss, flow_loss, noisy_inputs
from d2m_jax.encoders import Encoders
from d2m_jax.models.accounting import flops_per_example
from d2m_jax.models.cut import Cut, composed
from d2m_jax.models.flux import abstract, initialise
from d2m_jax.named_arrays import names, restructure
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.sharding import (
    batch_shards,
    check_mesh,
    make_mesh,
    own_rows,
    parameter_sharding,
    put_batch,
    put_parameters,
)
from d2m_jax.sparsify.depth import meeting
from d2m_jax.sparsify.groups import align, grouped, regroup, shapes
from d2m_jax.sparsify.importance import Noisy
from d2m_jax.sparsify.student import make_student, micro_batch, student_config
from d2m_jax.training.checkpoint import open_run
from d2m_jax.training.loop import check_batch, train_stage
from d2m_jax.training.step import Step
from d2m_jax.training.tracking import Tracker, tracked
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.torch_files.diffusers_folder import parts

KEPT = "the last whole checkpoint is kept, start again to go on from it"


@dataclass(frozen=True)
class _Work:
    """What all trainings of one run share."""

    config: RunConfig
    mesh: Mesh
    encoders: Encoders
    data: Data
    validation: Data  # the same, or the data that the config names
    tracker: Tracker | None
    noisy: Noisy | None = None  # for calibration; one object, so that it is compiled once

    def load(self, path: Path | str) -> tuple[ModelConfig, dict]:
        """A model directory onto the mesh, as it is stored."""
        return model_directory.load(path, None, partial(parameter_sharding, self.mesh))

    def batches(self, size: int, split: Split = "train") -> Batches:
        """Batches, of which this process draws the rows that it needs."""
        data = self.data if split == "train" else self.validation
        rows = own_rows(self.mesh, size)
        return data.batches(self.encoders.tokenizer, size, self.config.seed, split, rows)


def _open(
    config: RunConfig,
    mesh: Mesh,
    model: ModelConfig,
    tracker: Tracker | None,
    noisy: Noisy | None = None,
) -> _Work:
    """The data, and the encoders where these are not encoded already. ConfigError for data that
    cannot be had, or that this model does not read."""
    data = open_data(config.data, model)
    other = config.validation
    validation = data if other is None else open_data(other, model)
    encoders = Encoders(model, mesh=mesh, load=not (data.encoded and validation.encoded))
    if encoders.size:
        hosts.say(
            f"text encoders and autoencoder take {progress.size(encoders.size)} of the devices'"
            " memory; a cache of what they make of the data saves it: python -m d2m_jax.data.cache"
        )
    students = [config, *config.rivals.values()]
    if any(stage.sample_every for one in students for stage in one.stages.values()):
        there = model.encoders is not None and Path(model.encoders).is_dir()
        found = f"ModelConfig.encoders = {model.encoders}"
        check(
            there or not parts(model),
            f"{found}: no such folder, and sample_every needs it to draw samples",
        )
        prompts = data.prompts(config.sampled_prompts)
        check(len(prompts) > 0, "sample_every: the data have no prompts, expected at least one")
        encoders.check([prompt.caption for prompt in prompts])
    return _Work(config, mesh, encoders, data, validation, tracker, noisy)


# What is asked of a run with a teacher before it trains, given the teacher's config, the data, the
# data that validate, and the encoders.
Ahead = Callable[[ModelConfig, Data, Data, Encoders], None]


def run(config: RunConfig, run_directory: Path | str, ahead: Ahead | None = None) -> None:
    """Train what `config` says into `run_directory`, going on where an earlier start stopped.

    Leaves `model/`, and `models/<stage>/` after each stage (`models/start/` before the first); a
    rival has the same in `rivals/<name>/`. Raises ConfigError for what cannot go well, `ahead`'s
    too, before anything trains.
    """
    run_directory = open_run(run_directory, config)
    with tracked(config, run_directory) as tracker:
        _run(config, run_directory, tracker, ahead)


def _run(
    config: RunConfig, run_directory: Path, tracker: Tracker | None, ahead: Ahead | None
) -> None:
    mesh = make_mesh(config.mesh)
    if config.teacher is None:
        assert config.model is not None  # RunConfig has one of the two
        model = with_vocabulary(config.data, config.model)
        check_stages("", config.stages, model, mesh, config.timesteps)
        work = _open(config, mesh, model, tracker)
        _train(work, run_directory, partial(_start, work, model), config.stages)
        return
    path = teacher_path(config.teacher)
    model = model_directory.load_config(path)
    _check_students(config, model, mesh)
    noisy = partial(noisy_inputs, model, config.timesteps, guidance=config.guidance)
    work = _open(config, mesh, model, tracker, noisy)
    if ahead is not None:
        ahead(model, work.data, work.validation, work.encoders)
    teacher = (*work.load(path), model_directory.load_cut(path, model.transformer))
    for name, rival in config.rivals.items():
        hosts.say(f"rival {name}")
        start = partial(_cut, work, teacher, rival)
        _train(work, run_directory / "rivals" / name, start, rival.stages, teacher)
    start = partial(_cut, work, teacher, StudentConfig(config.sparsify, config.stages))
    _train(work, run_directory, start, config.stages, teacher)


Start = tuple[ModelConfig, dict, Cut]


def _start(work: _Work, model: ModelConfig) -> Start:
    """The model of a run without a teacher before any training."""
    path = work.config.start
    if path is None:
        return model, initialise(model.transformer, work.config.seed), {}
    path = teacher_path(path, "start")
    other = model_directory.load_config(path).transformer
    for name, theirs, mine in differences(to_json(other), to_json(model.transformer)):
        raise ConfigError(f"start = {path}: its transformer.{name} is {theirs}, this run's {mine}")
    return model, work.load(path)[1], model_directory.load_cut(path, other)


def _check_students(config: RunConfig, teacher: ModelConfig, mesh: Mesh) -> None:
    """Raise ConfigError for a student that cannot be cut, grouped or spread over the mesh, before
    anything trains."""
    check_mesh(mesh, teacher.transformer)
    students = {"": StudentConfig(config.sparsify, config.stages)}
    students |= {f"rivals.{name}.": rival for name, rival in config.rivals.items()}
    for where, student in students.items():
        transformer = student_config(teacher.transformer, student.sparsify)
        size, shards = student.sparsify.batch_size, batch_shards(mesh)
        check(
            size % shards == 0,
            f"{where}sparsify.batch_size = {size}: expected a multiple of the mesh's data · fsdp ·"
            f" expert = {shards}",
        )
        model = replace(teacher, transformer=transformer)
        check_stages(where, student.stages, model, mesh, config.timesteps, teacher)


def check_stages(
    where: str,
    stages: Mapping[str, StageConfig],
    start: ModelConfig,
    mesh: Mesh,
    timesteps: Timesteps,
    teacher: ModelConfig | None = None,
) -> None:
    """Raise ConfigError for what any stage of a model that begins as `start` could not do, found by
    shapes alone; `where` is what stands before `stages` in the run's config."""
    check_mesh(mesh, start.transformer)
    for name, stage, model in models_of(stages, start):
        path = f"{where}stages.{name}"
        check_batch(path, stage, mesh)
        try:
            same = teacher and replace(
                teacher, transformer=meeting(teacher.transformer, model.transformer)
            )
            loss, _, _ = objective(model, stage, same, timesteps)
            Step(stage, loss, abstract(model.transformer), {}, mesh)
        except ConfigError as error:
            said = at_path(str(error), path) if "StageConfig" in str(error) else f"{path}: {error}"
            raise ConfigError(said) from None


def models_of(
    stages: Mapping[str, StageConfig], start: ModelConfig
) -> Iterator[tuple[str, StageConfig, ModelConfig]]:
    """Name, stage and the model that it trains, of all stages; `start` is that before the first.

    ConfigError for groups that do not fit the model, when their stage's turn comes.
    """
    transformer = start.transformer
    for name, stage in stages.items():
        if stage.groups is not None:
            try:
                transformer = grouped(transformer, stage.groups)
            except ConfigError as error:
                raise ConfigError(f"stages.{name}: {error}") from None
        yield name, stage, replace(start, transformer=transformer)


def _cut(work: _Work, teacher: Start, student: StudentConfig) -> Start:
    """The student before any training, its neurons' places those in the dense model from which the
    teacher may have been cut itself."""
    (model, params, before), sparsify = teacher, student.sparsify
    assert work.noisy is not None  # of a run with a teacher
    with jax.set_mesh(work.mesh):
        batches = (
            work.encoders.encode(put_batch(work.mesh, batch))
            for batch in work.batches(sparsify.batch_size)
        )
        made = make_student(
            model,
            params,
            sparsify,
            batches,
            work.noisy,
            work.config.seed,
            hosts.say,
            micro_batch(sparsify, student.stages),
        )
    return *made[:2], composed(before, made[2], made[0].transformer)


def _train(
    work: _Work,
    directory: Path,
    start: Callable[[], Start],
    stages: Mapping[str, StageConfig],
    teacher: Start | None = None,
) -> None:
    """All stages of one model. `start` makes what they begin with."""
    models = directory / "models"
    if not _exists(models / "start"):
        model, params, cut = start()
        model_directory.save(models / "start", model, params, cut=cut)
        del params
    transformer = model_directory.load_config(models / "start").transformer
    cut = model_directory.load_cut(models / "start", transformer)
    before = "start"
    for name, stage in stages.items():
        if not _exists(models / name):
            asked = directory, name, stage, models / before, cut, teacher
            model, params = _train_stage(work, *asked)
            model_directory.save(models / name, model, params, cut=cut)
            del params
        before = name
    if not _exists(directory / "model"):
        model_directory.save(directory / "model", *work.load(models / before), cut=cut)


def _exists(path: Path) -> bool:
    """Told by the first process: it may write the path before others look."""
    return hosts.by_first(path.exists)


def _train_stage(
    work: _Work,
    directory: Path,
    name: str,
    stage: StageConfig,
    before: Path,
    cut: Cut,
    teacher: Start | None,
) -> tuple[ModelConfig, dict]:
    """The model of the directory `before`, which has this cut, trained."""
    ((_, _, model),) = models_of({name: stage}, model_directory.load_config(before))
    config, constants, same = work.config, {}, None
    if teacher is not None:
        dense = teacher[0].transformer
        same = replace(teacher[0], transformer=meeting(dense, model.transformer, cut, teacher[2]))
        constants = align(dense, teacher[1], shapes(same.transformer))[1]
        constants = put_parameters(work.mesh, constants)  # here, or both would stay
    # Buckets of one resolution have about equally many.
    tokens = round(
        sum(math.prod(model.grid(*size)) for size in work.data.sizes) / len(work.data.sizes)
    )
    loss, flops, _ = objective(model, stage, same, config.timesteps, tokens, config.guidance)

    def start() -> dict:
        old, params = work.load(before)
        if stage.groups is not None:
            params = regroup(old.transformer, params, stage.groups, work.config.seed)[1]
        return share(params, constants)

    validation = work.batches(stage.batch_size, "validation")
    params = train_stage(
        name,
        stage,
        loss=loss,
        params=start,
        constants=constants,
        batches=work.batches(stage.batch_size),
        validation=list(islice(validation, work.config.held_out_batches)),
        fixed=fixed_times(model, stage, same) if work.config.fixed_times else None,
        encode=work.encoders.encode,
        run_directory=directory,
        seed=work.config.seed,
        flops_per_example=flops,
        sample=_Sampler(work, model, directory / "samples", name, teacher and teacher[:2]),
        boards=() if work.tracker is None else (work.tracker.stage(directory, name),),
        keep=work.config.keep_checkpoints,
        mesh=work.mesh,
    )
    return model, params


def objective(
    model: ModelConfig,
    stage: StageConfig,
    teacher: ModelConfig | None,
    timesteps: Timesteps,
    image_tokens: int | None = None,
    guidance: tuple[float, float] | None = None,
) -> tuple[Objective, int, int]:
    """A stage's loss, and the FLOPs of one example: the step's, and what rematerialisation adds.
    `teacher` is in stacks that meet the model's (sparsify.depth.meeting). Without `image_tokens`
    they are those of the model's own image size."""
    tokens = math.prod(model.grid()) if image_tokens is None else image_tokens
    count = partial(flops_per_example, image_tokens=tokens, text_tokens=model.text.length)
    student = model.transformer
    drawn = stage.random_top_k or (student.moe.top_k if stage.top_k is None else stage.top_k,)
    running = [replace(student, moe=student.moe.running(k)) for k in drawn]
    forward = round(sum(map(count, running)) / len(running))
    again = forward if stage.remat else 0
    if teacher is None:
        return flow_loss(model, stage, timesteps, guidance), 3 * forward, again
    loss = distill_loss(teacher, model, stage, timesteps, guidance)
    return loss, 3 * forward + count(teacher.transformer), again


def share(params: dict, teacher: dict) -> dict:
    """The student's parameters, those that are the teacher's to the bit being its arrays."""
    mine, theirs = names(params), names(teacher)
    alike = [
        name
        for name, a in mine.items()
        if name in theirs and (a.shape, a.dtype) == (theirs[name].shape, theirs[name].dtype)
    ]
    equal = _equal([mine[name] for name in alike], [theirs[name] for name in alike])
    same = [name for name, yes in zip(alike, jax.device_get(equal), strict=True) if yes]
    return restructure(params, mine | {name: theirs[name] for name in same})


@jax.jit
def _equal(some: list, others: list) -> list:
    return [jnp.array_equal(a, b) for a, b in zip(some, others, strict=True)]


class _Sampler:
    """Draws the grid of fixed prompts and fixed noise: of a student, each picture beside its
    teacher's."""

    def __init__(
        self,
        work: _Work,
        model: ModelConfig,
        folder: Path,
        stage: str,
        teacher: tuple[ModelConfig, dict] | None,
    ):
        self.work, self.model, self.folder, self.stage = work, model, folder, stage
        self.teacher, self._of_teacher = teacher, None  # pictures, once they are drawn

    def __call__(self, params: dict, step: int) -> Path:
        """Write the grid at this step, and return its file."""
        work = self.work
        if self.teacher is not None and self._of_teacher is None:
            self._of_teacher = self._draw(*self.teacher)
        images, columns = self._draw(self.model, params), None
        if self._of_teacher is not None:
            images, columns = grid.side_by_side([self._of_teacher, images])
        if work.data.encoded:
            work.encoders.release()  # the training has no use for them
        file = self.folder / f"{self.stage}_{step:06d}.png"
        if hosts.first():
            self.folder.mkdir(parents=True, exist_ok=True)
            grid.grid(images, columns).save(file)
        return file

    def _draw(self, model: ModelConfig, params: dict) -> np.ndarray:
        work = self.work
        prompts = work.data.prompts(work.config.sampled_prompts)
        pipe = Pipeline(model, params, encoders=work.encoders, mesh=work.mesh)
        return pipe([prompt.caption for prompt in prompts], seed=work.config.seed)
