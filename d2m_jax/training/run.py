"""A whole run: a teacher from scratch, or a student and its rivals from one, stage after stage."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from d2m_jax import grid, hosts, progress
from d2m_jax.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    StageConfig,
    StudentConfig,
    check,
    differences,
    teacher_path,
    to_json,
)
from d2m_jax.data.protocol import Data
from d2m_jax.data.source import open_data, with_vocabulary
from d2m_jax.distillation.stages import NO_LENGTHS
from d2m_jax.encoders import Encoders
from d2m_jax.models.flux import initialise
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.sharding import (
    check_mesh,
    make_mesh,
)
from d2m_jax.sparsification.student import micro_batch
from d2m_jax.training.checkpoint import open_run
from d2m_jax.training.stage import (
    Start,
    Work,
    check_stages,
    checked_student,
    cut_student,
    models_of,
    train_model,
)
from d2m_jax.training.tracking import Tracker, tracked
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.torch_files.diffusers_folder import parts

KEPT = "the last whole checkpoint is kept, start again to go on from it"


def _open(config: RunConfig, mesh: Mesh, model: ModelConfig, tracker: Tracker | None) -> Work:
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
    stages = [stage for one in students for stage in one.stages.values()]
    counted = all(stage.count_padding for stage in stages)
    check(counted or (data.tells_padding and validation.tells_padding), NO_LENGTHS)
    if any(stage.sample_every for stage in stages):
        there = model.encoders is not None and Path(model.encoders).is_dir()
        found = f"ModelConfig.encoders = {model.encoders}"
        check(
            there or not parts(model),
            f"{found}: no such folder, and sample_every needs it to draw samples",
        )
        prompts = data.prompts(config.sampled_prompts)
        check(len(prompts) > 0, "sample_every: the data have no prompts, expected at least one")
        encoders.check([prompt.caption for prompt in prompts])
    return Work(config, mesh, encoders, data, validation, tracker)


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
    model = model_directory.load_config(teacher_path(config.teacher))
    _check_students(config, model, mesh)
    work, teacher = with_teacher(config, mesh, tracker, ahead)
    students = [(run_directory / "rivals" / name, rival) for name, rival in config.rivals.items()]
    students.append((run_directory, StudentConfig(config.sparsify, config.stages)))
    names = [*config.rivals, config.name]
    if config.rivals:
        hosts.say(_outlook(names, [student for _, student in students]))
    for i, (directory, student) in enumerate(students):
        done = ", trained already" if _exists(directory / "model") else ""
        if config.rivals or done:
            hosts.say(f"student {i + 1} of {len(students)}: {names[i]}{done}")
        same = (where for where, other in students[:i] if _cut_alike(other, student))
        start = partial(_cut, work, teacher, student, next(same, None))
        _train(work, directory, start, student.stages, teacher)


def _outlook(names: Sequence[str], students: Sequence[StudentConfig]) -> str:
    """What a run is going to do, for one line."""
    steps = [sum(stage.steps for stage in student.stages.values()) for student in students]
    each = ", ".join(f"{name} ({count:,})" for name, count in zip(names, steps, strict=True))
    return (
        f"{len(students)} students are made of the teacher, one after the other, with so many steps"
        f" of training: {each}; then a report compares them"
    )


def with_teacher(
    config: RunConfig, mesh: Mesh, tracker: Tracker | None = None, ahead: Ahead | None = None
) -> tuple[Work, Start]:
    """What trainings of a run with a teacher share, and the teacher. ConfigError for data that this
    teacher cannot read."""
    assert config.teacher is not None
    path = teacher_path(config.teacher)
    model = model_directory.load_config(path)
    work = _open(config, mesh, model, tracker)
    if ahead is not None:
        ahead(model, work.data, work.validation, work.encoders)
    return work, (*work.load(path), model_directory.load_cut(path, model.transformer))


def _start(work: Work, model: ModelConfig) -> Start:
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
        model = checked_student(f"{where}sparsify", teacher, student.sparsify, mesh)
        check_stages(where, student.stages, model, mesh, config.timesteps, teacher)


def _cut_alike(one: StudentConfig, other: StudentConfig) -> bool:
    """Whether two students of a run are the same before any training, to the bit."""
    same = micro_batch(one.sparsify, one.stages) == micro_batch(other.sparsify, other.stages)
    return one.sparsify == other.sparsify and same


def _cut(work: Work, teacher: Start, student: StudentConfig, alike: Path | None = None) -> Start:
    """The student before any training; `alike` is where one trained that began as the same."""
    if alike is not None:
        hosts.say(f"is cut as {alike.name} was: begins with the same model")
        path = alike / "models" / "start"
        model, params = work.load(path)
        return model, params, model_directory.load_cut(path, model.transformer)
    micro = micro_batch(student.sparsify, student.stages)
    return cut_student(work, teacher, student.sparsify, micro)


def _train(
    work: Work,
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
            config = model_directory.load_config(models / before)
            ((_, _, model),) = models_of({name: stage}, config)
            params = train_model(
                work,
                name,
                stage,
                (config, lambda path=models / before: work.load(path)[1]),
                cut,
                teacher,
                run_directory=directory,
                sample=_Sampler(work, model, directory / "samples", name, teacher and teacher[:2]),
                boards=() if work.tracker is None else (work.tracker.stage(directory, name),),
            )
            model_directory.save(models / name, model, params, cut=cut)
            del params
        before = name
    if not _exists(directory / "model"):
        model_directory.save(directory / "model", *work.load(models / before), cut=cut)


def _exists(path: Path) -> bool:
    """Told by the first process: it may write the path before others look."""
    return hosts.by_first(path.exists)


class _Sampler:
    """Draws the grid of fixed prompts and fixed noise: of a student, each picture beside its
    teacher's."""

    def __init__(
        self,
        work: Work,
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
