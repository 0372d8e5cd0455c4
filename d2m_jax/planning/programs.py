"""The programs of a run, lowered for devices that need not be there, and what lies on the devices
with each: calibration, every stage's step, its validation, its samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from d2m_jax import encoders
from d2m_jax.config import (
    KINDS,
    AutoencoderConfig,
    CacheConfig,
    FluxConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    StageConfig,
)
from d2m_jax.data.source import largest_size
from d2m_jax.distillation.fixed_times import fixed_times
from d2m_jax.distillation.stages import noisy_of
from d2m_jax.models.accounting import flops_per_example
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import names, restructure
from d2m_jax.planning.plan import Phase
from d2m_jax.sampling import pipeline
from d2m_jax.sharding import batch_sharding, parameter_sharding, replicated
from d2m_jax.sparsification import importance, left_out
from d2m_jax.sparsification.depth import meeting, shallower
from d2m_jax.sparsification.groups import aligned, one_by_one, shapes
from d2m_jax.sparsification.routers import blocks_in_groups
from d2m_jax.sparsification.student import micro_batch, student_config, wanted
from d2m_jax.training.optimizer import split
from d2m_jax.training.stage import check_stages, models_of, objective
from d2m_jax.training.step import Step, trained

BFLOAT16 = jnp.dtype(jnp.bfloat16)  # in which encoders and a run's samples are computed
ENCODERS = "text encoders and autoencoder"
RESTACKED = "teacher, as it was stored"


@dataclass(frozen=True)
class Lowered:
    """A stage's step, or the calibration before the first. `parts` are its arguments by what they
    are, none twice, `beside` what else is there meanwhile; FLOPs are those of one call on all
    devices, `recomputed` what rematerialisation adds. `others` lowers what else the stage runs."""

    stage: str
    program: jax.stages.Lowered
    parts: Mapping[str, Any]
    flops: int
    recomputed: int
    beside: Mapping[str, Any]
    others: Callable[[], Iterator[tuple[str, Phase]]]


def lower(config: RunConfig, teacher: ModelConfig | None, mesh: Mesh) -> Iterator[Lowered]:
    """Every stage of a run's student, or of the model that it trains from scratch.

    What is frozen is taken to be stored in the stage's dtype, or in float32 after it has trained;
    frozen parameters that have never trained and that the teacher has too are the teacher's arrays.
    """
    start, before = config.model, set()
    if teacher is not None:
        transformer = student_config(teacher.transformer, config.sparsify)
        start = replace(teacher, transformer=transformer)
    assert start is not None  # a run has a teacher or a model (RunConfig)
    check_stages("", config.stages, start, mesh, config.timesteps, teacher)
    last = start
    for name, stage, model in models_of(config.stages, start):
        yield _Stage(config, name, stage, last, model, teacher, before, mesh).lowered()
        last = model
        training, _ = split(abstract(model.transformer), stage.train, stage.freeze)
        before |= {_of_any_stack(path) for path in names(training)}


def calibration(config: RunConfig, teacher: ModelConfig, mesh: Mesh) -> Lowered:
    """Calibration of one batch (sparsification/importance.py), the teacher being stored as the
    first stage computes."""
    cut, stage = config.sparsify, next(iter(config.stages.values()))
    student = student_config(teacher.transformer, cut)
    measured = aligned(shallower(teacher.transformer, cut), shapes(student))
    params = _placed(mesh, abstract(measured), stage.dtype)
    grid = teacher.grid(*largest_size(config.data, teacher))
    batch = _batch(teacher, cut.batch_size, stage.dtype, mesh, grid)
    want, size = wanted(cut), cut.batch_size
    noisy = noisy_of(teacher, config.timesteps, config.guidance)
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        program = importance.measure.lower(
            params,
            batch,
            _key(mesh),
            config=measured,
            noisy=noisy,
            counts=importance.tokens_of(size * cut.batches, cut.tokens, cut.text_share),
            want=want,
            parts=size // micro_batch(cut, config.stages),
        )
    text = teacher.text.length
    forward = flops_per_example(teacher.transformer, math.prod(grid), text) * size
    backward = 2 * ("taylor" in want)  # towards weights and activations, then towards the latter
    squares = "sensitivity" in want or "weights" in want
    backward += importance.PROJECTIONS * squares
    forwards = ("taylor" in want) + (squares or "inputs" in want)
    again = ("taylor" in want) + importance.PROJECTIONS * squares
    return Lowered(
        "start",
        program,
        {"teacher": params, "batch": batch},
        (forwards + backward) * forward,
        again * forward,
        _encoders(config, teacher, mesh) | _restacked(teacher, student, stage.dtype, mesh),
        lambda: iter(()),
    )


class _Stage:
    """One stage: trees of shapes and places, and the programs that take them."""

    def __init__(
        self,
        config: RunConfig,
        name: str,
        stage: StageConfig,
        start: ModelConfig,
        model: ModelConfig,
        teacher: ModelConfig | None,
        before: set[str],
        mesh: Mesh,
    ):
        self.config, self.name, self.stage, self.mesh = config, name, stage, mesh
        self.start, self.model, self.same = start, model, None
        self.trained = frozenset(before)
        params, constants = _placed(mesh, abstract(model.transformer), stage.dtype, before), {}
        self.beside = _encoders(config, model, mesh)
        if teacher is not None:
            transformer = meeting(teacher.transformer, model.transformer)
            self.same = replace(teacher, transformer=transformer)
            constants = _placed(mesh, abstract(transformer), stage.dtype)
            theirs = names(constants)
            shared = {
                path: theirs[path] if theirs.get(path) == leaf else leaf
                for path, leaf in names(params).items()
            }
            params = restructure(params, shared)
            self.beside |= _restacked(teacher, transformer, stage.dtype, mesh)
        self.grid = model.grid(*largest_size(config.data, model))
        loss, self.count, self.again = objective(
            model, stage, self.same, config.timesteps, math.prod(self.grid)
        )
        self.step = Step(stage, loss, params, constants, mesh)
        self.constants, self.state = constants, self.step.state
        self.batch = _batch(model, stage.batch_size, stage.dtype, mesh, self.grid)

    def lowered(self) -> Lowered:
        """The step. The next batch is made while it runs."""
        everywhere = jax.sharding.NamedSharding(
            self.mesh, jax.sharding.PartitionSpec(self.mesh.axis_names)
        )
        signals = jax.ShapeDtypeStruct((self.mesh.size,), np.int32, sharding=everywhere)
        state, frozen = self.state, self.step.frozen
        arguments = state, frozen, self.constants, self.batch, _key(self.mesh), signals
        with jax.set_mesh(self.mesh):
            program = self.step.train().lower(*arguments)
        size, held = self.stage.batch_size, self.config.held_out_batches
        return Lowered(
            self.name,
            program,
            self._models(state["trainable"]) | {"batch": self.batch},
            size * self.count,
            size * self.again,
            {"next batch": self.batch, "held-out batches": [self.batch] * held} | self.beside,
            self.others,
        )

    def _models(self, student: dict) -> dict[str, Any]:
        rest = {n: part for n, part in self.state.items() if part is not student}
        return {
            "teacher": self.constants,
            "student, frozen": self.step.frozen,
            "student, trains": student,
            "optimizer": rest,
        }

    def others(self) -> Iterator[tuple[str, Phase]]:
        """What runs before the first step and between steps: what it does not read of the state
        lies beside it."""
        if self.stage.groups is not None and self.stage.groups.router == "fitted":
            yield "fitting routers", self._routers()
        held = self.config.held_out_batches
        models = self._models(trained(self.state))
        kept = {"optimizer": models.pop("optimizer"), "next batch": self.batch} | self.beside
        three = trained(self.state), self.step.frozen, self.constants
        with jax.set_mesh(self.mesh):
            yield from self._encoding(models | kept | {"held-out batches": [self.batch] * held})
            if held:
                parts = models | {"batch": self.batch}
                beside = kept | {"held-out batches": [self.batch] * (held - 1)}
                asked = *three, self.batch, _key(self.mesh)
                yield "validation", Phase(self.step.evaluate().lower(*asked), parts, beside)
                if self.config.fixed_times:
                    fixed = fixed_times(self.model, self.stage, self.same)
                    numbers = (_scalar(self.mesh, dtype) for dtype in (np.int32, np.float32))
                    program = self.step.at_fixed_times(fixed).lower(*asked, *numbers)
                    yield "validation at fixed times", Phase(program, parts, beside)
            if self.stage.sample_every:
                beside = kept | {"held-out batches": [self.batch] * held}
                beside.pop(ENCODERS, None)
                yield from self._samples(models, beside, self.step.whole(*three))

    def _encoding(self, beside: dict[str, Any]) -> Iterator[tuple[str, Phase]]:
        """The next batch's captions and images, where they come from no cache."""
        model, loaded = self.model, self.beside.get(ENCODERS, {})
        of = partial(_by_batch, self.mesh, self.stage.batch_size)
        if "t5" in loaded:
            assert isinstance(model.text, PromptsConfig)  # who has T5
            lengths = {"t5": model.text.length, "clip": model.text.clip.max_position_embeddings}
            ids = {name: of(length, dtype=np.int32) for name, length in lengths.items()}
            run = partial(encoders.encoding_captions.lower, model, BFLOAT16)
            yield "encoding captions", _of_encoders(run, loaded, ("t5", "clip"), ids, beside)
        if "autoencoder" in loaded:
            sides = (side * model.image.stride for side in self.grid)
            image = of(*sides, 3, dtype=np.uint8)
            run = partial(encoders.encoding_images.lower, model, BFLOAT16)
            yield "encoding images", _of_encoders(run, loaded, ("autoencoder",), image, beside)

    def _routers(self) -> Phase:
        """A batch of what routers are fitted to (sparsification/routers.py)."""
        stage, mesh = self.stage, self.mesh
        measured = one_by_one(self.start.transformer)
        params = _placed(mesh, abstract(measured), stage.dtype, self.trained)
        noisy = noisy_of(self.start, self.config.timesteps, self.config.guidance)
        blocks = blocks_in_groups(self.model.transformer)
        with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
            program = left_out.measure.lower(
                *(params, self.batch, _key(mesh)),
                *(measured, noisy, blocks, stage.optimizer.accumulate),
            )
        beside = {"teacher": self.constants} | self.beside
        return Phase(program, {"student": params, "batch": self.batch}, beside)

    def _samples(
        self, models: dict[str, Any], beside: dict[str, Any], params: dict
    ) -> Iterator[tuple[str, Phase]]:
        """The student's grid of prompts, by training.run's pipeline; encoders are there for it even
        where the data come from a cache."""
        loaded, model = encoders.abstract(self.model, self.mesh), self.model
        rows, columns = grid = model.grid()  # pictures have the model's own size
        size = self.config.sampled_prompts
        size = pipeline.images_together(self.mesh, size, rows * columns)
        transformer, of = model.transformer, partial(_by_batch, self.mesh, size)
        latents = of(rows * columns, transformer.in_channels)
        txt = of(model.text.length, transformer.context_in_dim, dtype=BFLOAT16)
        y = of(transformer.vec_in_dim, dtype=BFLOAT16)
        steps = -(-model.sample_steps // pipeline.STEPS) * pipeline.STEPS
        program = pipeline.denoising.lower(
            *(model, BFLOAT16, grid, (None,), 1, params, latents, (0, 1), [(txt, y)]),
            *(np.zeros(steps + 1, np.float32), 1, 1.0, 1.0),
        )
        mine = {id(leaf) for leaf in jax.tree.leaves(params)}
        rest = [leaf for leaf in jax.tree.leaves(self.constants) if id(leaf) not in mine]
        parts = {"student": params, "batch": [latents, txt, y]}
        yield "samples", Phase(program, parts, beside | {"teacher": rest, ENCODERS: loaded})
        if isinstance(model.image, AutoencoderConfig):
            sides = model.image.height, model.image.width
            run = partial(encoders.decoding.lower, model, BFLOAT16, sides, None)
            beside = beside | models
            yield "decoding", _of_encoders(run, loaded, ("autoencoder",), latents, beside)


def _of_encoders(
    run: Callable[[dict, Any], jax.stages.Lowered],
    loaded: dict[str, dict],
    needed: tuple[str, ...],
    batch: Any,
    beside: dict[str, Any],
) -> Phase:
    """A phase that some of the loaded encoders are arguments of; the others are there too."""
    mine = {part: loaded[part] for part in needed}
    rest = {part: tree for part, tree in loaded.items() if part not in mine}
    return Phase(run(mine, batch), mine | {"batch": batch}, beside | {ENCODERS: rest})


def _encoders(config: RunConfig, model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """What encodes batches, where data do not come from a cache."""
    sources = config.data, config.validation or config.data
    cached = all(isinstance(source, CacheConfig) for source in sources)
    found = {} if cached else encoders.abstract(model, mesh)
    return {ENCODERS: found} if found else {}


def _restacked(
    teacher: ModelConfig, student: FluxConfig, dtype: DTypeLike, mesh: Mesh
) -> dict[str, Any]:
    """Stacks of the teacher that its student has in another shape, or shorter, are there beside
    those that the student meets."""
    params, twice = _placed(mesh, abstract(teacher.transformer), dtype), []
    for kind in KINDS:
        old, new = (_starts(shapes(config)[kind]) for config in (teacher.transformer, student))
        twice += [params[kind][i] for i, stack in enumerate(old) if stack not in new]
    return {RESTACKED: twice} if twice else {}


def _starts(stacks: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """The first block of every stack, its groups, the blocks of one."""
    ends = accumulate(groups * blocks for groups, blocks in stacks)
    return [(end - g * b, g, b) for end, (g, b) in zip(ends, stacks, strict=True)]


def _of_any_stack(path: str) -> str:
    """A parameter's name without the number of its stack, which regrouping blocks changes."""
    kind, *rest = path.split(".")
    return ".".join([kind, *rest[1:]]) if kind in KINDS else path


def _placed(
    mesh: Mesh, tree: dict, dtype: DTypeLike, trained: set[str] | frozenset[str] = frozenset()
) -> dict:
    """Parameters where they lie, in this type; in float32 what has trained."""

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        mine = jnp.float32 if _of_any_stack(path) in trained else dtype
        sharding = parameter_sharding(mesh, path, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, mine, sharding=sharding)

    return restructure(tree, {path: place(path, leaf) for path, leaf in names(tree).items()})


def _scalar(mesh: Mesh, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def _batch(
    model: ModelConfig, size: int, dtype: DTypeLike, mesh: Mesh, grid: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """An encoded batch (Encoders.encode)."""
    transformer, of = model.transformer, partial(_by_batch, mesh, size)
    return {
        "latents": of(*grid, transformer.in_channels),
        "txt": of(model.text.length, transformer.context_in_dim, dtype=dtype),
        "y": of(transformer.vec_in_dim, dtype=dtype),
        "text_length": of(dtype=jnp.int32),
    }


def _by_batch(
    mesh: Mesh, size: int, *shape: int, dtype: DTypeLike = np.float32
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=batch_sharding(mesh))
