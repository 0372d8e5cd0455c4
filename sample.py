"""Write images for prompts: python sample.py MODEL --prompt "…" --output DIR"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from d2m_jax import command_line
from d2m_jax.config import check
from d2m_jax.sampling import grid, pipeline


@dataclass(frozen=True)
class Arguments:
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    output: Path  # folder for 0000.png, 0001.png, … and grid.png
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # may be repeated
    prompts: Path | None = None  # a text file with one prompt a line
    height: int | None = None  # pixels; what is None here is the model's own
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    top_k: int | None = None  # normal experts per token, 0 to all


def main(arguments: Sequence[str]) -> None:
    parsed = command_line.parse(
        Arguments, arguments, usage="sample.py", description="Write images for prompts."
    )
    prompts = read_prompts(parsed)
    pipe = pipeline.load_pipeline(parsed.model)
    images = pipe(
        prompts,
        height=parsed.height,
        width=parsed.width,
        steps=parsed.steps,
        guidance=parsed.guidance,
        seed=parsed.seed,
        top_k=parsed.top_k,
    )
    grid.write(images, parsed.output)
    print(f"{len(images)} images and grid.png in {parsed.output}")


def read_prompts(parsed: Arguments) -> list[str]:
    """Prompts of the command line and of the file; what is wrong is found before sampling."""
    file, prompts = parsed.prompts, list(parsed.prompt)
    if file is not None:
        check(file.is_file(), f"--prompts {file}: no such file, expected one prompt a line")
        prompts += [line.strip() for line in file.read_text().splitlines() if line.strip()]
    check(len(prompts) > 0, "--prompt, --prompts: expected at least one prompt, found none")
    check(
        parsed.output.is_dir() or not parsed.output.exists(),
        f"--output {parsed.output}: expected a folder, found a file",
    )
    return prompts


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
