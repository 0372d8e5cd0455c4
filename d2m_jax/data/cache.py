"""Encode images and captions once.

    python -m d2m_jax.data.cache CONFIG.py --output FOLDER

CONFIG.py is that of a run whose data are images (ImagesConfig). FOLDER gets what the autoencoder,
T5 and CLIP make of them; a run with data=CacheConfig(path=FOLDER) then trains without loading
these. Killed at any moment and started again, it goes on and ends with the same bytes. Many
processes share the work, each with its own devices.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from d2m_jax import command_line  # first, for it tells where there is no environment

# isort: split
import jax
import numpy as np
import PIL
import tyro

from d2m_jax import hosts
from d2m_jax.config import (
    ImagesConfig,
    ModelConfig,
    PixelsConfig,
    RunConfig,
    check,
    teacher_path,
    to_json,
)
from d2m_jax.cores import use_cores
from d2m_jax.data import making, records
from d2m_jax.data.batches import Bad
from d2m_jax.data.buckets import Size
from d2m_jax.data.images import Example, Images
from d2m_jax.data.making import Shard, TextFeatures
from d2m_jax.data.records import BFLOAT16, Record
from d2m_jax.data.source import with_vocabulary
from d2m_jax.data.sources.any_source import BadSample
from d2m_jax.encoders import PIXELS, Encoders
from d2m_jax.output import check_writable
from d2m_jax.sharding import batch_shards, local_mesh
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files.hub import check_folder_name

PROGRAM = "python -m d2m_jax.data.cache"
EXAMPLE = "examples/emoji/teacher.py --output data/emoji_encoded"
MOST = 32  # images that a device encodes at once
THREADS = 4  # that decode images


@dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    output: Path
    # Features of T5 at the places of padding, which FLUX reads too: kept, or dropped (read as
    # zeros, a tenth of the space for short captions, and not what a sampler gives the model).
    padding: Literal["keep", "drop"] = "keep"
    all_captions: bool = False  # one record per caption, not only for an image's first
    among: command_line.AmongProcesses = command_line.Among()


def main(arguments: Sequence[str]) -> None:
    """The command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(command_line.with_example(__doc__ or "", PROGRAM, EXAMPLE))
        return
    config = command_line.load_config(arguments[0])
    check(
        isinstance(config, RunConfig),
        f"{arguments[0]}: get_config() returns {type(config).__name__}, expected RunConfig",
    )
    parsed = command_line.parse(
        Arguments,
        arguments[1:],
        usage=f"{PROGRAM} {arguments[0]}",
        description=__doc__ or "",
        example="--output data/encoded",
        default=Arguments(config, Path()),
    )
    check(parsed.output != Path(), "--output FOLDER: missing")
    check_folder_name(parsed.output)
    check_writable(parsed.output / records.FILE)
    use_cores(parsed.config.quick_compilation)
    with hosts.joined(*parsed.among.who):
        hosts.agree({"config": to_json(parsed.config), "output": str(parsed.output)})
        counts = cache(parsed.config, parsed.output, parsed.padding, parsed.all_captions)
        path = f"path={str(parsed.output)!r}"
        hosts.say(f"{sum(counts.values())} samples; to train on them: data=CacheConfig({path})")


