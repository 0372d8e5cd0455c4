"""From torch's files to a model directory and back, holding few bytes at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from d2m_jax import hosts, output
from d2m_jax.config import ConfigError, ModelConfig, check
from d2m_jax.models.cut import Cut
from d2m_jax.named_arrays import names
from d2m_jax.progress import bar
from d2m_jax.weights.directory import model_directory, orbax_blocks
from d2m_jax.weights.directory.model_directory import ENCODERS
from d2m_jax.weights.files import hub
from d2m_jax.weights.keys.key_table import Parameter
from d2m_jax.weights.lora import lora
from d2m_jax.weights.lora.lora_differences import LowRank
from d2m_jax.weights.torch_files import torch_export, torch_import
from d2m_jax.weights.torch_files.dense import dense as put_together
from d2m_jax.weights.torch_files.diffusers_folder import (
    FOLDERS,
    INDEX,
    copy_encoders,
    encoder_files,
    is_pipeline,
    model_config,
    pipeline_folder,
    with_encoders,
)

Dtype = Literal["bfloat16", "float32"]


def convert(
    source: Path | str,
    target: Path | str,
    dtype: Dtype | None = None,
    export: Literal["bfl", "diffusers", "torch"] | None = None,
    loras: Sequence[tuple[Path | str, float]] = (),
    encoders: Path | str | None = None,
    overwrite: bool = False,
    dense: bool = False,
) -> None:
    """Write the transformer in `source` (whatever load_model takes) as a model directory.

    With `export` it is written for torch instead: "bfl" is one .safetensors file, "diffusers" a
    folder with transformer/, "torch" a folder for any model, sparse too, with the PyTorch module
    that runs it. Text encoders, tokenizers and autoencoder come along where the source is a whole
    FluxPipeline or has them, or from the FluxPipeline `encoders`. dtype None is the type that is
    stored, fp16 as float32 and fp8 as bfloat16. LoRA files are merged, each times its scale; then,
    with `dense`, a sparse model is put back together (torch_files/dense.py). What
    is at `target` is replaced with `overwrite` only, and a folder only by one of its kind. Raises
    ConfigError for bad input and for a full disk, and then leaves nothing behind.
    """
    source, target = hub.place(source), Path(hub.place(target))
    check(
        not target.exists() or not Path(source).exists() or not target.samefile(source),
        f"{target}: expected another place than the source's",
    )
    single = target.suffix.lower() in hub.WEIGHTS
    if export == "bfl":
        check(single, f"{target}: expected a name that ends in .safetensors")
    else:
        kind = "a model directory" if export is None else f"a folder (--export {export})"
        check(not single, f"{target}: would be {kind}; for one file in BFL's layout --export bfl")
        hub.check_folder_name(target)
    inside = Path(source).is_dir() and Path(source).resolve() in target.resolve().parents
    check(not inside, f"{target}: expected a place outside of the source's folder")
    check(export != "bfl" or not target.is_dir(), f"{target}: a folder, expected a file's name")
    output.check_free(target, overwrite)
    output.check_writable(target)
    config, params, cut, tell = _open(source, dtype, loras)
    if dense:
        transformer, params = put_together(source, config.transformer, params, cut)
        config, cut = replace(config, transformer=transformer), {}
    if encoders is not None:
        config = with_encoders(config, encoders)
    folder = Path(config.encoders) if config.encoders and export != "bfl" else None
    size = sum(param.nbytes for param in params.values())
    extra = sum(file.stat().st_size for file in encoder_files(folder)) if folder else 0
    output.check_space(target, size + extra)
    if folder is not None and export != "diffusers":
        config = replace(config, encoders=ENCODERS)

    def beside(new: Path) -> None:
        if folder is not None:
            copy_encoders(folder, new / ENCODERS)

    try:
        with bar(size, f"writing {target}") as advance:
            if export is None:
                how = {"beside": beside, "overwrite": overwrite, "cut": cut}
                model_directory.save(target, config, params, progress=advance, **how)
            elif export == "torch":
                how = {"beside": beside, "overwrite": overwrite, "cut": cut}
                torch_export.export_torch(target, config, params, advance, **how)
            elif export == "bfl":
                torch_export.export_bfl(target, config.transformer, params, advance, overwrite)
            else:
                kind = "folder of diffusers"
                with output.new_directory(target, _is_diffusers, kind, overwrite) as new:
                    transformer = new / "transformer"
                    torch_export.export_diffusers(transformer, config.transformer, params, advance)
                    if folder is not None:
                        copy_encoders(folder, new)
    except FloatingPointError as error:
        raise ConfigError(
            f"{source}: {error}: damaged weights or LoRA, or a type too narrow"
        ) from None
    tell()


def _is_diffusers(folder: Path) -> bool:
    known = {"transformer", INDEX, *FOLDERS}
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= known


def _open(
    source: Path | str, dtype: Dtype | None, loras: Sequence[tuple[Path | str, float]]
) -> tuple[ModelConfig, dict[str, Parameter], Cut, Callable[[], None]]:
    """Config and parameters by name, to be read block by block, a student's cut, and what tells
    of what had to be assumed."""
    folder, tell = pipeline_folder(source), lambda: None
    if model_directory.is_model_directory(folder):
        config, tree = model_directory.load(folder, dtype=dtype and jnp.dtype(dtype))
        params = {name: orbax_blocks.parameter(array) for name, array in names(tree).items()}
        exact = {name: param.astype(np.float32) for name, param in params.items()}
        cut = model_directory.load_cut(folder, config.transformer)
    else:
        opened = torch_import.open_source(folder)
        whole = folder.is_dir() and is_pipeline(folder)
        config = opened.model or model_config(opened.config, folder if whole else None)
        params = opened.parameters(dtype and jnp.dtype(dtype))
        exact, cut = opened.parameters(np.float32), {}
        tell = opened.tell_axes
        if opened.model is not None:
            cut = model_directory.load_cut(opened.where, opened.config)
    found = [lora.read(file, config.transformer, scale, cut) for file, scale in loras]
    for (file, scale), changes in zip(loras, found, strict=True):
        hosts.say(f"{file}: merged into {_layers(changes)}, at a strength of {scale:g}")
    return config, lora.merge(params, exact, found), cut, tell


def _layers(changes: Sequence[lora.Change]) -> str:
    """How many layers are changed, and of which ranks what changes them is."""
    layers = {change.tensor.name.rpartition(".")[0] for change in changes}
    parts = (getattr(change.difference, "direction", change.difference) for change in changes)
    ranks = sorted({part.down.shape[0] for part in parts if isinstance(part, LowRank)})
    told = f", rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}" if ranks else ""
    return f"{len(layers)} layer{'' if len(layers) == 1 else 's'}{told}"


def lora_of(argument: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE as the command line has it. ConfigError for a SCALE that is no finite
    number."""
    file, colon, scale = argument.rpartition(":")
    check(
        "://" not in argument,
        f"--lora {argument}: addresses are not downloaded, expected a path or OWNER/NAME/FILE",
    )
    if not colon or "/" in scale or Path(argument).exists():  # a colon in the file's name
        return Path(argument), 1.0
    number = math.nan if "_" in scale else _number(scale)
    check(
        math.isfinite(number), f"--lora {argument}: SCALE = {scale}, expected a number such as 0.8"
    )
    return Path(file), number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
