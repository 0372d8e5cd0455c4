"""Images of many prompts as files, for those who score them: resumable, shared out over processes.

OUTPUT/export.json says what they were made with, OUTPUT/images.jsonl which image has which noise,
and OUTPUT/images is the folder for the scorer: nothing else is ever in there. A process that is
killed loses at most what it was drawing; given again, the same command goes on.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from d2m_jax import hosts
from d2m_jax.config import (
    AutoencoderConfig,
    ConfigError,
    ModelConfig,
    WordsConfig,
    check,
    check_same,
)
from d2m_jax.cores import use_cores
from d2m_jax.encoders import Encoders
from d2m_jax.evaluate.arguments import Drawn, Export, Sampled
from d2m_jax.evaluate.layouts import SCORERS, Layout, Picture, layout
from d2m_jax.grid import to_image
from d2m_jax.named_arrays import fingerprint
from d2m_jax.output import check_writable, full_disk, new_file, write_json
from d2m_jax.progress import bar
from d2m_jax.sampling.noise import noise_of
from d2m_jax.sampling.pipeline import Pipeline, load_pipeline
from d2m_jax.sharding import local_mesh
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files.hub import check_folder_name
from d2m_jax.weights.torch_files.diffusers_folder import parts, pipeline_folder

FILE, LIST, IMAGES, UNFINISHED = "export.json", "images.jsonl", "images", "unfinished"
OTHER = "expected the same, or another folder"
KEPT = "the images that were finished are kept, and the same command goes on from there"


def run(asked: Export) -> None:
    """What `evaluate.py export` does."""
    name = asked.name or Path(asked.model).name.split("@")[0]
    found = layout(asked.scorer, asked.prompts, asked.images_per_prompt, name)
    check_folder_name(asked.output)
    use_cores()
    with hosts.joined(*asked.among.who):
        side = check_model(asked, asked.model, found.prompts, SCORERS[asked.scorer].square)
        draw(asked, asked.model, found, asked.output)
        images = str((asked.output / IMAGES).resolve())
        command = found.command.replace("{folder}", images).replace("{side}", str(side))
        hosts.say(f"{len(found.pictures)} files in {images}; in the scorer's folder: {command}")


def check_model(asked: Drawn, model: str, prompts: Sequence[str], square: bool = False) -> int:
    """Raise ConfigError for what would keep a model from drawing this, as far as it is known before
    its parameters are loaded; the height of its images. A repository is downloaded."""
    config = ModelConfig(image=AutoencoderConfig())  # what is no model directory is FLUX.1's
    folder = pipeline_folder(model)
    if model_directory.is_model_directory(folder):
        config = model_directory.load_config(folder)
        if asked.encoders is None and (config.encoders is not None or not parts(config)):
            encoders = Encoders(config, load=False)
            words = isinstance(config.text, WordsConfig)  # a line of all unknown ones is long
            for some in [[prompt] for prompt in prompts] if words else [prompts]:
                encoders.check(some)
    height = config.image.height if asked.height is None else asked.height
    width = config.image.width if asked.width is None else asked.width
    config.grid(height, width)
    message = f"image size {height} × {width}: expected a square, of which the scorer reads four"
    check(not square or height == width, f"{message} (--height, --width)")
    return height


def draw(asked: Sampled, model: str, layout: Layout, folder: Path, what: str = "sampling") -> None:
    """Export what a command asks for. All processes call it."""
    numbers = {"dtype": asked.dtype, "quantize": asked.quantize}
    hosts.agree({"model": model, "files": len(layout.pictures)} | asked.options | numbers)

    def load() -> Pipeline:
        return load_pipeline(
            model, asked.dtype, local_mesh(), asked.quantize, encoders=asked.encoders
        )

    export(load, layout, folder, asked.options, numbers, asked.batch_size, what)


def export(
    load: Callable[[], Pipeline],
    layout: Layout,
    folder: Path,
    options: dict[str, Any],
    numbers: dict[str, Any] | None = None,
    batch_size: int | None = None,
    what: str = "sampling",
) -> None:
    """Draw what is not there yet of a layout into folder/images. All processes of a run call it.

    The model is loaded when it is known that something is left to draw. `options` are those of
    Pipeline, seed among them; `numbers` says what it computes in. Image i has the noise of number
    i, whatever is drawn with it. ConfigError for a folder that holds anything else than the same
    export.
    """
    made = options | (numbers or {})
    lines = [
        {"file": picture.file, "prompt": picture.prompt, "images": picture.images}
        for picture in layout.pictures
    ]
    hosts.by_first(lambda: _begin(folder, made, lines, layout.texts))
    mine = layout.pictures[jax.process_index() :: jax.process_count()]
    left = [picture for picture in mine if not (folder / IMAGES / picture.file).is_file()]
    there = len(mine) - len(left)
    if sum(hosts.gather(len(left))) > 0:
        if there:
            hosts.say(f"{folder}: {there} of {len(mine)} files are there already")
        pipe = load()
        model = _facts(pipe, options)
        hosts.by_first(lambda: _same_model(folder, model))
        pipe.tell(
            {"prompts": layout.prompts},
            options.get("guidance"),
            options.get("negative_prompts") is not None,
            options.get("true_cfg", 1.0),
            options.get("max_sequence_length"),
        )
        with full_disk(folder, KEPT):
            _draw(pipe, left, folder, options, batch_size, what)
    hosts.barrier("export")
    if hosts.first():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        write_json(folder / FILE, _read(folder) | {"finished": True})


def _facts(pipe: Pipeline, options: dict[str, Any]) -> dict[str, Any]:
    """What a model is, and of what options leave to it."""
    try:
        found: dict[str, Any] = {"fingerprint": fingerprint(pipe.params)}
    except FloatingPointError as error:
        raise ConfigError(f"the model's weights: {error}") from None
    config = pipe.config
    own = {"steps": config.sample_steps, "guidance": config.guidance}
    own |= {"height": config.image.height, "width": config.image.width}
    own = {name: value for name, value in own.items() if options.get(name) is None}
    return found | own | {"dtype": str(pipe.encoders.dtype)}


def _draw(
    pipe: Pipeline,
    pictures: list[Picture],
    folder: Path,
    options: dict[str, Any],
    batch_size: int | None,
    what: str,
) -> None:
    """Pictures in their order, images in batches of one size."""
    jobs = [(picture, image) for picture in pictures for image in picture.images]
    if not jobs:
        return
    rows, columns = pipe.config.grid(options.get("height"), options.get("width"))
    shape = rows * columns, pipe.config.transformer.in_channels
    size = pipe.batch_size(len(jobs), shape[0], batch_size)
    parts: list[Float[np.ndarray, "h w 3"]] = []  # of the picture that is not whole yet
    with bar(len(jobs), what, "images", "compiling …") as advance:
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            filled = [batch[i % len(batch)] for i in range(size)]  # one program for all batches
            numbers = np.array([image for _, image in filled])
            images = pipe(
                [picture.prompt for picture, _ in filled],
                latents=np.asarray(noise_of(options["seed"], numbers, *shape)),
                batch_size=size,
                tell=False,
                **options,
            )
            for (picture, _), image in zip(batch, np.asarray(images), strict=False):
                parts.append(image)
                if len(parts) == len(picture.images):
                    _save(_joined(parts), folder, picture.file)
                    parts.clear()
            advance(len(batch))


def _joined(images: Sequence[Float[np.ndarray, "h w 3"]]) -> Image.Image:
    """One image, or four in a square."""
    if len(images) == 1:
        return to_image(images[0])
    rows = [np.concatenate(images[i : i + 2], axis=1) for i in (0, 2)]
    return to_image(np.concatenate(rows))


def _save(picture: Image.Image, folder: Path, name: str) -> None:
    """Written elsewhere and moved, so that the scorer's folder never holds a part of a file."""
    target = folder / IMAGES / name
    target.parent.mkdir(parents=True, exist_ok=True)
    ready = folder / UNFINISHED / f"{jax.process_index()}{target.suffix}"
    with new_file(ready) as new:
        # JPEG as HPSv2's own code saves it: with PIL's defaults.
        picture.save(new, format="JPEG" if target.suffix == ".jpg" else "PNG")
    ready.replace(target)


