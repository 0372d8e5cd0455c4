"""A run: data, stages, losses, how a student is cut, the mesh."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from d2m_jax.config.data import DataConfig, IconsConfig
from d2m_jax.config.errors import check, check_number, check_seed, check_whole
from d2m_jax.config.fields import Config
from d2m_jax.config.models import ModelConfig, MoEConfig

Timesteps = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """AdamW with a schedule; rates in steps of the stage."""

    learning_rate: float = 1e-3  # the highest, after the warm-up
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up
    warmup: int = 50  # steps of a rate that grows from 0
    final_rate: float = 0.0  # the share of learning_rate that is left at the end
    weight_decay: float = 0.0  # of AdamW
    b1: float = 0.9  # of AdamW: decay of the mean gradient
    b2: float = 0.99  # of AdamW: decay of the mean squared gradient
    clip: float = 1.0  # global norm; 0 turns clipping off
    accumulate: int = 1  # micro-batches per step
    ema: float = 0.0  # decay of the running average that is evaluated and saved; 0 turns it off
    rates: Mapping[str, float] = field(default_factory=dict)  # name pattern → factor on the rate

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 0, "warmup")
        check_whole(self, 1, "accumulate")
        check_number(self, "learning_rate", "final_rate", "weight_decay", "clip", least=0)
        check_number(self, "b1", "b2", "ema", least=0, below=1)
        for pattern, rate in self.rates.items():
            finite = 0 <= rate < math.inf
            check(finite, f"OptimizerConfig.rates[{pattern!r}] = {rate}: expected at least 0")


@dataclass(frozen=True)
class LossConfig(Config):
    """Weights of a stage's losses (docs/method.md); 0 leaves a loss out of the program."""

    output: float = 1.0  # of the velocity's distance from the teacher's
    feature: float = 1.0  # of what every block gives, from what the teacher's gives
    balance: float = 1e-2  # of how unevenly experts are chosen
    block_balance: float = 1e-2  # of how unevenly the blocks of a group are

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "output", "feature", "balance", "block_balance", least=0)


@dataclass(frozen=True)
class StageConfig(Config):
    """One stage of training: what trains, on which losses, for how long."""

    steps: int = 1000
    batch_size: int = 64  # examples of a step, on all devices together
    train: tuple[str, ...] = ("*",)  # name patterns (fnmatch on dotted parameter names)
    freeze: tuple[str, ...] = ()  # taken out of train
    top_k: int | None = None  # normal experts per token while it trains; None: the model's own
    # In the place of top_k: every sample of a step draws its own from these, so that all serve.
    random_top_k: tuple[int, ...] = ()
    groups: "GroupsConfig | None" = None  # regroup the blocks into MoB groups before this stage
    loss: LossConfig = LossConfig()
    count_padding: bool = True  # whether texts' padding counts in balance and block features
    optimizer: OptimizerConfig = OptimizerConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; the rest stays float32
    remat: bool = True  # compute activations again in the backward pass: less memory, more time
    log_every: int = 10  # 0: with evaluations only
    evaluate_every: int = 250  # on the validation batches; decides the best checkpoint
    checkpoint_every: int = 250  # what a run that is killed loses at most
    sample_every: int = 0  # sample grids of fixed prompts; 0 turns them off

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "steps", "batch_size")
        check_whole(self, 0, "log_every", "evaluate_every", "checkpoint_every", "sample_every")
        if self.top_k is not None:
            check_whole(self, 0, "top_k")
        check(
            all(k >= 0 for k in self.random_top_k),
            f"StageConfig.random_top_k = {self.random_top_k}: expected numbers of at least 0",
        )
        check(
            self.top_k is None or not self.random_top_k,
            f"StageConfig.random_top_k = {self.random_top_k}: expected none beside top_k ="
            f" {self.top_k}",
        )


@dataclass(frozen=True)
class GroupsConfig(Config):
    """How blocks become MoB groups: the first `keep` and the last `keep_last` stay outside, the
    rest form the groups."""

    keep_double: int = 0  # so many of the first double blocks always run
    keep_last_double: int = 0  # and so many of the last
    double_blocks: int = 1  # in a group
    double_active: int = 1  # of a group's, for each sample
    keep_single: int = 0  # so many of the first single blocks always run
    keep_last_single: int = 0  # and so many of the last
    single_blocks: int = 2  # in a group
    single_active: int = 1  # of a group's, for each sample
    # Which of a group's blocks run together, in all groups of the model (FluxConfig.mob_choice).
    choice: Literal["any", "adjacent"] = "any"
    # Routers at the start. fitted: to what each block costs left out (sparsification/routers.py).
    router: Literal["random", "fitted"] = "fitted"
    batches: int = 16  # of the stage's, to fit routers on

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "batches")


