"""The lexicon of the embedded task: named pictograms, and colours.

The pictograms are icons of Material Design Icons (Apache-2.0, NOTICE) at 14 pixels, as
examples/pictograms/render.py drew and chose them.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from d2m_jax import numpy_files
from d2m_jax.config import check

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
SIZE = 14  # pixels of a pictogram, either way
MARGIN = 1  # pixels that its cell leaves free on every side
CELL = SIZE + 2 * MARGIN
FILE = Path(__file__).with_suffix(".npz")


@dataclass(frozen=True, eq=False, repr=False)
class Lexicon:
    """Named pictograms, each as a mask in the middle of a square."""

    names: tuple[str, ...]
    masks: Bool[np.ndarray, "p s s"]

    @functools.cached_property
    def index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @functools.cached_property
    def tiles(self) -> UInt8[np.ndarray, "t c c 3"]:
        """The painted cell of every pair, pictogram-major; the last tile is empty."""
        masks = np.pad(self.masks, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
        colours = np.array(list(COLOURS.values()), np.uint8)
        tiles = masks[:, None, :, :, None] * colours[None, :, None, None, :]
        return np.concatenate([tiles.reshape(-1, *tiles.shape[2:]), np.zeros_like(tiles[0, :1])])


@functools.lru_cache
def lexicon(count: int) -> Lexicon:
    """The first `count` pictograms. ConfigError where there are fewer."""
    names, masks = _all()
    check(
        count <= len(names),
        f"IconsConfig.pictograms = {count}: expected at most {len(names)}, for there are no more",
    )
    return Lexicon(names[:count], masks[:count])


@functools.lru_cache
def _all() -> tuple[tuple[str, ...], Bool[np.ndarray, "p s s"]]:
    file = numpy_files.load_all(FILE)
    masks = np.unpackbits(file["masks"], axis=-1, count=SIZE).astype(bool)
    return tuple(file["names"].tolist()), masks
