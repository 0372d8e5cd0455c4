"""Draw two sets of emoji as captioned images, in tars as img2dataset writes them.

    pip install resvg-py
    npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9
    python examples/emoji/render.py iconify-json-*.tgz --output data/emoji

Every drawing of the packages but those of skin tones comes in each of --sizes and in --variants:
the first alone on white, the others smaller or larger and elsewhere, on a colour. The caption is
"{style} {name}". Of the names that both styles have, about one in 16 is held out in one style,
which goes to `held_out/`: a model has seen its object and its style, but not the two together.
"""

import argparse
import io
import json
import re
import sys
import tarfile
import zlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import resvg_py

from d2m_jax.config import ConfigError, check
from d2m_jax.keys import named_generator
from d2m_jax.output import new_file
from d2m_jax.progress import bar

STYLES = {"fluent-emoji-flat": "fluent", "noto": "noto"}  # an icon set's prefix → in captions
TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")
BACKGROUNDS = ("#ffffff", "#dbeafe", "#dcfce7", "#fef9c3", "#fee2e2", "#ede9fe", "#e5e7eb")
SMALLEST = 0.8  # of the whole width
HELD_OUT = 16  # one name of so many
SHARD = 10_000  # images per tar, img2dataset's own number


@dataclass(frozen=True)
class Drawing:
    """One emoji in one style."""

    style: str
    name: str  # words
    body: str  # what is inside <svg>
    width: float
    height: float
    source: str  # package, and the icon's name in it
    license: str

    @property
    def caption(self) -> str:
        return f"{self.style} {self.name}"


def read(package: Path) -> list[Drawing]:
    """The drawings of an npm package of Iconify's, sorted by name. ConfigError for another file."""
    try:
        with tarfile.open(package) as tar:
            icons, info = (
                json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "info")
            )
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise ConfigError(f"{package}: no package of an Iconify set ({error})") from None
    prefix = icons["prefix"]
    check(prefix in STYLES, f"{package}: found the set {prefix}, expected one of {list(STYLES)}")
    return [
        Drawing(
            style=STYLES[prefix],
            name=name.replace("-", " "),
            body=icon["body"],
            width=icon.get("width", icons["width"]),
            height=icon.get("height", icons["height"]),
            source=f"@iconify-json/{prefix}: {name}",
            license=info["license"]["spdx"],
        )
        for name, icon in sorted(icons["icons"].items())
        if not icon.get("hidden") and not has_skin_tone(name, icons["icons"])
    ]


def has_skin_tone(name: str, names: Container[str]) -> bool:
    """Whether an icon is another one's in a skin tone: "skier-dark", "skier-dark-skin-tone"; not
    "police-car-light", of which there is none in medium dark."""
    if "skin-tone" in name or re.search(r"-tone\d$", name):
        return True
    return TONE.search(name) is not None and TONE.sub("-medium-dark", name) in names


def is_held_out(drawing: Drawing, both: set[str]) -> bool:
    """Whether this pair of style and name never trains; `both` are the names of both styles."""
    checksum = zlib.crc32(drawing.name.encode())
    style = list(STYLES.values())[checksum // HELD_OUT % 2]
    return drawing.name in both and checksum % HELD_OUT == 0 and drawing.style == style


def render(drawing: Drawing, side: int, variant: int) -> bytes:
    """A PNG of side × side. Variant 0 fills it, on white; the size, the place and the background of
    the others follow from drawing and number, the same in every size."""
    background, scale, x, y = BACKGROUNDS[0], 1.0, 0.5, 0.5
    if variant:
        draw = named_generator(0, f"{drawing.caption}/{variant}")
        background = BACKGROUNDS[draw.integers(len(BACKGROUNDS))]
        scale, x, y = draw.uniform(SMALLEST, 1), draw.random(), draw.random()
    whole = max(drawing.width, drawing.height) / scale  # the canvas in the drawing's units
    left, top = x * (drawing.width - whole), y * (drawing.height - whole)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{side}" height="{side}" viewBox="{left} {top} {whole} {whole}">'
        f"{drawing.body}</svg>"
    )
    return resvg_py.svg_to_bytes(svg_string=svg, background=background, skip_system_fonts=True)


def write(folder: Path, drawings: Sequence[Drawing], side: int, variants: int) -> Iterator[None]:
    """Tars of all drawings in all variants; yields after each image."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [(drawing, variant) for variant in range(variants) for drawing in drawings]
    for shard, start in enumerate(range(0, len(images), SHARD)):
        with new_file(folder / f"{shard:05}.tar") as file, tarfile.open(file, "w") as tar:
            for number, (drawing, variant) in enumerate(images[start : start + SHARD]):
                key = f"{shard:05}{number:04}"
                about = {
                    "key": key,
                    "caption": drawing.caption,
                    "url": drawing.source,
                    "license": drawing.license,
                    "status": "success",
                    "width": side,
                    "height": side,
                }
                members = {
                    "png": render(drawing, side, variant),
                    "txt": drawing.caption.encode(),
                    "json": json.dumps(about).encode(),
                }
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                yield


def main(arguments: Sequence[str]) -> None:
    """Write `SIZE/` and `held_out/SIZE/` with tars, and say what they hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path, nargs="+", help="what npm pack wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="pixels")
    parser.add_argument("--variants", type=int, default=4)
    parsed = parser.parse_args(arguments)
    sets = [read(package) for package in parsed.packages]
    names = [{drawing.name for drawing in one} for one in sets]
    both = set.intersection(*names) if len(sets) > 1 else set()
    parts: dict[str, list[Drawing]] = {"": [], "held_out": []}
    for drawing in (drawing for one in sets for drawing in one):
        parts["held_out" if is_held_out(drawing, both) else ""].append(drawing)
    count = sum(map(len, sets))
    with bar(count * parsed.variants * len(parsed.sizes), "drawing", "images") as advance:
        for part, drawings in parts.items():
            for side in parsed.sizes:
                for _ in write(parsed.output / part / str(side), drawings, side, parsed.variants):
                    advance(1)
    print(
        f"{parsed.output}: {len(parts[''])} drawings and {len(parts['held_out'])} held out,"
        f" {len(both)} names in all styles; {parsed.variants} variants of each at"
        f" {', '.join(map(str, parsed.sizes))} pixels"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