def _begin(
    folder: Path, made: dict[str, Any], lines: list[dict[str, Any]], texts: dict[str, str]
) -> None:
    """Say what an export is made with, or see that the one in the folder is made with the same."""
    made = json.loads(json.dumps(made))
    wanted = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    check_writable(folder / FILE)
    found = _read(folder) if (folder / FILE).exists() else None
    if found is not None and found["model"] is not None:
        check_same(found["made"], made, folder / FILE, OTHER)
        listed = folder / LIST
        same = not listed.exists() or listed.read_text(encoding="utf-8") == wanted
        check(same, f"{listed}: made of other prompts; expected the same, or another folder")
    else:
        others = list(folder.iterdir()) if folder.is_dir() else []
        check(
            found is not None or not others,
            f"{folder}: not empty, and no export; expected a free folder",
        )
        shutil.rmtree(folder / IMAGES, ignore_errors=True)  # where no model has drawn yet
        write_json(folder / FILE, {"made": made, "model": None, "finished": False})
    with full_disk(folder):
        with new_file(folder / LIST) as new:
            new.write_text(wanted, encoding="utf-8")
        for name, text in texts.items():
            target = folder / IMAGES / name
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                with new_file(folder / UNFINISHED / target.name) as new:
                    new.write_text(text, encoding="utf-8")
                (folder / UNFINISHED / target.name).replace(target)


def _same_model(folder: Path, model: dict[str, Any]) -> None:
    value = _read(folder)
    if value["model"] is not None:
        check_same({"model": value["model"]}, {"model": model}, folder / FILE, OTHER)
    write_json(folder / FILE, value | {"model": model})


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    try:
        value = json.loads(file.read_text())
        check({"made", "model"} <= value.keys(), "")
    except (ValueError, AttributeError):
        raise ConfigError(f"{file}: damaged, expected the JSON of an export") from None
    return value
