"""The model directory: config.json (a ModelConfig) and Orbax params/; runs end in one.

Of a student cut.safetensors says where it lies in the dense model (models/cut.py); older ones have
none.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from d2m_jax import hosts
from d2m_jax.config import (
    ConfigError,
    FluxConfig,
    ModelConfig,
    first_line,
    from_json,
    shipped,
    to_json,
)
from d2m_jax.models.cut import Cut, check_cut
from d2m_jax.models.flux import abstract
from d2m_jax.named_arrays import fingerprint, names, restructure
from d2m_jax.output import new_directory
from d2m_jax.weights.directory import orbax_blocks
from d2m_jax.weights.files import hub, safetensors
from d2m_jax.weights.keys import recognise

ENCODERS = "encoders"  # the folder in which a model directory may hold its own
CUT = "cut.safetensors"
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | Mapping


def save(
    path: Path | str,
    config: ModelConfig,
    params: Mapping,
    dtype: DTypeLike | None = None,
    progress: Callable[[int], None] | None = None,
    beside: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    cut: Cut | None = None,
) -> None:
    """Write a model directory, floats stored as `dtype` (None: as they are), and a student's `cut`.

    `params` is a tree, or already by dotted names, of arrays or of key_table.Parameter, which are
    read block by block; `progress` is told the bytes of each; `beside(folder)` writes what else
    belongs there. It appears whole or not at all, and only then replaces, with `overwrite`, a model
    directory that was there. All processes call it, on one file system; the first writes what is
    not cut over them. Raises ConfigError where `path` is taken, or the disk is full.
    """
    path, named = Path(os.path.abspath(path)), names(params)
    if dtype is not None:
        named = {
            name: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
            for name, a in named.items()
        }
    with contextlib.ExitStack() as stack:

        def begin():
            there = new_directory(path, _is_ours, "model directory", overwrite)
            new = stack.enter_context(there)
            (new / "config.json").write_text(json.dumps(to_json(config), indent=1) + "\n")
            save_cut(new, cut)
            if beside is not None:
                beside(new)
            if not spread:
                orbax_blocks.save(new / "params", named, progress)
            return str(new)

        spread = any(not getattr(a, "is_fully_addressable", True) for a in named.values())
        new = Path(hosts.by_first(begin))
        if spread:
            orbax_blocks.save_together(new / "params", named)
        hosts.by_first(stack.close)


def _is_ours(path: Path) -> bool:
    known = {"config.json", "params", ENCODERS, CUT}
    return path.is_dir() and {p.name for p in path.iterdir()} <= known


def load_config(path: Path | str) -> ModelConfig:
    """The config of a model directory, the path of its encoders made absolute. Raises ConfigError
    where it is missing or damaged."""
    path = shipped(path)
    hub.refuse_run(path)
    file = path / "config.json"
    if not file.is_file():
        kind = recognise.kind(Path(path)) if Path(path).is_file() else None
        if kind is not None:
            raise ConfigError(f"{path}: {kind}; expected a model directory")
        if Path(path).is_file() or (Path(path) / "transformer").is_dir():
            found = "a file" if Path(path).is_file() else "a FluxPipeline of diffusers"
            raise ConfigError(_convert(path, found))
        found = "no config.json in it" if Path(path).is_dir() else "no such directory"
        raise ConfigError(
            f"{path}: expected a model directory (config.json and params/), found {found};"
            " convert_torch_weights.py makes one of torch's files or a repository of Hugging Face"
        )
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: damaged, expected JSON ({error})") from None
    if isinstance(value, dict) and "_class_name" in value:
        raise ConfigError(_convert(path, "a folder of diffusers"))
    config = from_json(ModelConfig, value, str(file))
    if config.encoders is None:
        return config
    return replace(config, encoders=os.path.abspath(Path(path) / config.encoders))


def save_cut(folder: Path, cut: Cut | None) -> None:
    """Write a student's cut into its folder; nothing where there is none."""
    if cut:
        safetensors.write(folder / CUT, cut)


def load_cut(path: Path | str, config: FluxConfig) -> dict[str, np.ndarray]:
    """The cut of a model of ours in this folder; {} of a dense one and of an older one. ConfigError
    for one that is damaged or another model's."""
    file = shipped(path) / CUT
    if not file.is_file():
        return {}
    cut = {name: np.array(tensor) for name, tensor in safetensors.read(file).items()}
    check_cut(file, config, cut)
    return cut


