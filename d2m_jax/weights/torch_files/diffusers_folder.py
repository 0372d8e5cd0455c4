"""Text encoders and autoencoder in a folder laid out as a diffusers FluxPipeline."""

import json
import math
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from d2m_jax.config import (
    AutoencoderConfig,
    ConfigError,
    FluxConfig,
    ModelConfig,
    PromptsConfig,
    ShiftConfig,
    check,
)
from d2m_jax.models import autoencoder, clip, t5
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.files import hub
from d2m_jax.weights.keys import autoencoder_keys, key_table, recognise, text_encoder_keys
from d2m_jax.weights.keys.key_table import Entry
from d2m_jax.weights.torch_files import torch_import

T5, CLIP, AUTOENCODER = "text_encoder_2", "text_encoder", "vae"
FOLDERS = (CLIP, T5, AUTOENCODER, "tokenizer", "tokenizer_2", "scheduler")
INDEX = "model_index.json"
COPIED = (".safetensors", *hub.SMALL)
PIPELINES = r"Flux(Kontext)?(Img2Img|Inpaint)?Pipeline"  # whose parts are FluxPipeline's
# What diffusers' scheduler must say for the steps to be flow.schedule's; absent is the same.
PLAIN = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


def model_config(transformer: FluxConfig, folder: Path | None = None) -> ModelConfig:
    """The config of a model with this transformer, and the encoders and schedule of `folder`.

    Without a folder these are [dev]'s or, where the transformer knows no guidance, [schnell]'s.
    Raises ConfigError that names the file and field where the folder is not FLUX.1's.
    """
    dev = transformer.guidance_embed
    config = ModelConfig(
        transformer=transformer,
        text=PromptsConfig(length=512 if dev else 256),
        image=AutoencoderConfig(),
        shift=None if dev else 1.0,
        sample_steps=28 if dev else 4,
    )
    if folder is None:
        return config
    if (folder / INDEX).is_file():
        kind = str(_json(folder / INDEX).get("_class_name"))
        known = re.fullmatch(PIPELINES, kind)
        check(
            known is not None, f"{folder / INDEX}: _class_name = {kind!r}, expected 'FluxPipeline'"
        )
    for name in FOLDERS:
        check((folder / name).is_dir(), f"{folder}: expected a folder {name} in it, found none")
    t5_file, clip_file, image_file = (
        folder / name / "config.json" for name in (T5, CLIP, AUTOENCODER)
    )
    return replace(
        config,
        text=replace(
            config.text,
            t5=text_encoder_keys.t5_config(_json(t5_file), str(t5_file)),
            clip=text_encoder_keys.clip_config(_json(clip_file), str(clip_file)),
        ),
        image=autoencoder_keys.autoencoder_config(_json(image_file), str(image_file)),
        encoders=str(folder.resolve()),
        **_shift(folder / "scheduler" / "scheduler_config.json"),
    )


def with_encoders(config: ModelConfig, source: Path | str) -> ModelConfig:
    """The config with the encoders and the autoencoder of another FluxPipeline; the schedule stays
    that of the transformer. Raises what model_config raises."""
    other = model_config(config.transformer, pipeline_folder(source, transformer=False))
    return replace(config, text=other.text, image=other.image, encoders=other.encoders)


def pipeline_folder(source: Path | str, transformer: bool = True) -> Path:
    """A FluxPipeline's folder, downloaded where it names a Hugging Face repository; the
    transformer's part of that only where it is wanted."""
    parts = ("transformer", *FOLDERS) if transformer else FOLDERS
    return hub.local(source, parts)


def is_pipeline(folder: Path) -> bool:
    """Whether it is a FluxPipeline's, encoders and all."""
    return all((folder / name).is_dir() for name in FOLDERS)


def encoder_files(folder: Path) -> list[Path]:
    """Those of a FluxPipeline but for its transformer's: safetensors, configs, vocabularies."""
    files = [file for name in FOLDERS for file in sorted((folder / name).iterdir())]
    files = [file for file in files if file.suffix in COPIED]
    return [*files, *([folder / INDEX] if (folder / INDEX).is_file() else [])]