@dataclass(frozen=True)
class SparsifyConfig(Config):
    """How a student is made from the teacher, before any training (docs/recipe.md)."""

    method: Literal["moe", "prune", "none"] = "moe"  # of FFNs; none: they stay as they are
    moe: MoEConfig = MoEConfig()
    mlp_ratio: float = 1.5  # of the pruned student
    dense_double: tuple[int, ...] = ()  # block indices whose FFNs stay dense and whole
    dense_single: tuple[int, ...] = ()  # the same of single blocks
    # Depth pruning, before FFNs are cut: blocks of the teacher that stay; None: all.
    depth_double: int | None = None
    depth_single: int | None = None  # of the single ones
    # Which blocks stay (sparsification/depth.py).
    depth_choice: Literal["cost", "change", "even"] = "change"
    # Which neurons are kept or shared (sparsification/sensitivity.py, importance.py).
    shared: Literal["sensitivity", "taylor", "random", "magnitude"] = "taylor"
    deal: Literal["rank", "random", "clustered"] = "clustered"  # of the others to experts
    gate: Literal["random", "fitted"] = "fitted"  # at the start
    # Output kernels and bias fitted to the whole FFN's output (sparsification/refit.py).
    refit: Literal["none", "bias", "plain", "weighted"] = "none"
    routed_scale: float = 1.0  # start of the learnable scale of the normal experts' sum
    # Modulations of all blocks on one basis of so many directions; None: whole, as the teacher's.
    modulation_rank: int | None = None
    batches: int = 16  # of calibration, one at a time
    batch_size: int = 64  # of calibration; computed in micro-batches as the first stage has
    tokens: int = 16_384  # calibration tokens per FFN for clusters, gates, scores and fits
    text_share: float = 0.25  # of them: a double block's text FFN has this many, a single's both

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "batches", "batch_size", "tokens")
        check_number(self, "mlp_ratio", "routed_scale", least=0)
        check_number(self, "text_share", least=0, below=1)
        for name in ("modulation_rank", "depth_double", "depth_single"):
            if getattr(self, name) is not None:
                check_whole(self, 1, name)

    @property
    def prunes(self) -> bool:
        """Whether it makes a rival: a smaller model, which has nothing to choose from."""
        fewer = self.depth_double is not None or self.depth_single is not None
        return self.method == "prune" or (self.method == "none" and fewer)


@dataclass(frozen=True)
class MeshConfig(Config):
    """Device mesh; -1 fills what the other axes leave."""

    data: int = -1  # copies, each with its share of a batch
    fsdp: int = 1  # parts of every parameter, each with its share of a batch
    expert: int = 1  # parts of the normal experts, each with its share of a batch
    tensor: int = 1  # parts of every matrix and its product


@dataclass(frozen=True)
class StudentConfig(Config):
    """A student: how it is cut from the teacher, and the stages that train it."""

    sparsify: SparsifyConfig = SparsifyConfig()
    stages: Mapping[str, StageConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig(Config):
    """One run directory: a student distilled from `teacher`, or `model` trained from scratch."""

    name: str  # of the run and its student; without --run_dir also of its directory in runs/
    seed: int = 0  # of all that is drawn; at most 2**32 - 1
    teacher: str | None = None  # a model directory, found from the shell's folder or the repository
    model: ModelConfig | None = None
    start: str | None = None  # a model directory, the weights that `model` starts with
    data: DataConfig = field(default_factory=IconsConfig)
    # Other data to validate on; None: what of `data` never trains (of the icons, other draws).
    validation: DataConfig | None = None
    # Whether validation also tells errors at fixed times, as others can compare them
    # (distillation/fixed_times.py).
    fixed_times: bool = False
    # How times are drawn in training and calibration, before the model's shift.
    timesteps: Timesteps = "uniform"
    # Least and most of what training and calibration draw each sample's guidance from, for a model
    # that reads one; None: ModelConfig.guidance for all.
    guidance: tuple[float, float] | None = None
    sparsify: SparsifyConfig = SparsifyConfig()  # how the student is cut from the teacher
    stages: Mapping[str, StageConfig] = field(default_factory=dict)  # what trains it, in this order
    rivals: Mapping[str, StudentConfig] = field(default_factory=dict)  # trained for the report
    mesh: MeshConfig = MeshConfig()
    keep_checkpoints: int = 2  # the newest, and the best one besides
    wandb: str | None = None  # a project of Weights & Biases, to which metrics and samples go
    sampled_prompts: int = 36  # of the grids that a stage draws (StageConfig.sample_every)
    # Prompts that the report draws of every model; at most 12 where nobody judges images.
    evaluate_prompts: int = 600
    # Experts per token that the report tries beside the model's own number and all of them.
    sweep_top_k: tuple[int, ...] = (0, 1, 4, 8)
    held_out_batches: int = 8  # of validation: what trains, in other draws
    quick_compilation: bool = False  # programs compile fast and run slowly: for first tries

    def __post_init__(self):
        super().__post_init__()
        check(
            (self.teacher is None) != (self.model is None),
            "RunConfig: expected either teacher (a model directory, to distill from) or model (to"
            " train from scratch), " + ("found neither" if self.teacher is None else "found both"),
        )
        check(
            self.start is None or self.model is not None,
            f"RunConfig.start = {self.start}: expected none beside teacher, which a student is cut"
            " from",
        )
        check(len(self.stages) > 0, "RunConfig.stages: expected at least one stage, found none")
        check_seed("RunConfig.seed", self.seed)
        check_whole(self, 1, "keep_checkpoints", "evaluate_prompts", "sampled_prompts")
        check_whole(self, 0, "held_out_batches")
        check(
            all(k >= 0 for k in self.sweep_top_k),
            f"RunConfig.sweep_top_k = {self.sweep_top_k}: expected numbers of at least 0",
        )
        check(
            self.guidance is None or (len(self.guidance) == 2 and min(self.guidance) >= 0),
            f"RunConfig.guidance = {self.guidance}: expected two numbers of at least 0, or None",
        )
        for name in self.rivals:
            _check_name(f"rivals.{name}", name)
        students = {"": self.stages} | {f"rivals.{n}.": r.stages for n, r in self.rivals.items()}
        for where, stages in students.items():
            for name in stages:
                _check_name(f"{where}stages.{name}", name)


def _check_name(field: str, name: str) -> None:
    """Stages and rivals name folders; `start` is the model before the first stage."""
    fits = re.fullmatch(r"\w[\w.-]*", name) is not None and name != "start"
    check(fits, f"RunConfig.{field}: expected letters, digits, _, - and ., and not start")
