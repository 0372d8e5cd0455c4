"""The whole method in Python, by the code that the scripts run (docs/python.md).

    teacher = d2m_jax.load_pipeline("teachers/pictograms")
    data = d2m_jax.config.IconsConfig()
    student = d2m_jax.sparsify(teacher, data)
    student = d2m_jax.distill(student, teacher, data, steps=500)
    d2m_jax.compare(["two green anchor", "red earth"], teacher, student)
    student.save("models/student")

Teachers and students are pipelines, which draw images when they are called. None is changed: what
is trained is a new one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from d2m_jax import grid
from d2m_jax.command_line import config_file, load_config
from d2m_jax.config import (
    CacheConfig,
    FluxConfig,
    ModelConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
    Timesteps,
    check,
    teacher_path,
)
from d2m_jax.data.generate import generate as generate_cache
from d2m_jax.data.given import Given, Handed, cache_of, opened
from d2m_jax.data.prompt_files import prompts_of
from d2m_jax.evaluate.watch import watch
from d2m_jax.evaluate.watch_run import Watched
from d2m_jax.models import accounting
from d2m_jax.sampling.options import check_options
from d2m_jax.sampling.pipeline import Pipeline, load_pipeline
from d2m_jax.sparsification.student import student_config
from d2m_jax.training.stage import (
    Work,
    check_stages,
    checked_student,
    cut_student,
    models_of,
    train_model,
)
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import hub

# (step, metrics of the steps since the last call, the student as it is) after some of the steps.
Callback = Callable[[int, Mapping[str, Any], Pipeline], Any]


def from_hub(repository: str, **options: Any) -> Pipeline:
    """The pipeline of a repository of Hugging Face, OWNER/NAME or OWNER/NAME@REVISION; `options`
    are those of load_pipeline. ConfigError for what is no such name, and what cannot be loaded."""
    named = hub.REPOSITORY.fullmatch(repository) is not None
    check(named, f"{repository}: expected OWNER/NAME of Hugging Face")
    return load_pipeline(repository, **options)


def sparsify(
    teacher: Pipeline,
    data: Given,
    config: SparsifyConfig = SparsifyConfig(),
    *,
    seed: int = 0,
    timesteps: Timesteps = "uniform",
    guidance: tuple[float, float] | None = None,
    micro_batch: int | None = None,
) -> Pipeline:
    """The student that `config` says, cut from the teacher, untrained; the same seed, the same one.

    `data` calibrates: a config of data, the folder of a cache, an iterable of batches (raw, image
    uint8 [b, H, W, 3] and text, or encoded: data/protocol.py), or prompts, of which the teacher
    then samples images first. `timesteps` and `guidance` are RunConfig's; `micro_batch` are the
    samples whose activations are held at a time (None: a batch's). ConfigError where sizes do not
    fit.
    """
    given = type(config).__name__
    check(isinstance(config, SparsifyConfig), f"config: found {given}, expected a SparsifyConfig")
    check_options(seed=seed)
    found = opened(data, teacher)
    if isinstance(found, Handed):
        config = replace(config, batch_size=found.count)
    work = _work(teacher, found, seed=seed, timesteps=timesteps, guidance=guidance)
    fits = micro_batch is None or config.batch_size % micro_batch == 0
    check(
        fits,
        f"micro_batch = {micro_batch}: expected a divisor of the batch's size, {config.batch_size}",
    )
    checked_student("sparsify", teacher.config, config, work.mesh)
    start = teacher.config, teacher.whole(), teacher.cut
    return _like(teacher, *cut_student(work, start, config, micro_batch))


def distill(
    student: Pipeline,
    teacher: Pipeline,
    data: Given,
    stage: StageConfig = StageConfig(),
    *,
    steps: int | None = None,
    every: int | None = None,
    callback: Callback | None = None,
    name: str = "distill",
    run_directory: Path | str | None = None,
    seed: int = 0,
    timesteps: Timesteps = "uniform",
    guidance: tuple[float, float] | None = None,
    validation_batches: int = 2,
) -> Pipeline:
    """The student after one stage of training on the teacher's outputs, with a progress bar.

    `stage` says what trains, on which losses, how fast, and whether blocks form groups before
    (StageConfig.groups: a Mixture of Blocks); `steps` and `every` are its `steps` and
    `evaluate_every`, by which it validates and calls `callback(step, metrics, student)`: that
    student can be used inside the call alone. Data are as in `sparsify`; batches of an iterable
    validate nothing. With a `run_directory` there are checkpoints, from which a second call with
    the same arguments goes on to the same bits, and metrics.jsonl and curves for TensorBoard.
    Interrupted (SIGINT) it gives the student as it is; with a run directory it saves, and exits
    with code 130. ConfigError for what cannot go well, before it trains.
    """
    given = type(stage).__name__
    check(isinstance(stage, StageConfig), f"stage: found {given}, expected a StageConfig")
    check_options(seed=seed)
    found = opened(data, teacher)
    stage = replace(stage, steps=stage.steps if steps is None else steps)
    stage = replace(stage, evaluate_every=stage.evaluate_every if every is None else every)
    if isinstance(found, Handed):
        stage = replace(stage, batch_size=found.count)
        validation_batches = 0
    called = None
    if callback is not None:  # at evaluate_every, or at the end alone
        stage = replace(stage, sample_every=stage.evaluate_every or stage.steps)
    options = {"timesteps": timesteps, "guidance": guidance}
    work = _work(teacher, found, seed=seed, held_out_batches=validation_batches, **options)
    check_stages("", {name: stage}, student.config, work.mesh, timesteps, teacher.config)
    ((_, _, model),) = models_of({name: stage}, student.config)
    if callback is not None:
        called = _Called(callback, lambda params: _like(student, model, params, student.cut))
    params = train_model(
        work,
        name,
        stage,
        (student.config, student.whole),
        student.cut,
        (teacher.config, teacher.whole(), teacher.cut),
        run_directory=None if run_directory is None else Path(run_directory),
        sample=called,
        boards=() if called is None else (called,),
    )
    return _like(student, model, params, student.cut)


class _Called:
    """A callback, as the training loop knows those who watch it: it is told the metrics, and then,
    where it would draw a sample, given the parameters."""

    def __init__(self, callback: Callback, student_of: Callable[[dict], Pipeline]):
        self.callback, self.student_of = callback, student_of
        self._metrics: Mapping[str, Any] = {}

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._metrics = values

    def picture(self, step: int, file: Path) -> None:
        """None is drawn."""

    def __call__(self, params: dict, step: int) -> None:
        self.callback(step, self._metrics, self.student_of(params))


def _work(teacher: Pipeline, data: Any, **fields: Any) -> Work:
    """What a training shares with all others; encoders are let go of where nothing needs them."""
    if data.encoded:
        teacher.encoders.release()
    config = RunConfig("python", model=teacher.config, stages={"python": StageConfig()}, **fields)
    return Work(config, teacher.mesh, teacher.encoders, data, data)


def _like(pipe: Pipeline, config: ModelConfig, params: dict, cut: Any) -> Pipeline:
    """Another model with the same encoders, on the same devices."""
    return Pipeline(config, params, encoders=pipe.encoders, mesh=pipe.mesh, cut=cut)


def generate(
    teacher: Pipeline,
    prompts: Sequence[str] | Path | str,
    folder: Path | str,
    **options: Any,
) -> CacheConfig:
    """A cache that the teacher samples of prompts, or of a file of them: data for `sparsify` and
    `distill`. Called again it goes on where it was stopped.

    `options` are those of data/generate.py's function: images_per_prompt, sizes, steps, guidance,
    seed, trajectory, padding, batch_size.
    """
    if isinstance(prompts, str | Path):
        prompts = prompts_of(Path(prompts))
    counts = generate_cache(teacher, list(prompts), Path(folder), **options)
    return cache_of(Path(folder), sum(counts.values()))


def account(
    source: Pipeline | FluxConfig | ModelConfig | RunConfig | Path | str,
    image_tokens: int | None = None,
    text_tokens: int | None = None,
) -> accounting.Account:
    """Parameters, activated parameters and FLOPs of a model; printed, it is a table.

    `source` is a pipeline, a config, a model directory, a Python file with get_config(), or the
    name of one that comes with the package. The tokens are those of one example
    (models/accounting.py). Of a run with a teacher it counts the student that its stages leave.
    ConfigError where the teacher is not there, or the config is another.
    """
    config: Any = source.config if isinstance(source, Pipeline) else source
    if isinstance(config, Path | str):
        file = config_file(config).suffix == ".py"
        config = load_config(config) if file else model_directory.load_config(config)
    if isinstance(config, RunConfig):
        config = config.model or _student_of(config)
    found = type(config).__name__
    check(
        isinstance(config, FluxConfig | ModelConfig),
        f"{source}: holds a {found}, expected the config of a model or of a run",
    )
    return accounting.account(config, image_tokens, text_tokens)


def _student_of(run: RunConfig) -> ModelConfig:
    """The student of a run with a teacher, after its last stage."""
    assert run.teacher is not None  # RunConfig has one of the two
    teacher = model_directory.load_config(teacher_path(run.teacher))
    start = replace(teacher, transformer=student_config(teacher.transformer, run.sparsify))
    *_, (_, stage, model) = models_of(run.stages, start)
    return model.running(stage.top_k)


def compare(prompts: str | Sequence[str], *models: Pipeline, **options: Any) -> Image.Image:
    """One picture: for every prompt what each of the models draws, in their order side by side,
    from the same noise. `options` are those of a pipeline's call, such as seed and steps."""
    check(len(models) > 0, "models: expected at least one, found none")
    images, columns = grid.side_by_side([model(prompts, **options) for model in models])
    return grid.grid(images, columns)


def routing(model: Pipeline, prompts: Sequence[str] | Mapping[str, str], **options: Any) -> Watched:
    """Which experts and blocks a model chooses while it draws these prompts, by place, time and
    group of prompts; printed, a few lines.

    `prompts` are strings, or groups by prompt ({"a red fox": "animals", …}). `options` are those of
    evaluate/watch.py's function: height, width, steps, guidance, seed, bins, places, top_k, …
    """
    bins, places = options.pop("bins", 8), options.pop("places", 32)
    check_options(**options)
    groups = prompts if isinstance(prompts, Mapping) else dict.fromkeys(prompts, "")
    return Watched(*watch(model, list(groups.items()), bins=bins, places=places, **options))
