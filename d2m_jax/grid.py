"""Images for people: in a notebook, in one picture, on disk."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from d2m_jax.config import check
from d2m_jax.output import new_file

GAP = 2  # pixels of white between the images of a grid
VISIBLE = 72  # pixels; smaller images are enlarged in a grid


class Images(np.ndarray):
    """An array of images in [0, 1], [n, h, w, 3], or of one, [h, w, 3], that a notebook displays.

    What is computed from it is a plain array.
    """

    @property
    def pil(self) -> list[Image.Image] | Image.Image:
        """As PIL's, to save or to edit: a list, of one image the image."""
        plain = np.asarray(self)
        return [to_image(image) for image in plain] if self.ndim == 4 else to_image(plain)

    def _repr_png_(self) -> bytes | None:
        # A slice may be something else: it is printed as numbers.
        if self.ndim not in (3, 4) or self.shape[-1] != 3 or self.dtype != np.float32:
            return None
        if not self.size:
            return None
        picture = grid(np.asarray(self)[None] if self.ndim == 3 else np.asarray(self))
        file = io.BytesIO()
        picture.save(file, format="PNG")
        return file.getvalue()

    def __array_wrap__(
        self, array: np.ndarray, context: tuple | None = None, return_scalar: bool = False
    ):
        return array[()] if return_scalar else array


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


def side_by_side(
    models: Sequence[Float[np.ndarray, "n h w 3"]],
) -> tuple[Float[np.ndarray, "m h w 3"], int]:
    """What several models made of the same prompts, prompt by prompt, and in how many columns
    `grid` shows them: all of a prompt in one row."""
    count, height, width, _ = models[0].shape
    prompts = max(1, round(math.sqrt(count / len(models))))  # in a row
    return np.stack(models, axis=1).reshape(-1, height, width, 3), prompts * len(models)


def to_image(image: Float[np.ndarray, "h w 3"]) -> Image.Image:
    """One image in [0, 1], rounded to 8 bits. ConfigError for NaN, of which it would make black."""
    check_finite(image)
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


def check_finite(images: Float[np.ndarray, "..."], why: str = "") -> None:
    """Raise ConfigError for what is no image: NaN or infinity."""
    check(bool(np.isfinite(images).all()), f"images: found NaN or infinity, expected 0 to 1{why}")


def write(images: Float[np.ndarray, "n h w 3"], directory: Path) -> None:
    """Write 0000.png, 0001.png, … and grid.png; each file appears whole."""
    pictures = {f"{i:04}": to_image(image) for i, image in enumerate(images)}
    pictures |= {"grid": grid(images)}
    for name, picture in pictures.items():
        with new_file(directory / f"{name}.png") as file:
            picture.save(file, format="PNG")
