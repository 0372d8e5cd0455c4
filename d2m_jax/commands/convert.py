"""Convert FLUX.1 from torch's files to a model directory, or back with --export."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import tyro


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    # A .safetensors file of BFL or ComfyUI, a folder of diffusers or of --export torch, a
    # repository OWNER/NAME of Hugging Face, or a model directory.
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    # A new model directory; with --export a new folder for torch or, of bfl, a .safetensors file.
    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")]
    dtype: Literal["bfloat16", "float32"] | None = None  # None: as stored
    # None: a model directory; "torch", the one for sparse models, brings the module that runs them.
    export: Literal["bfl", "diffusers", "torch"] | None = None
    # A diffusers FluxPipeline, folder or repository, whose encoders and autoencoder come along.
    encoders: str | None = None
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # FILE[:SCALE] to merge; may be repeated
    # A sparse model's neurons put back in the dense model's places, for debugging: gates are lost.
    dense: bool = False
    overwrite: bool = False  # replace what is at OUTPUT, a folder only if it is of the same kind


def main(arguments: Sequence[str], program: str = "convert_torch_weights.py") -> None:
    """The command; `program` is what it was called by."""
    parsed = command_line.parse(
        Arguments,
        arguments,
        usage=program,
        description=__doc__ or "",
        example="black-forest-labs/FLUX.1-dev models/flux_dev",
    )
    # Imported once the arguments are right: help and errors need not wait for jax.
    from d2m_jax.weights import convert

    convert.convert(
        parsed.source,
        parsed.output,
        dtype=parsed.dtype,
        export=parsed.export,
        encoders=parsed.encoders,
        overwrite=parsed.overwrite,
        dense=parsed.dense,
        loras=[convert.lora_of(argument) for argument in parsed.lora],
    )
    print(f"{parsed.output} written")


def command() -> int:
    """The command as it is installed; its exit code."""
    return command_line.run(partial(main, program="d2m-convert"), sys.argv[1:])
