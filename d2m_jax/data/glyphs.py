"""The lexicon of the embedded task: named glyphs of a font that matplotlib ships, and colours."""

import functools
import unicodedata
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFont
from scipy import ndimage

from d2m_jax.config import ConfigError

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
MARGIN = 2  # pixels of a cell that its glyph leaves free

BLOCKS = (  # of Unicode, pictures first
    (0x2600, 0x27C0),  # miscellaneous symbols, dingbats
    (0x25A0, 0x2600),  # geometric shapes
    (0x2190, 0x2200),  # arrows
    (0x2900, 0x2980),
    (0x2B00, 0x2C00),
    (0x1D300, 0x1D358),  # tetragrams
    (0x2200, 0x2400),  # mathematics, technical
    (0x0391, 0x0400),  # Greek, Coptic
    (0x0410, 0x0460),  # Cyrillic
    (0x0531, 0x0590),  # Armenian
    (0x10A0, 0x1100),  # Georgian
    (0x0030, 0x003A),  # digits
    (0x0041, 0x007B),  # Latin
    (0x05D0, 0x05EB),  # Hebrew
    (0x0E00, 0x0F00),  # Lao
    (0x1680, 0x16A0),  # Ogham
    (0x20A0, 0x2150),  # currency, letter-like symbols
    (0x00A1, 0x0180),
    (0x0460, 0x0530),
    (0x0180, 0x02B0),
    (0x2D30, 0x2D80),  # Tifinagh
    (0x07C0, 0x0800),  # NKo
    (0x1400, 0x1680),  # Canadian syllabics
)
SILENT = {"letter", "capital", "sign", "symbol", "suit", "chess", "with", "and", "of", "the"}
OVERLAP = 0.65  # intersection over union from which a glyph is a near-duplicate


@dataclass(frozen=True, eq=False, repr=False)
class Lexicon:
    """Named glyphs; each mask is centred in a square of `size` pixels that it spans one way."""

    names: tuple[str, ...]
    characters: str
    masks: Bool[np.ndarray, "g s s"]

    @property
    def size(self) -> int:
        return self.masks.shape[1]

    @property
    def cell(self) -> int:
        """Height and width in pixels of the cell that a glyph stands in."""
        return self.size + MARGIN

    @functools.cached_property
    def index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @functools.cached_property
    def tiles(self) -> UInt8[np.ndarray, "t c c 3"]:
        """The painted cell of every pair, glyph-major; the last tile is empty."""
        masks = np.pad(self.masks, ((0, 0), *[(MARGIN // 2, MARGIN - MARGIN // 2)] * 2))
        colours = np.array(list(COLOURS.values()), np.uint8)
        tiles = masks[:, None, :, :, None] * colours[None, :, None, None, :]
        return np.concatenate([tiles.reshape(-1, *tiles.shape[2:]), np.zeros_like(tiles[0, :1])])


@functools.lru_cache
def lexicon(glyphs: int, size: int) -> Lexicon:
    """The first `glyphs` of DejaVu Sans that are connected and unlike each other at `size` pixels.

    lexicon(256, s) begins lexicon(512, s). ConfigError where the font has too few.
    """
    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(path, 8 * size, layout_engine=ImageFont.Layout.BASIC)
    drawn = FT2Font(path).get_charmap()
    names: dict[str, str] = {}
    kept = np.zeros((glyphs, size * size), np.float32)
    for code in (code for block in BLOCKS for code in range(*block) if code in drawn):
        name = _name(chr(code))
        if name is None or name in names:
            continue
        mask = _draw(font, chr(code), size)
        if mask is None:
            continue
        # intersection over union with every kept glyph, at its best over shifts by one pixel
        padded = np.pad(mask.astype(np.float32), 1)
        shifts = [padded[y : y + size, x : x + size].ravel() for y in range(3) for x in range(3)]
        others = kept[: len(names)]
        both = np.max(others @ np.stack(shifts).T, axis=1, initial=0)
        if np.any(both > OVERLAP * (others.sum(axis=1) + mask.sum() - both)):
            continue
        kept[len(names)] = mask.ravel()
        names[name] = chr(code)
        if len(names) == glyphs:
            masks = kept.reshape(glyphs, size, size) > 0
            return Lexicon(tuple(names), "".join(names.values()), masks)
    raise ConfigError(
        f"IconsConfig.glyphs = {glyphs}: expected at most {len(names)},"
        f" as many as can be told apart at {size} pixels"
    )


def _name(character: str) -> str | None:
    """One lower-case word from the character's Unicode name; none where that would be long."""
    words = [w for w in unicodedata.name(character, "").lower().split() if w not in SILENT]
    return "-".join(words) if 1 <= len(words) <= 3 and "combining" not in words else None


def _draw(
    font: ImageFont.FreeTypeFont, character: str, size: int
) -> Bool[np.ndarray, "s s"] | None:
    """The glyph as a centred mask; none where it is narrow, sparse, dense or in pieces."""
    image = font.getmask(character, mode="L")
    pixels = bytes(image)  # pyright: ignore[reportArgumentType] (Pillow's own cast is private)
    image = Image.frombytes("L", image.size, pixels)
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    mask = np.asarray(image.resize((width, height), Image.Resampling.BOX)) >= 110
    labelled: Any = ndimage.label(mask, np.ones((3, 3)))  # scipy says no types
    whole = labelled[1] == 1
    filled = mask.any(axis=0).all() and mask.any(axis=1).all()
    if min(width, height) < size // 2 or not whole or not filled:
        return None
    if not 0.15 * size**2 <= mask.sum() <= 0.8 * size**2:
        return None
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(mask, ((top, size - height - top), (left, size - width - left)))
