"""Where a model lies: a path, or a repository of Hugging Face, of which no more is downloaded than
is needed."""

import errno
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import logging

from d2m_jax.config import ConfigError, check, first_line, listed, near_path, shipped

# OWNER/NAME, then perhaps @REVISION and the path of a file.
REPOSITORY = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+?))?"
    r"(?:/(?P<file>[^@]+\.(?i:safetensors|sft|gguf)))?"
)
SHARD = re.compile(r"-\d{5}-of-(?!00001)(\d{5})\.\w+$")  # one of several
INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$")
WEIGHTS = (".safetensors", ".sft")
FILES = re.compile(r"\.(safetensors|sft|gguf|bin|ckpt|pth?|pkl|png|jpe?g|webp)$", re.IGNORECASE)
SMALL = (".json", ".txt", ".model", ".jinja")  # configs and vocabularies
# Of a model that fills the root: a model directory, an export for torch, diffusers' transformer.
OWN = ("params/", "sparse_flux.py", "diffusion_pytorch_model")
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
ADAPTER, LORA_CONFIG = "adapter_model", "adapter_config.json"  # PEFT's


def local(source: Path | str, parts: Sequence[str] = ("transformer",)) -> Path:
    """The path itself, or what was downloaded of a repository OWNER/NAME of Hugging Face: the
    folders `parts` of a pipeline, the model at its root, or its only file of weights.

    OWNER/NAME/FILE names a file, OWNER/NAME@REVISION a revision. Raises ConfigError that says what
    to do: for a gated repository, one that is not there, several files, no network.
    """
    source = place(source)
    path = Path(source)
    if os.path.lexists(path):
        check(path.exists(), f"{path}: a link to {os.path.realpath(path)}, which is not there")
        _refuse_cache(path)
        refuse_run(path)
        return path
    refuse_run(path)
    found = REPOSITORY.fullmatch(source)
    if found is None:
        far = "://" in source or re.fullmatch(r"[\w-][^/]*(/[^/]+){2,}", source)
        address = "; of Hugging Face, name OWNER/NAME or OWNER/NAME/FILE" if far else ""
        here = "" if path.is_absolute() or "://" in source else f" in {Path.cwd()}"
        raise ConfigError(f"{source}: no such file or folder{here}{address}")
    name, revision, file = found.group("name", "revision", "file")
    try:
        return _download(name, revision, file, parts)
    except ConfigError:
        raise
    except Exception as error:  # of huggingface_hub and of the packages below it
        raise ConfigError(f"{source}: {_told(name, error)}") from None


def place(source: Any) -> str:
    """The name of a place, `~` being the home folder, and teachers/NAME one that comes with the
    package where no other is there. ConfigError for what is none: None, a model,
    an empty string."""
    found = "an empty string" if source == "" else type(source).__name__
    right = isinstance(source, str | os.PathLike) and source != ""
    check(right, f"the model's path: found {found}, expected a path or OWNER/NAME")
    name = os.path.expanduser(os.fspath(source))  # noqa: PTH111  Path would drop a URL's slash
    try:
        os.lstat(name)
    except OSError as error:  # too long, or in a folder that is not ours to read
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR)
        check(absent, f"{name[:200]}: {error.strerror}")
    except ValueError as error:  # a null byte
        raise ConfigError(f"{name!r}: {error}") from None
    return str(shipped(name)) if name.startswith("teachers/") else name


def refuse_run(path: Path) -> None:
    """Raise ConfigError for the directory of a run, which holds models and is none, and for the
    model of a run that has none yet."""
    if path.name == "model" and not path.exists():
        path = path.parent
    if not (path / "models" / "start").is_dir():
        rivals = (path / "rivals").is_dir()  # which train first
        check(not rivals, f"{path}: a run that has not ended; it has no model of its own yet")
        return
    if (path / "model").is_dir():
        raise ConfigError(f"{path}: a run; its model is {path / 'model'}")
    saved = sorted((path / "models").iterdir(), key=lambda model: model.stat().st_mtime)
    raise ConfigError(f"{path}: a run that has not ended; its newest model is {saved[-1]}")


def check_folder_name(path: Path) -> None:
    """Raise ConfigError where a folder would be made that has a file's name."""
    found = FILES.search(path.name)
    free = found is None or path.is_dir()
    check(free, f"{path}: would be a folder; expected a name without {found and found[0]}")


def _refuse_cache(path: Path) -> None:
    """A hub cache keeps a repository's files in snapshots/REVISION."""
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    if not (snapshots.parent.name.startswith("models--") and snapshots.is_dir()):
        return
    kept = sorted(snapshots.iterdir())
    raise ConfigError(
        f"{path}: a folder of Hugging Face's cache, expected one of the {len(kept)} folders in its"
        f" snapshots{f', such as {kept[0]}' if kept else ''}"
    )


def refuse_shard(file: str) -> None:
    """Raise ConfigError for the name of a file that holds a part of a model."""
    shard = SHARD.search(file)
    check(
        shard is None,
        f"{file}: one of {shard and int(shard[1])} shards of a model; give their folder, or its"
        " *.safetensors.index.json",
    )


