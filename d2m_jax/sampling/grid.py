"""Images on disk: one PNG each, and all of them in one picture."""

import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

GAP = 2  # pixels of white between the images of a grid
VISIBLE = 72  # pixels; smaller images are enlarged in a grid


def grid(images: Float[np.ndarray, "n h w 3"], columns: int | None = None) -> Image.Image:
    """Images in [0, 1] row by row in one picture; without `columns` as square as they go.

    Small ones are enlarged, pixels kept square.
    """
    scale = max(1, VISIBLE // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    picture = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        picture.paste(to_image(image), (column * (width + GAP), row * (height + GAP)))
    return picture


def to_image(image: Float[np.ndarray, "h w 3"]) -> Image.Image:
    """One image in [0, 1], rounded to 8 bits."""
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


def write(images: Float[np.ndarray, "n h w 3"], directory: Path) -> None:
    """Write 0000.png, 0001.png, … and grid.png; each file appears whole."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {f"{i:04}": to_image(image) for i, image in enumerate(images)}
    for name, picture in (pictures | {"grid": grid(images)}).items():
        temporary = directory / f".{name}.png"
        picture.save(temporary, format="PNG")
        os.replace(temporary, directory / f"{name}.png")
