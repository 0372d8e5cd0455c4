"""Write images for prompts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import tyro

from d2m_jax.config import MeshConfig, check, listed
from d2m_jax.sampling.options import captions_of, check_options, read_prompts

# Of Arguments, what Pipeline takes under the same name.
OPTIONS = (
    *("height", "width", "steps", "guidance", "seed", "top_k", "reuse", "true_cfg"),
    *("max_sequence_length", "batch_size", "tile"),
)


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    # a model directory, a diffusers FluxPipeline folder or its Hugging Face repository; with
    # --encoders also a transformer alone: a file of BFL or ComfyUI, a folder of diffusers
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    output: Path  # folder for 0000.png, 0001.png, … and grid.png
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # may be repeated
    prompts: Path | None = None  # a text file in UTF-8 with one prompt a line
    # A FluxPipeline, folder or repository, whose text encoders and autoencoder serve.
    encoders: str | None = None
    height: int | None = None  # pixels; what is None here is the model's own
    width: int | None = None  # the same
    steps: int | None = None  # from noise to image
    guidance: float | None = None  # how closely images follow their prompts
    seed: int = 0  # of the noise
    # Normal experts per token; several numbers: each for an equal share of the steps.
    top_k: tuple[int, ...] | None = None
    reuse: int = 1  # compute the normal experts in every so many-th step only
    negative_prompt: str | None = None  # what images should not show; counts where true_cfg > 1
    true_cfg: float = 1.0  # strength of classifier-free guidance, at twice the time
    max_sequence_length: int | None = None  # tokens of T5
    batch_size: int | None = None  # images at a time; None: as many as make about 2048 tokens
    tile: int | None = None  # decode in tiles of so many latents a side, for large images
    dtype: Literal["bfloat16", "float32"] | None = None  # None: bfloat16, on a CPU float32
    quantize: Literal["int8", "fp8"] | None = None  # the large matrices of blocks, in half of bf16
    # Devices: each with images of its own, or `--mesh.tensor 4` to make one image on four.
    mesh: MeshConfig = MeshConfig()


def main(arguments: Sequence[str], program: str = "sample.py") -> None:
    """The command; `program` is what it was called by."""
    parsed = command_line.parse(
        Arguments,
        arguments,
        usage=program,
        description=__doc__ or "",
        example="teachers/pictograms --prompt 'red anchor left of blue earth' --output samples",
        elsewhere={
            "--lora": "merge it into its model first: python convert_torch_weights.py MODEL OUTPUT"
            " --lora FILE"
        },
    )
    # Imported once the arguments are right: help and errors need not wait for jax.
    from d2m_jax import grid
    from d2m_jax.sampling import pipeline
    from d2m_jax.sharding import make_mesh

    prompts = prompts_of(parsed)
    options = {name: getattr(parsed, name) for name in OPTIONS}
    check_options(**options)
    mesh = make_mesh(parsed.mesh)
    pipe = pipeline.load_pipeline(
        parsed.model, parsed.dtype, mesh, parsed.quantize, encoders=parsed.encoders
    )
    images = pipe(prompts, negative_prompts=parsed.negative_prompt, progress=True, **options)
    there = {file.stem for file in parsed.output.glob("[0-9][0-9][0-9][0-9].png")}
    grid.write(images, parsed.output)
    count = f"{len(images)} image{'s' if len(images) > 1 else ''}"
    older = sorted(there - {f"{i:04}" for i in range(len(images))})
    left = f"; older images there: {listed(older)}" if older else ""
    print(f"{count} and grid.png in {parsed.output}{left}")


def prompts_of(parsed: Arguments) -> list[str]:
    """Prompts of the command line and of the file; what is wrong is found before sampling."""
    from d2m_jax.output import check_writable
    from d2m_jax.weights.files.hub import check_folder_name

    prompts = list(parsed.prompt)
    if parsed.prompts is not None:
        prompts += read_prompts(parsed.prompts)
    check(len(prompts) > 0, "--prompt, --prompts: expected at least one prompt, found none")
    check_folder_name(parsed.output)
    check_writable(parsed.output / "grid.png")
    return captions_of(prompts, "--prompt")


def command() -> int:
    """The command as it is installed; its exit code."""
    return command_line.run(partial(main, program="d2m-sample"), sys.argv[1:])
