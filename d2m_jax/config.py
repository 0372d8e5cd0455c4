"""Everything a run needs, as frozen dataclasses: their checks and their JSON form."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]  # of the repository, where relative paths of teachers start


class ConfigError(ValueError):
    """A value that cannot work, or values that contradict each other: one line, exit code 2."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


# -------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class StackConfig:
    """`groups` groups of `blocks` blocks, of which `active` run per sample.

    active < blocks is Mixture of Blocks.
    """

    groups: int
    blocks: int = 1
    active: int = 1
    ffn: Literal["dense", "moe"] = "dense"
    mlp_ratio: float = 4.0  # r, the FFN's total expansion; a width-pruned model has less than 4

    def __post_init__(self):
        check(self.groups >= 1, f"StackConfig.groups = {self.groups}: expected at least 1")
        check(
            1 <= self.active <= self.blocks,
            f"StackConfig.active = {self.active}: expected 1 to blocks = {self.blocks}",
        )

    @property
    def depth(self) -> int:
        """Blocks in all."""
        return self.groups * self.blocks

    @property
    def mixes(self) -> bool:
        """Whether a router chooses among the blocks of a group."""
        return self.active < self.blocks


@dataclass(frozen=True)
class MoEConfig:
    """The MoE FFN of PAPER.md: a shared expert and `experts` normal ones, `top_k` per token."""

    shared_ratio: float = 1.0  # r_s
    experts: int = 12  # n; the rest of mlp_ratio is divided among them, so r_n is derived
    top_k: int = 2  # k
    gate: Literal["renormalised", "softmax", "sigmoid"] = "renormalised"
    router_input: Literal["modulated", "unmodulated"] = "modulated"
    implementation: Literal["auto", "reference", "tiled"] = "auto"

    def __post_init__(self):
        check(self.experts >= 1, f"MoEConfig.experts = {self.experts}: expected at least 1")
        check(
            0 <= self.top_k <= self.experts,
            f"MoEConfig.top_k = {self.top_k}: expected 0 to experts = {self.experts}",
        )


@dataclass(frozen=True)
class FluxConfig:
    """One FLUX.1 transformer, dense or sparse; the defaults are FLUX.1 [dev] at full size."""

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    num_heads: int = 24
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    guidance_embed: bool = True
    double: tuple[StackConfig, ...] = (StackConfig(19),)
    single: tuple[StackConfig, ...] = (StackConfig(38),)
    moe: MoEConfig = MoEConfig()
    mob_alpha: float = 0.5  # α of the block router: pooled features against the global vector
    modulation_rank: int | None = None  # r of the shared basis; None: a full matrix per block

    def __post_init__(self):
        heads, hidden = self.num_heads, self.hidden_size
        check(
            hidden % heads == 0,
            f"FluxConfig.hidden_size = {hidden}: expected a multiple of num_heads = {heads}",
        )
        check(
            sum(self.axes_dim) == hidden // heads and all(a % 2 == 0 for a in self.axes_dim),
            f"FluxConfig.axes_dim = {self.axes_dim}: expected even numbers that sum to hidden_size"
            f" / num_heads = {hidden // heads}",
        )
        check(
            0.0 <= self.mob_alpha <= 1.0,
            f"FluxConfig.mob_alpha = {self.mob_alpha}: expected 0 to 1",
        )
        rank = self.modulation_rank
        check(
            rank is None or 1 <= rank <= hidden,
            f"FluxConfig.modulation_rank = {rank}: expected 1 to hidden_size = {hidden}, or none",
        )
        for stack in self.stacks:
            self.ffn_width(stack)
            if stack.ffn == "moe":
                self.shared_width(stack)
                self.expert_width(stack)

    @property
    def stacks(self) -> tuple[StackConfig, ...]:
        return self.double + self.single

    def ffn_width(self, stack: StackConfig) -> int:
        """Hidden neurons of the whole FFN, all experts together."""
        return self._whole(
            stack.mlp_ratio * self.hidden_size, "StackConfig.mlp_ratio × hidden_size"
        )

    def shared_width(self, stack: StackConfig) -> int:
        """Hidden neurons of the shared expert."""
        width = self._whole(
            self.moe.shared_ratio * self.hidden_size, "MoEConfig.shared_ratio × hidden_size"
        )
        check(
            0 < width < self.ffn_width(stack),
            f"MoEConfig.shared_ratio = {self.moe.shared_ratio}: expected more than 0 and less than"
            f" mlp_ratio = {stack.mlp_ratio}",
        )
        return width

    def expert_width(self, stack: StackConfig) -> int:
        """Hidden neurons of one normal expert."""
        rest = self.ffn_width(stack) - self.shared_width(stack)
        check(
            rest % self.moe.experts == 0,
            f"MoEConfig.experts = {self.moe.experts}: does not divide the {rest} neurons that the"
            f" shared expert leaves of the FFN's {self.ffn_width(stack)}",
        )
        return rest // self.moe.experts

    @staticmethod
    def _whole(value: float, name: str) -> int:
        check(abs(value - round(value)) < 1e-6, f"{name} = {value}: expected a whole number")
        return round(value)


