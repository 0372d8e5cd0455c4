"""A FluxPipeline that is tiny and knows nothing, to try commands on where FLUX.1 is not at hand.

    python -m d2m_jax.weights.torch_files.random_flux FOLDER [--seed N]

It has the files of FLUX.1 [schnell], a few MB, and every command takes it.
"""

import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import numpy as np
import tyro

from d2m_jax import output
from d2m_jax.config import (
    AutoencoderConfig,
    CLIPConfig,
    FluxConfig,
    StackConfig,
    T5Config,
    check_seed,
)
from d2m_jax.keys import named_generator
from d2m_jax.models import autoencoder, clip, flux, t5
from d2m_jax.named_arrays import names
from d2m_jax.tokenizers import tokenizer_classes
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.keys import autoencoder_keys, flux_keys, text_encoder_keys
from d2m_jax.weights.keys.key_table import Entry
from d2m_jax.weights.torch_files.diffusers_folder import AUTOENCODER, CLIP, INDEX, T5, is_pipeline
from d2m_jax.weights.torch_files.torch_export import torch_tensors

# Both tokenizers spell a prompt letter by letter.
LETTERS = string.ascii_lowercase
CLIP_VOCABULARY = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
T5_VOCABULARY = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]

# Everything is as in FLUX.1 [schnell] but for sizes: 64 × 64 pixels are 8 × 8 tokens.
TRANSFORMER = FluxConfig(
    vec_in_dim=32,
    context_in_dim=24,
    hidden_size=64,
    num_heads=2,
    axes_dim=(8, 12, 12),
    guidance_embed=False,
    double=(StackConfig(3),),
    single=(StackConfig(3),),
)
IMAGE = AutoencoderConfig(
    height=64, width=64, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4
)
TEXT_T5 = T5Config(
    vocab_size=len(T5_VOCABULARY), d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3
)
TEXT_CLIP = CLIPConfig(
    vocab_size=len(CLIP_VOCABULARY),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    eos_token_id=len(CLIP_VOCABULARY) - 1,
)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}
# Library and class of each part, as diffusers has them.
PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    CLIP: ("transformers", "CLIPTextModel"),
    T5: ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5Tokenizer"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    AUTOENCODER: ("diffusers", "AutoencoderKL"),
}


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    seed: int = 0  # of the weights


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parsed = command_line.parse(
        Arguments,
        arguments,
        usage="python -m d2m_jax.weights.torch_files.random_flux",
        description=__doc__ or "",
        example="flux_random",
    )
    print(f"{random_flux(parsed.folder, parsed.seed)}: a FluxPipeline of random weights")


def random_flux(folder: Path | str, seed: int = 0) -> Path:
    """Write the folder of a FluxPipeline as diffusers saves it, a few MB, and return its path.

    It is FLUX.1 [schnell] in every respect but two: it is tiny, and its weights are random, drawn
    from the seed. So are its pictures. Prompts are read letter by letter. ConfigError where
    `folder` exists.
    """
    check_seed("seed", seed)
    with output.new_directory(folder, is_pipeline, "FluxPipeline") as new:
        index = {"_class_name": "FluxPipeline"} | {name: list(part) for name, part in PARTS.items()}
        output.write_json(new / INDEX, index)
        output.write_json(new / "scheduler" / "scheduler_config.json", SCHEDULER)
        _part(
            new / "transformer" / "diffusion_pytorch_model.safetensors",
            flux_keys.diffusers_config(TRANSFORMER),
            flux_keys.keys("diffusers", TRANSFORMER),
            _drawn(flux.abstract(TRANSFORMER), seed),
        )
        _part(
            new / AUTOENCODER / "diffusion_pytorch_model.safetensors",
            _autoencoder(IMAGE),
            autoencoder_keys.diffusers_keys(IMAGE),
            _drawn(autoencoder.abstract(IMAGE), seed),
        )
        _part(
            new / T5 / "model.safetensors",
            {"model_type": "t5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}
            | asdict(TEXT_T5),
            text_encoder_keys.t5_keys(TEXT_T5),
            _drawn(t5.abstract(TEXT_T5), seed),
        )
        _part(
            new / CLIP / "model.safetensors",
            {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
            | {"bos_token_id": TEXT_CLIP.eos_token_id - 1, "pad_token_id": TEXT_CLIP.eos_token_id}
            | asdict(TEXT_CLIP),
            text_encoder_keys.clip_keys(TEXT_CLIP),
            _drawn(clip.abstract(TEXT_CLIP), seed),
        )
        _tokenizers(new)
    return Path(folder)


def _part(
    file: Path, config: Mapping[str, Any], table: Sequence[Entry], params: Mapping[str, np.ndarray]
) -> None:
    """One of the networks: its weights, and config.json beside them."""
    output.write_json(file.parent / "config.json", config)
    safetensors.write(file, torch_tensors(list(table), params), {"format": "pt"})


def _drawn(shapes: Any, seed: int) -> dict[str, np.ndarray]:
    """Random parameters by name, none of which is 0 or 1 as it would be at birth."""
    found = {}
    for name, leaf in names(shapes).items():
        draw = named_generator(seed, name).standard_normal(leaf.shape, np.float32)
        last = name.rpartition(".")[2]
        if last == "scale":
            found[name] = 1 + 0.1 * draw
        elif last == "kernel":
            fan_in = np.prod(leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2:-1])
            found[name] = draw / np.float32(np.sqrt(fan_in))
        else:
            found[name] = draw if last == "embedding" else np.float32(0.1) * draw
    return found


def _autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    """vae/config.json."""
    levels = len(config.block_out_channels)
    value = asdict(config)
    del value["height"], value["width"], value["kind"]
    return value | {
        "_class_name": "AutoencoderKL",
        "sample_size": config.height,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _tokenizers(folder: Path) -> None:
    clip, t5 = tokenizer_classes()
    vocabulary = {token: i for i, token in enumerate(CLIP_VOCABULARY)}
    clip(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder / "tokenizer")
    pieces = [(piece, -float(i)) for i, piece in enumerate(T5_VOCABULARY)]
    t5(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer_2")


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
