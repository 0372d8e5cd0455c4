"""A CLIPModel's folder, as transformers saves it and as the hub has it: config.json, weights,
preprocessor_config.json, tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m_jax.config import CLIPModelConfig, ConfigError, check
from d2m_jax.models import clip_vision
from d2m_jax.named_arrays import sizes
from d2m_jax.weights.keys import key_table, recognise, text_encoder_keys
from d2m_jax.weights.keys.key_table import Entry
from d2m_jax.weights.torch_files import torch_import

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# What CLIPImageProcessor does where its file says nothing.
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # PIL's number


@dataclass(frozen=True)
class Preprocessor:
    """The shorter side to so many pixels, bicubic; the middle; mean and deviation by colour."""

    shortest_edge: int = 224
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def config_of(folder: Path) -> tuple[CLIPModelConfig, Preprocessor]:
    """What the folder holds. ConfigError names the file and field that make it no CLIP of ours, or
    the tensor that does not fit; shapes alone are read."""
    config, _, _ = _stored(folder)
    return config, _preprocessor(folder, config)


def load_clip(folder: Path, sharding: Any = None) -> tuple[CLIPModelConfig, dict]:
    """The config and the parameters, in the type that the file has. `sharding` as in
    torch_import.load; raises what config_of raises."""
    config, table, tensors = _stored(folder)
    like = clip_vision.abstract(config)
    stored = torch_import.stored_dtype(tensors)
    params = key_table.parameters(table, tensors, sizes(like), stored, folder)
    return config, torch_import.load(params, like, sharding)


def _stored(folder: Path) -> tuple[CLIPModelConfig, list[Entry], dict[str, Any]]:
    check(folder.is_dir(), f"{folder}: no such folder, expected a CLIPModel's (transformers)")
    where = folder / CONFIG
    config = text_encoder_keys.clip_model_config(_json(where), str(where))
    tensors = recognise.without_wrappers(folder, torch_import.read_tensors(folder))
    tensors = text_encoder_keys.clip_model_tensors(tensors)
    table = text_encoder_keys.clip_model_keys(config)
    key_table.check_fit(folder, table, tensors, sizes(clip_vision.abstract(config)))
    return config, table, tensors


def _preprocessor(folder: Path, config: CLIPModelConfig) -> Preprocessor:
    file = folder / PREPROCESSOR
    value = _json(file) if file.is_file() else {}
    for name in STEPS:
        check(value.get(name, True) is True, f"{file}: {name} = {value.get(name)}, expected true")
    expected = {"resample": BICUBIC, "rescale_factor": 1 / 255}
    for name, number in expected.items():
        found = value.get(name, number)
        near = isinstance(found, int | float) and abs(found - number) < 1e-9
        check(near, f"{file}: {name} = {found!r}, expected {number:g}")
    side = config.vision.image_size
    edge = _side(file, value, "size", "shortest_edge", side)
    crop = _side(file, value, "crop_size", "height", side)
    found = value.get("crop_size")
    crops = found if isinstance(found, dict) else {}
    square = crops.get("width", crop) == crop
    check(square and crop == side, f"{file}: crop_size = {found}, expected {side} × {side}")
    check(edge >= crop, f"{file}: size = {edge}, expected at least crop_size, {crop}")
    colours = []
    for name, usual in (("image_mean", MEAN), ("image_std", STD)):
        found = value.get(name, usual)
        right = isinstance(found, list | tuple) and len(found) == 3
        right = right and all(isinstance(number, int | float) for number in found)
        check(right, f"{file}: {name} = {found!r}, expected three numbers")
        colours.append(tuple(map(float, found)))
    return Preprocessor(edge, crop, *colours)


def _side(file: Path, value: dict[str, Any], name: str, inner: str, usual: int) -> int:
    """A number of pixels, which older files give by itself."""
    found = value.get(name, usual)
    found = found.get(inner) if isinstance(found, dict) else found
    check(isinstance(found, int) and found > 0, f"{file}: {name}: expected {inner} in pixels")
    return int(found or 0)


def _json(file: Path) -> dict[str, Any]:
    check(file.is_file(), f"{file}: no such file, expected it in a CLIPModel's folder")
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: damaged, expected a JSON object ({error})") from None
    check(isinstance(value, dict), f"{file}: expected a JSON object")
    return value
