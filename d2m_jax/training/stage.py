"""One stage of one model: what is cut from a teacher before it, what it trains, and on which loss.

A run (run.py) and the Python face (api.py) train by it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from d2m_jax import hosts
from d2m_jax.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
    Timesteps,
    at_path,
    check,
)
from d2m_jax.data.protocol import Batches, Data, Split
from d2m_jax.distillation.fixed_times import fixed_times
from d2m_jax.distillation.objective import Objective
from d2m_jax.distillation.stages import distill_loss, flow_loss, noisy_of
from d2m_jax.encoders import Encoders
from d2m_jax.keys import named_key
from d2m_jax.models.accounting import flops_per_example
from d2m_jax.models.cut import Cut, composed
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import names, nested, restructure
from d2m_jax.sharding import (
    batch_shards,
    check_mesh,
    own_rows,
    parameter_sharding,
    put_batch,
    put_parameters,
)
from d2m_jax.sparsification.depth import meeting
from d2m_jax.sparsification.groups import align, grouped, regroup, shapes
from d2m_jax.sparsification.importance import Noisy
from d2m_jax.sparsification.left_out import leave_out
from d2m_jax.sparsification.routers import blocks_in_groups, fit_routers, with_routers
from d2m_jax.sparsification.student import make_student, student_config
from d2m_jax.training.loop import check_batch, train_stage
from d2m_jax.training.metrics import Board
from d2m_jax.training.step import Step
from d2m_jax.training.tracking import Tracker
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import safetensors

Start = tuple[ModelConfig, dict, Cut]


@dataclass(frozen=True)
class Work:
    """What all trainings of one run share. Of `config` it reads no model and no stages."""

    config: RunConfig
    mesh: Mesh
    encoders: Encoders
    data: Data
    validation: Data  # the same, or the data that the config names
    tracker: Tracker | None = None

    def load(self, path: Path | str) -> tuple[ModelConfig, dict]:
        """A model directory onto the mesh, as it is stored."""
        return model_directory.load(path, None, partial(parameter_sharding, self.mesh))

    def batches(self, size: int, split: Split = "train") -> Batches:
        """Batches, of which this process draws the rows that it needs."""
        data = self.data if split == "train" else self.validation
        rows = own_rows(self.mesh, size)
        return data.batches(self.encoders.tokenizer, size, self.config.seed, split, rows)

    def encoded(self, size: int) -> Iterator[dict]:
        """Batches on the mesh, encoded."""
        for batch in self.batches(size):
            yield self.encoders.encode(put_batch(self.mesh, batch))

    def noisy(self, model: ModelConfig) -> Noisy:
        """What calibration draws of a batch for a model."""
        return noisy_of(model, self.config.timesteps, self.config.guidance)


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


def checked_student(
    where: str, teacher: ModelConfig, sparsify: SparsifyConfig, mesh: Mesh
) -> ModelConfig:
    """The student's config. ConfigError where it cannot be cut on this mesh; `where` is the path of
    `sparsify` in the run's config."""
    transformer = student_config(teacher.transformer, sparsify)
    size, shards = sparsify.batch_size, batch_shards(mesh)
    check(
        size % shards == 0,
        f"{where}.batch_size = {size}: expected a multiple of the mesh's data · fsdp · expert ="
        f" {shards}",
    )
    return replace(teacher, transformer=transformer)


def cut_student(
    work: Work, teacher: Start, sparsify: SparsifyConfig, micro_batch: int | None = None
) -> Start:
    """The student before any training, its neurons' places those in the dense model from which the
    teacher may have been cut itself; `micro_batch` as make_student has it."""
    model, params, cut = teacher
    with jax.set_mesh(work.mesh):
        made = make_student(
            model,
            params,
            sparsify,
            work.encoded(sparsify.batch_size),
            work.noisy(model),
            work.config.seed,
            hosts.say,
            micro_batch,
        )
    return *made[:2], composed(cut, made[2], made[0].transformer)


def train_model(
    work: Work,
    name: str,
    stage: StageConfig,
    before: tuple[ModelConfig, Callable[[], dict]],
    cut: Cut,
    teacher: Start | None = None,
    *,
    run_directory: Path | None,
    sample: Callable[[dict, int], Path | None] | None = None,
    boards: Sequence[Board] = (),
) -> dict:
    """The parameters of the stage's model (models_of), trained; `before` is the model that it
    begins with, which has this cut. The rest is train_stage's."""
    config, (start_config, load) = work.config, before
    ((_, _, model),) = models_of({name: stage}, start_config)
    constants, same = {}, None
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
        params = load()
        if stage.groups is not None:
            routers = {}  # before blocks are copied into groups
            if stage.groups.router == "fitted":
                routers = _routers(work, name, stage, start_config, params, run_directory)
            params = regroup(start_config.transformer, params, stage.groups, config.seed)[1]
            params = with_routers(params, routers)
        return share(params, constants)

    held_out = []
    if config.held_out_batches:
        validation = work.batches(stage.batch_size, "validation")
        held_out = list(islice(validation, config.held_out_batches))
    return train_stage(
        name,
        stage,
        loss=loss,
        params=start,
        constants=constants,
        batches=work.batches(stage.batch_size),
        validation=held_out,
        fixed=fixed_times(model, stage, same) if config.fixed_times else None,
        encode=work.encoders.encode,
        run_directory=run_directory,
        seed=config.seed,
        flops_per_example=flops,
        sample=sample,
        boards=boards,
        keep=config.keep_checkpoints,
        mesh=work.mesh,
    )


def _routers(
    work: Work,
    name: str,
    stage: StageConfig,
    start: ModelConfig,
    params: dict,
    run_directory: Path | None,
) -> dict:
    """Routers of the stage's groups, fitted to the model that it begins with; kept in the run
    directory, for they take many forwards and are asked for whenever the stage goes on."""
    assert stage.groups is not None
    model = grouped(start.transformer, stage.groups)
    file = run_directory and run_directory / "routers" / f"{name}.safetensors"
    if file is not None and hosts.by_first(file.exists):
        return hosts.from_first(
            lambda: nested({name: np.asarray(a) for name, a in safetensors.read(file).items()})
        )
    hosts.say(f"{name}: routers are fitted to what leaving out each block costs")
    with jax.set_mesh(work.mesh):
        found = leave_out(
            start.transformer,
            params,
            work.encoded(stage.batch_size),
            work.noisy(start),
            named_key(work.config.seed, f"{name}.routers"),
            count=stage.groups.batches,
            blocks=blocks_in_groups(model),
            micro_batch=stage.batch_size // stage.optimizer.accumulate,
        )
    routers = hosts.from_first(partial(fit_routers, model, found))
    if file is not None and hosts.first():
        file.parent.mkdir(parents=True, exist_ok=True)
        safetensors.write(file, names(routers))
    return routers


def objective(
    model: ModelConfig,
    stage: StageConfig,
    teacher: ModelConfig | None,
    timesteps: Timesteps,
    image_tokens: int | None = None,
    guidance: tuple[float, float] | None = None,
) -> tuple[Objective, int, int]:
    """A stage's loss, and the FLOPs of one example: the step's, and what rematerialisation adds.
    `teacher` is in stacks that meet the model's (sparsification.depth.meeting). Without
    `image_tokens` they are those of the model's own image size."""
    tokens = math.prod(model.grid()) if image_tokens is None else image_tokens
    count = partial(flops_per_example, image_tokens=tokens, text_tokens=model.text.length)
    student = model.transformer
    drawn = stage.random_top_k or (student.moe.top_k if stage.top_k is None else stage.top_k,)
    running = [student.running(k) for k in drawn]
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