@dataclass(frozen=True)
class WordsConfig:
    """The embedded text encoder of models/words.py."""

    dim: int = 128
    length: int = 6  # tokens; shorter captions are padded
    seed: int = 0
    vocabulary: tuple[str, ...] = ()  # filled from the data: a model directory knows its words


@dataclass(frozen=True)
class T5Config:
    """T5 v1.1's encoder, which gives `txt`; the defaults are XXL's (transformers' names)."""

    vocab_size: int = 32_128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10_240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP's text encoder, which gives `y`; the defaults are ViT-L/14's (transformers' names)."""

    vocab_size: int = 49_408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    eos_token_id: int = 49_407


@dataclass(frozen=True)
class PromptsConfig:
    """The text encoders of FLUX.1: T5 for the tokens, CLIP for the pooled vector."""

    kind: Literal["prompts"] = "prompts"
    t5: T5Config = T5Config()
    clip: CLIPConfig = CLIPConfig()
    length: int = 512  # tokens of T5; shorter prompts are padded


@dataclass(frozen=True)
class AutoencoderConfig:
    """FLUX.1's autoencoder (diffusers' names); latents enter the transformer in 2 × 2 patches."""

    kind: Literal["autoencoder"] = "autoencoder"
    height: int = 1024  # pixels of an image where nothing else is said
    width: int = 1024
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # of the encoder; the decoder has one more
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        widths, groups = self.block_out_channels, self.norm_num_groups
        check(
            len(widths) > 0 and groups > 0 and all(w > 0 and w % groups == 0 for w in widths),
            f"AutoencoderConfig.block_out_channels = {widths}: expected multiples of"
            f" norm_num_groups = {groups}",
        )


@dataclass(frozen=True)
class PixelsConfig:
    """No autoencoder: the transformer sees pixels in patches; channels = 3 · patch²."""

    height: int = 24
    width: int = 24
    patch: int = 4

    def __post_init__(self):
        check(
            self.height % self.patch == 0 and self.width % self.patch == 0,
            f"PixelsConfig.patch = {self.patch}: expected a divisor of height {self.height} and"
            f" width {self.width}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """What config.json of a model directory holds: the transformer and its encoders."""

    transformer: FluxConfig = FluxConfig()
    text: WordsConfig = WordsConfig()
    image: PixelsConfig = PixelsConfig()
    shift: float | None = 1.0  # of times, in sampling and training; None: by length (flow.shift)
    sample_steps: int = 20
    guidance: float = 3.5  # used where the transformer has guidance_embed


# -------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class IconsConfig:
    """The embedded task of data/icons.py."""

    task: Literal["single", "scenes"] = "scenes"
    glyphs: int = 512
    seed: int = 0
    train_size: int = 10_000_000  # scenes per epoch: each is rendered from its index
    workers: int = 0  # grain worker processes; 0 renders in threads of this process


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule; rates in steps of the stage."""

    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = 50
    final_rate: float = 0.0  # the share of learning_rate that is left at the end
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    clip: float = 1.0  # global norm; 0 turns clipping off
    accumulate: int = 1  # micro-batches per step
    ema: float = 0.0  # decay of the running average that is evaluated and saved; 0 turns it off
    rates: Mapping[str, float] = field(default_factory=dict)  # name pattern → factor on the rate


@dataclass(frozen=True)
class LossConfig:
    """Weights of a stage's losses (PAPER.md, pipeline); 0 leaves a loss out of the program."""

    output: float = 1.0
    feature: float = 1.0
    balance: float = 1e-2
    block_balance: float = 1e-2
    timesteps: Literal["uniform", "logit_normal"] = "uniform"  # before the model's shift


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: what trains, on which losses, for how long."""

    kind: Literal["flow", "distill"] = "distill"  # flow: train from scratch by flow matching
    steps: int = 1000
    batch_size: int = 64
    train: tuple[str, ...] = ("*",)  # name patterns (fnmatch on dotted parameter names)
    freeze: tuple[str, ...] = ()  # taken out of train
    top_k: int | None = None  # None: the model's own
    groups: "GroupsConfig | None" = None  # regroup the blocks into MoB groups before this stage
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; the rest stays float32
    remat: bool = True
    log_every: int = 10
    evaluate_every: int = 250  # held-out loss; decides the best checkpoint
    checkpoint_every: int = 250
    sample_every: int = 0  # sample grids of fixed prompts; 0 turns them off


@dataclass(frozen=True)
class GroupsConfig:
    """How blocks become MoB groups: the first `keep` stay outside, the rest form the groups."""

    keep_double: int = 0
    double_blocks: int = 1
    double_active: int = 1
    keep_single: int = 0
    single_blocks: int = 2
    single_active: int = 1


@dataclass(frozen=True)
class SparsifyConfig:
    """How a student is made from the teacher, before any training (RECIPE.md)."""

    method: Literal["moe", "prune"] = "moe"
    moe: MoEConfig = MoEConfig()
    mlp_ratio: float = 1.5  # of the pruned student
    dense_double: tuple[int, ...] = ()  # block indices whose FFNs stay dense and whole
    dense_single: tuple[int, ...] = ()
    shared: Literal["taylor", "random", "magnitude"] = "taylor"  # which neurons are kept or shared
    deal: Literal["rank", "random", "clustered"] = "clustered"
    gate: Literal["random", "fitted"] = "fitted"
    routed_scale: float = 1.0  # start of the learnable scale of the normal experts' sum
    modulation_rank: int | None = None
    batches: int = 16  # calibration
    batch_size: int = 64
    tokens: int = 4096  # calibration tokens per FFN for clusters and gates


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh; -1 fills what the other axes leave."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class StudentConfig:
    """A student: how it is cut from the teacher, and the stages that train it."""

    sparsify: SparsifyConfig = SparsifyConfig()
    stages: Mapping[str, StageConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """One run directory: a student distilled from `teacher`, or `model` trained from scratch."""

    name: str
    seed: int = 0
    teacher: str | None = None  # a model directory; relative paths start at the repository root
    model: ModelConfig | None = None
    data: IconsConfig = IconsConfig()
    sparsify: SparsifyConfig = SparsifyConfig()
    stages: Mapping[str, StageConfig] = field(default_factory=dict)
    rivals: Mapping[str, StudentConfig] = field(default_factory=dict)  # trained for the report
    mesh: MeshConfig = MeshConfig()
    keep_checkpoints: int = 2
    evaluate_prompts: int = 600  # prompts of the icons benchmark in the report
    held_out_batches: int = 8

    def __post_init__(self):
        check(
            (self.teacher is None) != (self.model is None),
            "RunConfig: expected either teacher (a model directory, to distill from) or model (to"
            " train from scratch), " + ("found neither" if self.teacher is None else "found both"),
        )
        check(len(self.stages) > 0, "RunConfig.stages: expected at least one stage, found none")
        for name, stage in self.stages.items():
            check(
                stage.kind == ("flow" if self.teacher is None else "distill"),
                f"RunConfig.stages.{name}.kind = {stage.kind}: "
                + (
                    "training from scratch is 'flow'"
                    if self.teacher is None
                    else "a student is trained by 'distill'"
                ),
            )


# -------------------------------------------------------------------------------- JSON


def to_json(config: Any) -> Any:
    """The JSON form of a config: dataclasses become objects, tuples lists."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_json(value) for value in config]
    return config


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """The inverse of to_json. ConfigError names the field, what was found and what was expected."""
    where = where or getattr(kind, "__name__", "config")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return from_json(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        check(
            value in arguments,
            f"{where} = {value!r}: expected one of {', '.join(map(repr, arguments))}",
        )
        return value
    if origin is tuple:
        check(isinstance(value, list), f"{where}: expected a list, found {value!r}")
        return tuple(from_json(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        check(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        return {key: from_json(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        hints = typing.get_type_hints(kind)
        for key in value:
            check(key in hints, f"{where}.{key}: unknown field{suggestion(key, hints)}")
        return kind(
            **{key: from_json(hints[key], item, f"{where}.{key}") for key, item in value.items()}
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    check(type(value) is kind, f"{where} = {value!r}: expected {kind.__name__}")
    return value


def suggestion(name: str, known: Iterable[str]) -> str:
    """`, did you mean …?` where a known name is near, else the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""
