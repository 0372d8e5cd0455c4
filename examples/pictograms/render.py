"""Draw the pictograms of the embedded task: d2m_jax/data/pictograms.npz, which ships.

    pip install resvg-py
    npm pack @iconify-json/mdi@1.2.3
    python examples/pictograms/render.py iconify-json-mdi-1.2.3.tgz

Icons of Material Design Icons (Apache-2.0, NOTICE) become masks in the middle of SIZE × SIZE
pixels. An icon is left out if its name is no plain English one (a variant such as -outline or -off,
a brand, digits, letters), if it is too narrow, too thin or too full, and if an icon before it looks
the same. Names of one word come first and those of most last, each number of words in an order that
a hash shuffles: so the first n are a lexicon of n.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from jaxtyping import Bool
from PIL import Image
from scipy import ndimage

from d2m_jax.config import ConfigError, check
from d2m_jax.data.icons import WORDS
from d2m_jax.data.pictograms import FILE, SIZE
from d2m_jax.output import new_file
from d2m_jax.progress import bar

FINE = 8  # pixels per unit of a drawing that becomes a mask
LIT = 110  # of 255, from which a pixel is set
OVERLAP = 0.75  # intersection over union from which an icon looks like another
NARROW = 6  # pixels, the least width and height
THIN, FULL = 0.12, 0.8  # shares of set pixels
SPECK = 4  # pixels; a smaller piece is no part of a picture
LONGEST = 3  # words of a name
BRANDS = "Brand / Logo"  # a category of the package
# Words that make a variant of another icon.
VARIANTS = {"outline", "off", "box", "variant", "multiple", "plus", "minus", "remove", "check"}


def read(package: Path) -> dict[str, str]:
    """The drawings with plain names of the npm package: name → what is inside <svg>."""
    try:
        with tarfile.open(package) as tar:
            icons, sets = (
                json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "metadata")
            )
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise ConfigError(f"{package}: no package of an Iconify set ({error})") from None
    prefix = icons["prefix"]
    check(prefix == "mdi", f"{package}: found the set {prefix}, expected mdi")
    brands = sets["categories"][BRANDS]
    return {
        name: icon["body"]
        for name, icon in icons["icons"].items()
        if not icon.get("hidden") and name not in brands and is_plain(name)
    }


def is_plain(name: str) -> bool:
    """Whether a name is a few English words that say what is seen, and none of the task's own."""
    words = name.split("-")
    return (
        len(words) <= LONGEST
        and all(re.fullmatch(r"[a-z]{2,}", word) for word in words)
        and not VARIANTS.intersection(words)
        and name not in WORDS
    )


def order(name: str) -> tuple[int, bytes]:
    """What names are sorted by."""
    return name.count("-"), hashlib.sha256(name.encode()).digest()


def draw(body: str) -> Bool[np.ndarray, "s s"] | None:
    """The icon as a centred mask; none where it is narrow, thin or full."""
    side = 24 * FINE
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}"'
        f' viewBox="0 0 24 24">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).getchannel("A")
    image = image.crop(image.point(lambda a: a >= LIT and 255).getbbox())
    width, height = (max(1, round(side * SIZE / max(image.size))) for side in image.size)
    mask = np.asarray(image.resize((width, height), Image.Resampling.BOX)) >= LIT
    labelled: Any = ndimage.label(mask, np.ones((3, 3)))
    pieces, count = labelled
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    mask = trimmed(mask & (sizes[pieces] >= SPECK))
    height, width = mask.shape
    if min(width, height) < NARROW or not THIN * SIZE**2 <= mask.sum() <= FULL * SIZE**2:
        return None
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    return np.pad(mask, ((top, SIZE - height - top), (left, SIZE - width - left)))


def trimmed(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "a b"]:
    """The mask without empty rows and columns at its edges."""
    for _ in range(2):
        lit = np.flatnonzero(mask.any(axis=1))
        mask = mask[lit[0] : lit[-1] + 1].T if len(lit) else mask[:0].T
    return mask


def distinct(icons: Mapping[str, str]) -> Iterator[tuple[str, Bool[np.ndarray, "s s"]]]:
    """Names and masks in their order, without those that look like an earlier one."""
    kept = np.zeros((len(icons), SIZE * SIZE), np.float32)
    count = 0
    with bar(len(icons), "drawing", "icons") as advance:
        for name in sorted(icons, key=order):
            advance(1)
            mask = draw(icons[name])
            if mask is None:
                continue
            # intersection over union with every kept icon, at its best over shifts by one pixel
            padded = np.pad(mask.astype(np.float32), 1)
            shifts = np.lib.stride_tricks.sliding_window_view(padded, (SIZE, SIZE))
            others = kept[:count]
            both = np.max(others @ shifts.reshape(9, -1).T, axis=1, initial=0)
            if np.any(both > OVERLAP * (others.sum(axis=1) + mask.sum() - both)):
                continue
            kept[count] = mask.ravel()
            count += 1
            yield name, mask


def main(arguments: Sequence[str]) -> None:
    """Write the lexicon, and say what it holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="what npm pack wrote")
    parser.add_argument("--output", type=Path, default=FILE)
    parsed = parser.parse_args(arguments)
    icons = read(parsed.package)
    names, masks = zip(*distinct(icons), strict=True)
    with new_file(parsed.output) as new, new.open("wb") as file:
        np.savez_compressed(file, names=np.array(names), masks=np.packbits(masks, axis=-1))
    print(f"{parsed.output}: {len(names)} pictograms of {len(icons)} icons with plain names")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
