"""What the commands of evaluate.py are given; without jax, for --help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from d2m_jax.command_line import Among, AmongProcesses
from d2m_jax.config import check

# Of Sampled, what Pipeline takes under the same name.
OPTIONS = (
    *("height", "width", "steps", "guidance", "seed", "top_k", "reuse", "true_cfg"),
    *("max_sequence_length", "tile"),
)
Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True)
class Account:
    """Parameters and FLOPs."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG_OR_MODEL")]
    json: bool = False  # print JSON instead of a table
    image_tokens: int | None = None  # default: those of the model's images, else 4096
    text_tokens: int | None = None  # default: those of the model's captions, else 77


@dataclass(frozen=True)
class Icons:
    """Scores on the embedded task."""

    models: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="MODEL …")]
    prompts: int = 600  # of combinations seen in training, and as many held out of it
    seed: int = 0  # of the noise
    steps: int | None = None  # default: the model's own
    # Normal experts per token, several for shares of the steps; default: the model's own.
    top_k: tuple[int, ...] | None = None
    reuse: int = 1  # compute the normal experts in every so many-th step only
    quantize: Literal["int8", "fp8"] | None = None  # the large matrices of blocks
    json: bool = False  # print JSON instead of tables


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What is drawn of a model, and by which processes."""

    height: int | None = None  # pixels; what is None here is the model's own
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0  # of the noise: image i has the noise of number i, whatever is drawn with it
    max_sequence_length: int | None = None  # tokens of T5
    batch_size: int | None = None  # images at a time; changes none
    dtype: Literal["bfloat16", "float32"] | None = None  # None: bfloat16, on a CPU float32
    encoders: str | None = None  # a FluxPipeline, for a model that has none
    among: AmongProcesses = Among()


@dataclass(frozen=True, kw_only=True)
class Sampled(Drawn):
    """How images are drawn that somebody will judge."""

    # Normal experts per token, several for shares of the steps; default: the model's own.
    top_k: tuple[int, ...] | None = None
    reuse: int = 1  # compute the normal experts in every so many-th step only
    negative_prompt: str | None = None  # counts where true_cfg > 1
    true_cfg: float = 1.0  # strength of classifier-free guidance, at twice the time
    tile: int | None = None  # decode in tiles of so many latents a side, for large images
    quantize: Literal["int8", "fp8"] | None = None  # the large matrices of blocks

    @property
    def numbers(self) -> dict[str, Any]:
        """Those of Pipeline that options.check_options reads."""
        return {name: getattr(self, name) for name in (*OPTIONS, "batch_size")}

    @property
    def options(self) -> dict[str, Any]:
        """Those of Pipeline that change images."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return options | {"negative_prompts": self.negative_prompt}


@dataclass(frozen=True, kw_only=True)
class Export(Sampled):
    """Images of a benchmark's prompts, in the folders that its scorer reads."""

    scorer: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="geneval|dpg|t2i-compbench|hpsv2|imagereward"),
    ]
    model: Model  # a model directory, a FluxPipeline's folder or its Hugging Face repository
    # The scorer's own: evaluation_metadata.jsonl; dpg_bench/prompts; examples/dataset or one of its
    # files; the folder of anime.json, … or one of them; benchmark-prompts.json.
    prompts: Path
    output: Path  # OUTPUT/images is for the scorer
    images_per_prompt: int | None = None  # default: 4, 4, 10, 1, 10
    name: str | None = None  # ImageReward's for the model; default: the last part of MODEL


@dataclass(frozen=True, kw_only=True)
class Clip(Sampled):
    """CLIP's scores of a model's images, and their distance from a teacher's."""

    model: Model  # a model directory, a FluxPipeline's folder or its Hugging Face repository
    # A CLIPModel's folder as transformers saves it, that of openai/clip-vit-large-patch14 say.
    clip: Path
    prompts: Path  # .txt: one a line; .jsonl, .csv, .tsv, .parquet
    output: Path  # where the images are kept: given again, the same command goes on
    teacher: str | None = None  # another model, whose images of the same noise are compared
    column: str | None = None  # of the prompts; default: prompt, caption or text
    images_per_prompt: int = 1
    json: bool = False  # print JSON instead of lines


@dataclass(frozen=True, kw_only=True)
class Routing(Drawn):
    """Where tokens and samples go while a model draws."""

    model: Model  # a model directory, a FluxPipeline's folder or its Hugging Face repository
    output: Path  # folder for routing.npz, summary.json and pictures
    prompts: Path | None = None  # .txt, .jsonl, .csv, .tsv, .parquet; default: the embedded task's
    column: str | None = None  # of the prompts; default: prompt, caption or text
    group: str | None = None  # another column, by which prompts are told apart: GenEval's tag
    count: int = 120  # prompts at most
    bins: int = 8  # of the steps, in time
    places: int = 32  # cells of a map, either way, at most
    top_k: int | None = None  # normal experts per token; default: the model's own

    @property
    def numbers(self) -> dict[str, Any]:
        """Those of Pipeline that options.check_options reads."""
        names = ("height", "width", "steps", "guidance", "seed", "max_sequence_length")
        found = {name: getattr(self, name) for name in (*names, "batch_size", "top_k")}
        return found


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What each block of a run's teacher is worth, and where groups of a Mixture of Blocks lose
    least."""

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    size: int = 2  # blocks of a group
    active: int = 1  # of them that run
    batches: int = 32  # of data; the second half judges the routers that the first half fitted
    batch_size: int = 64
    micro_batch: int | None = None  # samples whose activations are held at a time; default: all
    output: Path | None = None  # folder for costs.png and costs.json

    def __post_init__(self):
        for name, least in (("size", 2), ("active", 1), ("batches", 2), ("batch_size", 1)):
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            check(value >= least, f"{option} {value}: expected at least {least}")
        check(
            self.active < self.size,
            f"--active {self.active}: expected less than --size {self.size}",
        )
        micro, size = self.micro_batch, self.batch_size
        check(
            micro is None or (micro > 0 and size % micro == 0),
            f"--micro_batch {micro}: expected a divisor of --batch_size {size}",
        )
