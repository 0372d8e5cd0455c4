"""Let a teacher make its own training data from prompts alone.

    python -m d2m_jax.data.generate TEACHER --prompts FILE --output FOLDER

FOLDER becomes a cache (CacheConfig(path=FOLDER)) of the latents that the teacher samples and of the
features of its prompts; nothing is decoded. Killed at any moment and started again, it goes on and
ends with the same bytes. Many processes share the work, each with a teacher on its own devices.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import jax
import numpy as np
import tyro
from jaxtyping import Float, Int

from d2m_jax import flow, hosts
from d2m_jax.config import check
from d2m_jax.cores import use_cores
from d2m_jax.data import making, records
from d2m_jax.data.buckets import Size
from d2m_jax.data.making import Shard, TextFeatures
from d2m_jax.data.prompt_files import prompts_of
from d2m_jax.data.records import BFLOAT16, Record
from d2m_jax.grid import check_finite
from d2m_jax.keys import named_generator
from d2m_jax.named_arrays import fingerprint
from d2m_jax.output import check_writable
from d2m_jax.sampling.noise import noise_of
from d2m_jax.sampling.options import check_options
from d2m_jax.sampling.pipeline import Pipeline, denoise_steps, load_pipeline
from d2m_jax.sharding import batch_shards, local_mesh
from d2m_jax.weights.files.hub import check_folder_name

TOKENS = 4096  # of images that a device samples at once: one of 1024²
MOST = 32  # images that it does


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    # A model directory, a FluxPipeline's folder or its repository on Hugging Face.
    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEACHER")]
    prompts: Path  # .txt: one a line; .jsonl, .csv, .tsv, .parquet
    output: Path
    column: str | None = None  # of the prompts; default: prompt, caption or text
    images_per_prompt: int = 1
    sizes: tuple[str, ...] = ()  # HEIGHTxWIDTH, of which each image has one; default: the model's
    steps: int | None = None  # default: the model's own
    # One number, or two between which each image draws its own; default: the model's own.
    guidance: tuple[float, ...] = ()
    seed: int = 0  # of noise and of what is drawn
    # Points of the way from noise to image, at so many of the steps of each image: the student then
    # trains where the teacher's sampler goes. 0: images alone, and noise is mixed in as usual.
    trajectory: int = 0
    # Features of T5 at the places of padding, which FLUX reads too: kept, or dropped (read as
    # zeros, a tenth of the space for short prompts, and not what a sampler gives the model).
    padding: Literal["keep", "drop"] = "keep"
    batch_size: int | None = None  # images at a time, on all devices of a process
    quantize: Literal["int8", "fp8"] | None = None  # the large matrices of blocks
    encoders: str | None = None  # a FluxPipeline, for a teacher that has none
    among: command_line.AmongProcesses = command_line.Among()


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parsed = command_line.parse(
        Arguments,
        arguments,
        usage="python -m d2m_jax.data.generate",
        description=__doc__ or "",
        example="models/flux_dev --prompts prompts.txt --output data/flux_dev --guidance 1.5 5",
    )
    prompts = prompts_of(parsed.prompts, parsed.column)
    check_folder_name(parsed.output)
    check_writable(parsed.output / records.FILE)
    options = {
        "images_per_prompt": parsed.images_per_prompt,
        "sizes": [_size(size) for size in parsed.sizes],
        "steps": parsed.steps,
        "guidance": parsed.guidance,
        "seed": parsed.seed,
        "trajectory": parsed.trajectory,
        "batch_size": parsed.batch_size,
    }
    _check(**options)
    use_cores()
    with hosts.joined(*parsed.among.who):
        hosts.agree({"teacher": parsed.teacher, "prompts": len(prompts)})
        pipe = load_pipeline(
            parsed.teacher, mesh=local_mesh(), quantize=parsed.quantize, encoders=parsed.encoders
        )
        counts = generate(pipe, prompts, parsed.output, padding=parsed.padding, **options)
        path = f"path={str(parsed.output)!r}"
        hosts.say(f"{sum(counts.values())} samples; to train on them: data=CacheConfig({path})")


def _size(text: str) -> Size:
    parts = text.lower().split("x")
    check(
        len(parts) == 2 and all(part.isdigit() for part in parts),
        f"--sizes {text}: expected HEIGHTxWIDTH in pixels, such as 1024x1024",
    )
    return int(parts[0]), int(parts[1])


def _check(
    images_per_prompt: int,
    sizes: Sequence[Size],
    steps: int | None,
    guidance: Sequence[float],
    seed: int,
    trajectory: int,
    batch_size: int | None,
) -> None:
    """Raise ConfigError for what no model takes."""
    check_options(seed=seed, steps=steps, batch_size=batch_size)
    for height, width in sizes:
        check_options(height=height, width=width)
    for strength in guidance:
        check_options(guidance=strength)
    check(images_per_prompt >= 1, f"images_per_prompt = {images_per_prompt}: expected at least 1")
    most = "steps" if steps is None else f"steps = {steps}"
    fits = trajectory >= 0 and (steps is None or trajectory <= steps)
    check(fits, f"trajectory = {trajectory}: expected 0 to {most}")
    check(
        not guidance or (len(guidance) <= 2 and guidance[0] <= guidance[-1]),
        f"guidance = {' '.join(map(str, guidance))}: expected one number, or the least and the"
        " most",
    )


def generate(
    pipe: Pipeline,
    prompts: list[str],
    folder: Path,
    *,
    images_per_prompt: int = 1,
    sizes: Sequence[Size] = (),
    steps: int | None = None,
    guidance: Sequence[float] = (),
    seed: int = 0,
    trajectory: int = 0,
    padding: str = "keep",
    batch_size: int | None = None,
) -> dict[str, int]:
    """Sample the prompts into a cache; records by shard. All processes of a run call it.

    Image i, of prompt i // images_per_prompt, has noise, size and guidance that follow from seed
    and i alone. ConfigError for prompts, sizes or numbers that this model cannot have, and a folder
    that holds anything else than the same cache.
    """
    config = pipe.config
    steps = config.sample_steps if steps is None else steps
    _check(images_per_prompt, sizes, steps, guidance, seed, trajectory, batch_size)
    pipe.tell({}, max(guidance, default=None))
    guidance = list(guidance) or [config.guidance]
    sizes = list(dict.fromkeys(sizes)) or [(config.image.height, config.image.width)]
    for size in sizes:
        config.grid(*size)
    text = TextFeatures(pipe.encoders, padding)
    pipe.encoders.tokenizer.ids(prompts[:1])  # a model that reads words may not know them
    made = records.model_facts(config) | {
        "text_length": config.text.length,
        "padding": padding,
        "captions": "prompts",
        "prompts": len(prompts),
        "images_per_prompt": images_per_prompt,
        "data": records.checksum([str(images_per_prompt), *prompts]),
        "sizes": [list(size) for size in sizes],
        "teacher": fingerprint(pipe.params),
        "sampled": {
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "trajectory": trajectory,
        },
    }
    count = len(prompts) * images_per_prompt
    chosen = named_generator(seed, "size").integers(len(sizes), size=count)
    items = {size: np.flatnonzero(chosen == i) for i, size in enumerate(sizes)}
    shards = making.cut(
        {size: mine for size, mine in items.items() if len(mine)},
        lambda size: text.bytes() + _latent_bytes(pipe, size) * (1 + trajectory),
    )
    fraction = named_generator(seed, "guidance").random(count, np.float32)
    drawn = (guidance[0] + (guidance[-1] - guidance[0]) * fraction).astype(np.float32)

    def records_of(shard: Shard, advance: Callable[[int], None]) -> Iterator[Record]:
        size = shard.size
        at_once = batch_size or _at_once(pipe, size)
        for start in range(0, len(shard.items), at_once):
            mine = shard.items[start : start + at_once]
            filled = mine[np.arange(at_once) % len(mine)]  # one program for all batches
            captions = [prompts[i // images_per_prompt] for i in filled]
            points = _points(seed, shard.name, start, steps, trajectory)
            features = text(captions)
            sampled = _sample(pipe, captions, filled, size, steps, drawn[filled], seed, points)
            for row, item in enumerate(mine):
                facts: dict[str, Any] = {
                    "key": f"{item:08d}",
                    "caption": captions[row],
                    "guidance": float(drawn[item]),
                }
                arrays = {name: a[row] for name, a in sampled.items()}
                yield Record(facts, arrays | features[row])
            advance(len(mine))

    return making.make(
        folder, made, shards, lambda: Record({}, text([""])[0]), records_of, "sampling"
    )


def _at_once(pipe: Pipeline, size: Size) -> int:
    rows, columns = pipe.config.grid(*size)
    return min(MOST, max(1, TOKENS // (rows * columns))) * batch_shards(pipe.mesh)


def _latent_bytes(pipe: Pipeline, size: Size) -> int:
    rows, columns = pipe.config.grid(*size)
    return 2 * rows * columns * pipe.config.transformer.in_channels


def _points(seed: int, name: str, start: int, steps: int, count: int) -> list[int]:
    """At which steps the images of a batch are kept on their way; 0 is the noise."""
    draw = named_generator(seed, f"trajectory/{name}/{start}")
    return sorted(draw.choice(steps, count, replace=False).tolist())


def _sample(
    pipe: Pipeline,
    captions: list[str],
    numbers: Int[np.ndarray, " b"],
    size: Size,
    steps: int,
    guidance: Float[np.ndarray, " b"],
    seed: int,
    points: list[int],
) -> dict[str, np.ndarray]:
    """Latents [b, rows, columns, k], and where there are points `noisy` [b, p, rows, columns, k]
    with `time` [b, p]."""
    grid = pipe.config.grid(*size)
    channels = pipe.config.transformer.in_channels
    noise = noise_of(seed, numbers, grid[0] * grid[1], channels)
    ids = pipe.encoders.tokenizer.ids(captions)
    times = flow.schedule(steps, pipe.config.shift_at(grid[0] * grid[1]))
    ends = [*points, steps]
    kept, x, start = [], making.placed(pipe.mesh, np.asarray(noise)), 0
    with jax.set_mesh(pipe.mesh):
        text = pipe.encoders.text(making.placed(pipe.mesh, ids))
        strength = making.placed(pipe.mesh, guidance)
        for end in ends:
            if end > start:
                x = denoise_steps(pipe, x, (start, end), text, grid, times, strength)
            kept.append(np.asarray(x))
            start = end
    check_finite(kept[-1])
    shape = len(captions), *grid, channels
    found = {"latents": kept.pop().reshape(shape).astype(BFLOAT16)}
    if points:
        found["noisy"] = np.stack([x.reshape(shape) for x in kept], axis=1).astype(BFLOAT16)
        found["time"] = np.tile(times[points].astype(np.float32), (len(captions), 1))
    return found


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
