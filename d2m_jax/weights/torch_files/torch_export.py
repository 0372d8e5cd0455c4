"""Models as torch's files: dense ones in BFL's layout or diffusers', any with its own module."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2m_jax import output
from d2m_jax.config import FluxConfig, ModelConfig, to_json
from d2m_jax.models.cut import Cut
from d2m_jax.named_arrays import finite, sizes
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.keys import flux_keys, key_table, sparse_keys
from d2m_jax.weights.keys.key_table import Entry

MODULE = Path(__file__).parent / "torch_module" / "sparse_flux.py"  # copied, never imported


def torch_tensors(
    table: list[Entry],
    params: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
) -> dict[str, safetensors.Tensor]:
    """Torch's tensors by a table, each made when taken from our parameters by name.

    `params` are arrays or key_table.Parameter; `progress` is told the bytes of every tensor. Taking
    one raises FloatingPointError that names it where it holds a NaN or an infinity.
    """
    shapes = key_table.their_shapes(table, sizes(params))
    found = {}
    for name, entries in key_table.by_name(table, "theirs").items():
        shape, dtype = shapes[name], np.dtype(params[entries[0].ours].dtype)

        known = all(getattr(params[entry.ours], "finite", False) for entry in entries)

        def take(
            name: str = name,
            entries: list[Entry] = entries,
            shape: tuple[int, ...] = shape,
            dtype: np.dtype = dtype,
            known: bool = known,
        ):
            array = key_table.write(entries, params, shape, dtype)
            if not known and not finite(array):
                raise FloatingPointError(f"{name} is not finite")
            if progress is not None:
                progress(array.nbytes)
            return array

        found[name] = safetensors.Tensor(shape, dtype, take)
    return found


def export_bfl(
    file: Path | str,
    config: FluxConfig,
    params: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
) -> None:
    """One .safetensors file in BFL's layout, as ComfyUI and others read it; `params` by name.
    ConfigError where it exists, unless `overwrite`."""
    output.check_free(file, overwrite)
    tensors = torch_tensors(flux_keys.keys("bfl", config), params, progress)
    safetensors.write(file, tensors, {"format": "pt"})


def export_diffusers(
    folder: Path | str,
    config: FluxConfig,
    params: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
    shard_bytes: int = 10_000_000_000,
    overwrite: bool = False,
) -> None:
    """A folder that diffusers' FluxTransformer2DModel.from_pretrained reads; `params` by name.

    It appears whole or not at all, with `overwrite` in the place of a folder of the same kind.
    """
    tensors = torch_tensors(flux_keys.keys("diffusers", config), params, progress)
    value = flux_keys.diffusers_config(config)
    output.check_space(Path(folder), safetensors.total_bytes(tensors))
    with output.new_directory(folder, _is_diffusers, "folder of diffusers", overwrite) as new:
        (new / "config.json").write_text(json.dumps(value, indent=2) + "\n")
        safetensors.write_sharded(new, "diffusion_pytorch_model", tensors, shard_bytes)


def _is_diffusers(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    own = ("config.json", "diffusion_pytorch_model")
    return all(file.name.startswith(own) for file in folder.iterdir())


def export_torch(
    folder: Path | str,
    config: ModelConfig,
    params: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
    beside: Callable[[Path], None] | None = None,
    shard_bytes: int = 10_000_000_000,
    overwrite: bool = False,
    cut: Cut | None = None,
) -> None:
    """A folder that is a PyTorch program: weights of any model, config.json, sparse_flux.py, which
    runs them, and KEYS.md, which names them; `params` by name, `beside` and `cut` as in
    model_directory.save.

    It appears whole or not at all, with `overwrite` in the place of a folder of the same kind.
    """
    tensors = torch_tensors(sparse_keys.keys(config.transformer), params, progress)
    output.check_space(Path(folder), safetensors.total_bytes(tensors))
    with output.new_directory(folder, _is_torch, "folder of --export torch", overwrite) as new:
        (new / "config.json").write_text(json.dumps(to_json(config), indent=1) + "\n")
        (new / "KEYS.md").write_text(sparse_keys.describe(config.transformer, tensors))
        shutil.copyfile(MODULE, new / MODULE.name)
        model_directory.save_cut(new, cut)
        if beside is not None:
            beside(new)
        safetensors.write_sharded(new, "model", tensors, shard_bytes)


def is_torch_export(folder: Path) -> bool:
    """Whether it is a folder of export_torch."""
    return all((folder / name).is_file() for name in ("config.json", MODULE.name))


def _is_torch(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    own = (
        r"config.json|KEYS.md|sparse_flux.py|cut.safetensors|encoders"
        r"|model(-\d+-of-\d+)?.safetensors(.index.json)?"
    )
    # Running the module leaves Python's cache there.
    return all(re.fullmatch(own + "|__pycache__", file.name) for file in folder.iterdir())