def cache(
    config: RunConfig, folder: Path, padding: str = "keep", all_captions: bool = False
) -> dict[str, int]:
    """Encode the images of a run's data into `folder`; records by shard. All processes call it.

    ConfigError for data that are no images, a folder that holds anything else than the same cache,
    and more bad samples than ImagesConfig.max_bad.
    """
    check(
        isinstance(config.data, ImagesConfig),
        f"RunConfig.data is {type(config.data).__name__}: expected ImagesConfig, whose images are"
        " encoded",
    )
    assert isinstance(config.data, ImagesConfig)
    model = _model(config)
    encoders, images = Encoders(model, mesh=local_mesh()), Images(config.data, model.image)
    text, bad = TextFeatures(encoders, padding), Bad(config.data.max_bad, "ImagesConfig.max_bad")

    def bytes_of(size: Size) -> int:
        pixels = size[0] * size[1]
        latent = (
            3 if isinstance(model.image, PixelsConfig) else 4 * model.image.latent_channels / 64
        )
        return text.bytes() + int(pixels * latent)

    shards = making.cut(images.entries(), bytes_of)
    made = records.model_facts(model) | {
        "text_length": model.text.length,
        "padding": padding,
        "captions": "all" if all_captions else "first",
        "template": config.data.template,
        "background": list(config.data.background),
        "data": images.fingerprint(),
        "sizes": [list(size) for size in images.sizes],
        "decoder": f"Pillow {PIL.__version__}",
    }

    def records_of(shard: Shard, advance: Callable[[int], None]) -> Iterator[Record]:
        for examples, read in _read_ahead(images, shard, _at_once(shard.size), bad):
            yield from _encoded(encoders, text, examples, shard.size, all_captions)
            advance(read)
        making.name_bad(folder, bad.told)  # before the shard is there: who is killed loses no name

    counts = making.make(
        folder, made, shards, lambda: Record({}, text([""])[0]), records_of, "encoding"
    )
    if count := making.name_bad(folder, bad.told):
        where = folder / "left_out.*.txt"
        told = f"left out: {count} samples that cannot be used, which are named in {where}"
        print(told, file=sys.stderr, flush=True)
    return counts


def _model(config: RunConfig) -> ModelConfig:
    if config.teacher is not None:
        return model_directory.load_config(teacher_path(config.teacher))
    assert config.model is not None  # RunConfig has one of the two
    return with_vocabulary(config.data, config.model)


def _at_once(size: Size) -> int:
    """Images of a batch: the devices of this process take equally many."""
    each = min(MOST, max(1, PIXELS // (size[0] * size[1])))
    return each * batch_shards(local_mesh())


def _read_ahead(
    images: Images, shard: Shard, count: int, bad: Bad
) -> Iterator[tuple[list[Example], int]]:
    """The samples of a shard, without those that are bad, `count` at a time, and how many these
    were with them; the next ones are decoded while the caller is busy."""

    def read(entry: int) -> Example | None:
        try:
            return images.read(entry, shard.size)
        except BadSample as error:
            bad.add(error)
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        parts = (shard.items[i : i + count] for i in range(0, len(shard.items), count))
        waiting = [[pool.submit(read, int(e)) for e in part] for part in itertools.islice(parts, 2)]
        while waiting:
            found = [job.result() for job in waiting.pop(0)]
            waiting += [[pool.submit(read, int(e)) for e in p] for p in itertools.islice(parts, 1)]
            yield [example for example in found if example is not None], len(found)


def _encoded(
    encoders: Encoders,
    text: TextFeatures,
    examples: list[Example],
    size: Size,
    all_captions: bool,
) -> Iterator[Record]:
    """Records of the samples, in their order."""
    if not examples:
        return
    count = _at_once(size)
    pixels = np.stack([example.pixels for example in examples])
    arrays = _of_images(encoders, _filled(pixels, count))
    said = [
        (i, caption)
        for i, example in enumerate(examples)
        for caption in (example.captions if all_captions else example.captions[:1])
    ]
    for start in range(0, len(said), count):
        part = said[start : start + count]
        features = text([*(caption for _, caption in part), *[""] * (count - len(part))])
        for (i, caption), mine in zip(part, features, strict=False):
            example = examples[i]
            facts: dict[str, Any] = {
                "key": example.key,
                "caption": caption,
                "original": list(example.original),
                "crop": list(asdict(example.crop).values()),
            }
            yield Record(facts, {name: a[i] for name, a in arrays.items()} | mine)


def _of_images(encoders: Encoders, pixels: np.ndarray) -> dict[str, np.ndarray]:
    if isinstance(encoders.config.image, PixelsConfig):
        return {"image": pixels}
    mesh = local_mesh()
    with jax.set_mesh(mesh):
        moments = encoders.moments(making.placed(mesh, pixels))
        names = ("mean", "logvar")
        return {n: np.asarray(a).astype(BFLOAT16) for n, a in zip(names, moments, strict=True)}


def _filled(pixels: np.ndarray, count: int) -> np.ndarray:
    """Repeated up to `count`, so that one program serves all batches."""
    return pixels[np.arange(count) % len(pixels)]


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv[1:]))