def _download(name: str, revision: str | None, file: str | None, parts: Sequence[str]) -> Path:
    logging.set_verbosity_error()  # it tells of every try, here twice
    try:
        # Asked once: list_repo_files would try for half a minute where there is no connection.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=20)
        files = [file.rfilename for file in info.siblings or ()]
    except Exception as error:  # huggingface_hub's own, and those of the connection
        if status(error) in (401, 403, 404):
            raise
        try:
            # No patterns at all: with some, or None, what we never wanted would be missed.
            cached = {"local_files_only": True, "allow_patterns": []}
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, **cached))
        except Exception:  # nothing of it in the cache
            if status(error) is None:
                raise
            raise error from None
        kept = (path for path in folder.rglob("*") if path.is_file())
        files = [path.relative_to(folder).as_posix() for path in kept]
        check(file is None or file in files, f"{name}: holds no {file} in Hugging Face's cache")
        return folder / (file or _chosen(name, files, parts)[1])
    if file is not None:
        near = listed([f for f in files if f.lower().endswith(WEIGHTS)])
        check(file in files, f"{name}: holds no {file}, but {near or 'no weights'}")
        refuse_shard(f"{name}/{file}")
        gguf = file.lower().endswith(".gguf")
        check(not gguf, f"{name}/{file}: GGUF, which holds quantised blocks; expected .safetensors")
    wanted, meant = (
        _chosen(name, files, parts) if file is None else (_with_settings(file, files), file)
    )
    folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted)
    return Path(folder) / meant


def status(error: Exception) -> int | None:
    """What a server answered, if that is what went wrong."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _chosen(name: str, files: Iterable[str], parts: Sequence[str]) -> tuple[list[str], str]:
    """What to download of a repository's files, and what of it is meant: "" for all of it."""
    files = sorted(files)
    if any(f.startswith(f"{parts[0]}/") for f in files):
        within = [f for f in files if f.startswith(tuple(f"{part}/" for part in parts))]
        return [*_without_copies(within), "model_index.json"], ""
    if "config.json" in files and any(f.startswith(OWN) for f in files):
        own = [f for f in files if f.startswith(("params/", "encoders/", "sparse_flux.py"))]
        root = [f for f in files if f.startswith(("config.json", "cut.", "model", OWN[2]))]
        return own + _without_copies(root), ""
    weights = [f for f in files if f.lower().endswith(WEIGHTS) and not SHARD.search(f)]
    weights += [f for f in files if INDEX.search(f)]  # each stands for its shards
    found = [f for f in weights if "/" not in f] or weights
    if len(found) == 1 and (index := INDEX.search(found[0])):
        stem = found[0][: index.start()]
        return [*found, *(f for f in files if f.startswith(stem) and SHARD.search(f))], found[0]
    if len(found) == 1:
        return _with_settings(found[0], files), found[0]
    if found:
        raise ConfigError(
            f"{name}: holds {len(found)} files of weights ({listed(found)}); name one, such as"
            f" {name}/{found[0]}"
        )
    kinds = sorted({f.rpartition(".")[2] for f in files} & {"gguf", "bin", "pt", "ckpt", "pth"})
    holds = f".{' and .'.join(kinds)} files alone" if kinds else "no weights"
    raise ConfigError(f"{name}: holds {holds}, expected .safetensors")


def _with_settings(file: str, files: Iterable[str]) -> list[str]:
    """A file, and PEFT's settings beside it where they are of it (lora_strength.stated)."""
    folder, name = posixpath.split(file)
    beside = [f for f in files if posixpath.dirname(f) == folder and f.lower().endswith(WEIGHTS)]
    mine = Path(name).stem == ADAPTER or len(beside) == 1
    return [file, *([posixpath.join(folder, LORA_CONFIG)] if mine else [])]


def _without_copies(files: Sequence[str]) -> list[str]:
    """Without pickles, and without lighter copies (NAME.fp16.safetensors) of weights that are
    there in full."""
    kept = [f for f in files if f.endswith((*WEIGHTS, *SMALL))]
    plain = {posixpath.dirname(f) for f in kept if f.endswith(WEIGHTS) and not variant(f)}
    return [f for f in kept if not (variant(f) and posixpath.dirname(f) in plain)]


def variant(file: str) -> str:
    """`fp16` of NAME.fp16.safetensors, of a shard of such, and of their index; else empty."""
    name = posixpath.basename(file)
    shard = r"(?:-\d{5}-of-\d{5})?"
    found = re.fullmatch(rf"[^.]+\.([\w-]+?){shard}\.(?:safetensors|sft)", name)
    found = found or re.fullmatch(r"[^.]+\.safetensors\.index\.([\w-]+)\.json", name)
    return found[1] if found else ""


def _told(name: str, error: Exception) -> str:
    """What happened and what helps, for one line."""
    page = f"{huggingface_hub.constants.ENDPOINT}/{name}"
    code = status(error)
    here = f"no such file or folder in {Path.cwd()}{near_path(name)}"
    nowhere = f"{here}; taken for a repository of Hugging Face,"
    if isinstance(error, errors.GatedRepoError):
        if code == 403:
            return (
                f"gated, and your login has no access to it: accept its licence on {page}, and let"
                " the token read gated repositories"
            )
        return f"gated: accept its licence on {page}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{nowhere} which is not there: {page} (is it misspelt? for a private one, {LOGIN})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository {page} has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{nowhere} which is not in its cache on this machine; without a connection, or with"
            " HF_HUB_OFFLINE, nothing else is asked"
        )
    line = (getattr(error, "server_message", None) or first_line(error))[:160]
    if isinstance(error, errors.DisabledRepoError):
        return f"the repository {page} is disabled"
    if code is not None and code not in (401, 403):
        return f"{page} answers {code}, try again later ({line})"
    if code in (401, 403):
        return f"Hugging Face refuses the login ({line}): {LOGIN}"
    return f"{nowhere} which is not to be had from {page} ({line})"