def _convert(path: Path | str, found: str) -> str:
    return (
        f"{path}: expected a model directory, found {found}; make one of it with: python"
        f" convert_torch_weights.py {path} OUTPUT"
    )


def placement(
    sharding: Sharding | None,
) -> Callable[[str, tuple[int, ...]], jax.sharding.Sharding]:
    """Where an array goes, as a function of its dotted name and shape."""
    if sharding is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return lambda name, shape: first
    if isinstance(sharding, Mapping):
        tree = names(dict(sharding))
        return lambda name, shape: tree[name]
    return sharding


def is_model_directory(path: Path | str) -> bool:
    """Whether there is a folder of ours: config.json beside params/. ConfigError for no path."""
    folder = hub.place(path)
    file, params = f"{folder}/config.json", f"{folder}/params"
    return os.path.isfile(file) and os.path.exists(params)


def stored(path: Path | str, sharding: Sharding | None = None) -> tuple[ModelConfig, dict, str]:
    """What `load` would give as stored, without reading it: config, shapes with their places, and
    the fingerprint that the parameters were saved with. Raises what `load` raises."""
    config, path = load_config(path), shipped(path)
    directory = Path(os.path.abspath(path)) / "params"
    if not directory.is_dir():
        raise ConfigError(f"{path}: expected params/ beside config.json, found none")
    expected = abstract(config.transformer)
    reader = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    with reader as checkpointer, _told_by_all(directory):
        metadata = checkpointer.metadata(directory)
        found, note = metadata.item_metadata, metadata.custom_metadata or {}
        if found is None:
            raise ValueError("its list of arrays is gone")
        kinds = {name: (tuple(m.shape), m.dtype) for name, m in dict(found).items()}
    _check_fit(path, {name: shape for name, (shape, _) in kinds.items()}, names(expected))
    place = placement(sharding)
    wanted = {
        name: jax.ShapeDtypeStruct(*kind, sharding=place(name, kind[0]))
        for name, kind in kinds.items()
    }
    return config, restructure(expected, wanted), note.get("fingerprint", "none")


def load(
    path: Path | str, dtype: DTypeLike | None = jnp.float32, sharding: Sharding | None = None
) -> tuple[ModelConfig, dict]:
    """Config and parameters, floats restored as `dtype` (None: as stored).

    `sharding` says where each array goes: a function of dotted name and shape, or a tree like the
    parameters; None is this process's first device. Raises ConfigError where it is missing or
    damaged, or params/ does not fit config.json.
    """
    config, wanted, expected = stored(path, sharding)
    directory = Path(os.path.abspath(shipped(path))) / "params"
    with _told_by_all(directory):
        # Not by the checkpointer: it would wait for a process whose part is damaged.
        named = orbax_blocks.read(directory, names(wanted))
    with _told_by_all(directory):
        whole = fingerprint(named) == expected
    if not whole:
        raise ConfigError(f"{directory}: damaged, the arrays are not those that were saved")
    if dtype is not None:
        for name, a in named.items():
            named[name] = a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
    return config, restructure(wanted, named)


@contextlib.contextmanager
def _told_by_all(directory: Path) -> Iterator[None]:
    """Make a ConfigError, on all processes, of whatever one of them finds while reading."""
    said = None
    try:
        yield
    except Exception as error:  # Orbax, tensorstore and JSON each have their own
        said = first_line(error)
    said = next(filter(None, hosts.gather(said)), None)
    if said is not None:
        raise ConfigError(f"{directory}: damaged, cannot be read ({said})")


def _check_fit(path: Path | str, stored: dict[str, tuple], expected: dict) -> None:
    """Raise ConfigError that names the first parameter that is missing, unknown or misshapen."""
    wrong = [
        f"{name} is {stored.get(name, 'missing')}, expected {tuple(a.shape)}"
        for name, a in expected.items()
        if stored.get(name) != tuple(a.shape)
    ]
    wrong += [f"{name} is there, expected no such name" for name in stored if name not in expected]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigError(f"{path}: params/ does not fit config.json: {wrong[0]}{more}")