def copy_encoders(folder: Path, target: Path) -> None:
    """Copy a FluxPipeline but for its transformer."""
    for name in FOLDERS:
        (target / name).mkdir(parents=True)
    for file in encoder_files(folder):
        shutil.copyfile(file, target / file.relative_to(folder))


def _shift(file: Path) -> dict[str, Any]:
    """The fields of a ModelConfig that say a scheduler's shift. ConfigError for settings that would
    make other images."""
    value = _json(file)
    dynamic = value.get("use_dynamic_shifting", False)
    needed = PLAIN | ({"time_shift_type": "exponential"} if dynamic else {})
    for name, expected in needed.items():
        found = value.get(name, expected)
        same = found == expected or not (found or expected)  # null and 0 say False
        check(same, f"{file}: {name} = {found!r}, expected {expected!r}")
    if dynamic:
        stated = {field.name for field in fields(ShiftConfig)} & value.keys()
        try:
            line = ShiftConfig(**{name: value[name] for name in stated})
        except ConfigError as error:
            raise ConfigError(f"{file}: {str(error).removeprefix('ShiftConfig.')}") from None
        return {"shift": None, "shift_by_length": line}
    shift = value.get("shift", 1.0)
    number = isinstance(shift, (int, float)) and 0 < shift < math.inf
    check(number, f"{file}: shift = {shift!r}, expected a number above 0")
    return {"shift": float(shift)}


def _json(file: Path) -> dict[str, Any]:
    check(file.is_file(), f"{file}: no such file, expected it in a diffusers FluxPipeline")
    try:
        value = json.loads(file.read_bytes())
        check(isinstance(value, dict), "expected an object")
    except ValueError as error:  # ConfigError is one
        raise ConfigError(f"{file}: damaged, expected a JSON object ({error})") from None
    return value


def parts(config: ModelConfig) -> tuple[str, ...]:
    """Which encoders a model has: of `t5`, `clip` and `autoencoder`."""
    prompts = isinstance(config.text, PromptsConfig)
    image = isinstance(config.image, AutoencoderConfig)
    return (("t5", "clip") if prompts else ()) + (("autoencoder",) if image else ())


def load_encoder(config: ModelConfig, part: str, sharding: Any = None) -> dict:
    """Parameters of one of its `parts`, as stored.

    `sharding` as in torch_import.load. Raises what check_encoder raises.
    """
    place, table, tensors, like = _stored(config, part)
    stored = torch_import.stored_dtype(tensors)
    params = key_table.parameters(table, tensors, sizes(like), stored, place)
    return torch_import.load(params, like, sharding)


def check_encoder(config: ModelConfig, part: str) -> None:
    """Raise ConfigError where `config.encoders` names no folder with this part, or its tensors do
    not fit the config; their names and shapes alone are read."""
    _stored(config, part)


def _stored(config: ModelConfig, part: str) -> tuple[Path, list[Entry], dict[str, Any], dict]:
    """Of a part its folder, its table of keys, its tensors and our tree of shapes, which fit."""
    text, image = config.text, config.image
    if config.encoders is None:
        raise ConfigError("ModelConfig.encoders: expected a folder, found none")
    folder = Path(config.encoders)
    check(folder.is_dir(), f"ModelConfig.encoders = {config.encoders}: no such folder")
    if part == "autoencoder":
        assert isinstance(image, AutoencoderConfig)
        place, like = folder / AUTOENCODER, autoencoder.abstract(image)
        table, tensors = autoencoder_keys.diffusers_keys(image), _tensors(place)
    elif part == "t5":
        assert isinstance(text, PromptsConfig)
        place, like = folder / T5, t5.abstract(text.t5)
        table = text_encoder_keys.t5_keys(text.t5)
        tensors = text_encoder_keys.t5_tensors(_tensors(place))
    else:
        assert isinstance(text, PromptsConfig)
        place, like = folder / CLIP, clip.abstract(text.clip)
        table = text_encoder_keys.clip_keys(text.clip)
        tensors = text_encoder_keys.clip_tensors(_tensors(place))
    key_table.check_fit(place, table, tensors, sizes(like))
    return place, table, tensors, like


def _tensors(folder: Path) -> dict[str, Any]:
    return recognise.without_wrappers(folder, torch_import.read_tensors(folder))
