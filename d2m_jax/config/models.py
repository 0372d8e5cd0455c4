"""A model: its transformer, its text encoders, its image side."""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from d2m_jax.config.errors import check, check_number, check_whole
from d2m_jax.config.fields import Config

KINDS = ("double", "single")  # of stacks, as the fields of FluxConfig are called


@dataclass(frozen=True)
class StackConfig(Config):
    """`groups` groups of `blocks` blocks, of which `active` run per sample.

    active < blocks is Mixture of Blocks.
    """

    groups: int
    blocks: int = 1
    active: int = 1
    ffn: Literal["dense", "moe"] = "dense"
    mlp_ratio: float = 4.0  # r, the FFN's total expansion; a width-pruned model has less than 4

    def __post_init__(self):
        super().__post_init__()
        check(self.groups >= 1, f"StackConfig.groups = {self.groups}: expected at least 1")
        check_number(self, "mlp_ratio", least=0)
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


class NamedStack(NamedTuple):
    """A stack with its place in the transformer."""

    kind: str
    number: int  # among the stacks of its kind
    first: int  # number of its first block among the blocks of its kind
    stack: StackConfig


@dataclass(frozen=True)
class MoEConfig(Config):
    """The MoE FFN (docs/method.md): a shared expert and `experts` normal ones, `top_k` per
    token."""

    shared_ratio: float = 1.0  # r_s
    experts: int = 12  # n; the rest of mlp_ratio is divided among them, so r_n is derived
    top_k: int = 2  # k
    trained_top_k: int | None = None  # k that its gate's weights are those of; None: top_k
    # How the chosen experts' outputs are weighed (docs/method.md).
    gate: Literal["renormalised", "softmax", "sigmoid"] = "renormalised"
    router_input: Literal["modulated", "unmodulated"] = "modulated"  # what the gate reads

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "shared_ratio", least=0)
        check(self.experts >= 1, f"MoEConfig.experts = {self.experts}: expected at least 1")
        check(
            0 <= self.top_k <= self.experts,
            f"MoEConfig.top_k = {self.top_k}: expected 0 to experts = {self.experts}",
        )
        check(
            self.trained_top_k is None or 1 <= self.trained_top_k <= self.experts,
            f"MoEConfig.trained_top_k = {self.trained_top_k}: expected 1 to experts ="
            f" {self.experts}, or None",
        )

    @property
    def trained(self) -> int:
        """The number of experts whose weights sum to it; at least 1."""
        return max(1, self.top_k) if self.trained_top_k is None else self.trained_top_k

    def running(self, top_k: int) -> "MoEConfig":
        """The same experts, as many as `top_k` per token: what the knob does at run time."""
        return replace(self, top_k=top_k, trained_top_k=self.trained)


@dataclass(frozen=True)
class FluxConfig(Config):
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
    # Which κ of a group's m blocks run together: any, or such that follow one another.
    mob_choice: Literal["any", "adjacent"] = "any"
    modulation_rank: int | None = None  # r of the shared basis; None: a full matrix per block

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "in_channels", "vec_in_dim", "context_in_dim")
        check_whole(self, 1, "hidden_size", "num_heads", "theta")
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

    def running(self, top_k: int | None) -> "FluxConfig":
        """The same model with so many normal experts per token; None: as it is."""
        return self if top_k is None else replace(self, moe=self.moe.running(top_k))

    @property
    def stacks(self) -> tuple[StackConfig, ...]:
        return self.double + self.single

    @property
    def named_stacks(self) -> list[NamedStack]:
        """All stacks with what leads to them, the double ones first."""
        found = []
        for kind in KINDS:
            first = 0
            for number, stack in enumerate(getattr(self, kind)):
                found.append(NamedStack(kind, number, first, stack))
                first += stack.depth
        return found

    def depth(self, kind: str) -> int:
        """How many blocks of a kind there are."""
        return sum(stack.depth for stack in getattr(self, kind))

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
class WordsConfig(Config):
    """The embedded text encoder of models/words.py."""

    dim: int = 128
    length: int = 6  # tokens; shorter captions are padded
    seed: int = 0
    vocabulary: tuple[str, ...] = ()  # filled from the data: a model directory knows its words
    kind: Literal["words"] = "words"


@dataclass(frozen=True)
class T5Config(Config):
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
class CLIPConfig(Config):
    """CLIP's text encoder, which gives `y`; the defaults are ViT-L/14's (transformers' names)."""

    vocab_size: int = 49_408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    eos_token_id: int = 49_407

    def __post_init__(self):
        super().__post_init__()
        heads, hidden = self.num_attention_heads, self.hidden_size
        check(
            heads >= 1 and hidden % heads == 0,
            f"CLIPConfig.hidden_size = {hidden}: expected a multiple of num_attention_heads ="
            f" {heads}",
        )


@dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """CLIP's vision tower, which scores images; the defaults are ViT-L/14's (transformers'
    names)."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224  # pixels of either side
    patch_size: int = 14

    def __post_init__(self):
        super().__post_init__()
        for name, of in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            value, divisor = getattr(self, name), getattr(self, of)
            check(
                divisor >= 1 and value >= 1 and value % divisor == 0,
                f"CLIPVisionConfig.{name} = {value}: expected a multiple of {of} = {divisor}",
            )


@dataclass(frozen=True)
class CLIPModelConfig(Config):
    """Both of CLIP's towers, and the width of the features in which they meet."""

    text: CLIPConfig = CLIPConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 768

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "projection_dim")


@dataclass(frozen=True)
class PromptsConfig(Config):
    """The text encoders of FLUX.1: T5 for the tokens, CLIP for the pooled vector."""

    t5: T5Config = T5Config()
    clip: CLIPConfig = CLIPConfig()
    length: int = 512  # tokens of T5; shorter prompts are padded
    kind: Literal["prompts"] = "prompts"


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """FLUX.1's autoencoder (diffusers' names); latents enter the transformer in 2 × 2 patches."""

    height: int = 1024  # pixels of an image where nothing else is said
    width: int = 1024
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # of the encoder; the decoder has one more
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    kind: Literal["autoencoder"] = "autoencoder"

    @property
    def stride(self) -> int:
        """Pixels per token, either way: the autoencoder's own, times the patch."""
        return 2 ** len(self.block_out_channels)

    def __post_init__(self):
        super().__post_init__()
        widths, groups = self.block_out_channels, self.norm_num_groups
        check(
            len(widths) > 0 and groups > 0 and all(w > 0 and w % groups == 0 for w in widths),
            f"AutoencoderConfig.block_out_channels = {widths}: expected multiples of"
            f" norm_num_groups = {groups}",
        )


@dataclass(frozen=True)
class PixelsConfig(Config):
    """No autoencoder: the transformer sees pixels in patches; channels = 3 · patch²."""

    height: int = 24
    width: int = 24
    patch: int = 4
    kind: Literal["pixels"] = "pixels"

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "height", "width", "patch")
        check(
            self.height % self.patch == 0 and self.width % self.patch == 0,
            f"PixelsConfig.patch = {self.patch}: expected a divisor of height {self.height} and"
            f" width {self.width}",
        )

    @property
    def stride(self) -> int:
        """Pixels per token, either way."""
        return self.patch


@dataclass(frozen=True)
class ShiftConfig(Config):
    """The shift of times by an image's length: exp of what lies on the line through two points
    (diffusers' names); the defaults are FLUX.1 [dev]'s."""

    base_image_seq_len: int = 256  # tokens of the image
    max_image_seq_len: int = 4096
    base_shift: float = 0.5  # the logarithm of the shift there
    max_shift: float = 1.15

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "base_image_seq_len")
        check_whole(self, self.base_image_seq_len + 1, "max_image_seq_len")
        for name in ("base_shift", "max_shift"):
            value = getattr(self, name)
            message = f"ShiftConfig.{name} = {value}: expected a number between -100 and 100"
            check(abs(value) < 100, message)  # exp of it is a number too

    def at(self, image_tokens: int) -> float:
        """The factor for an image of so many tokens."""
        slope = self.max_shift - self.base_shift
        beyond = image_tokens - self.base_image_seq_len
        length = self.max_image_seq_len - self.base_image_seq_len
        return math.exp(self.base_shift + beyond * slope / length)


@dataclass(frozen=True)
class ModelConfig(Config):
    """What config.json of a model directory holds: the transformer and its encoders."""

    transformer: FluxConfig = FluxConfig()
    text: WordsConfig | PromptsConfig = WordsConfig()
    image: PixelsConfig | AutoencoderConfig = PixelsConfig()
    # Folder of text encoders, tokenizers and autoencoder as in a diffusers FluxPipeline; a relative
    # one starts at the model directory. None where words and pixels need none.
    encoders: str | None = None
    shift: float | None = 1.0  # of times (flow.shift), in sampling and training; None: by length
    shift_by_length: ShiftConfig = ShiftConfig()
    sample_steps: int = 20
    guidance: float = 3.5  # used where the transformer has guidance_embed

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, 1, "sample_steps")
        check_number(self, "guidance", *([] if self.shift is None else ["shift"]))

    def running(self, top_k: int | None) -> "ModelConfig":
        """The same model with so many normal experts per token; None: as it is."""
        return replace(self, transformer=self.transformer.running(top_k))

    def shift_at(self, image_tokens: int) -> float:
        """The factor by which times are shifted for an image of so many tokens."""
        return self.shift_by_length.at(image_tokens) if self.shift is None else self.shift

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of tokens of an image, by default of the model's own size.

        Raises ConfigError for a size that tokens do not divide.
        """
        height = self.image.height if height is None else height
        width = self.image.width if width is None else width
        stride = self.image.stride
        check(
            height % stride == 0 and width % stride == 0 and min(height, width) >= stride,
            f"image size {height} × {width}: expected multiples of {stride}",
        )
        return height // stride, width // stride
