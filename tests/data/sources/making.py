"""Small images and tars of them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(number: int = 0, size=(24, 16), kind="JPEG", orientation=None, mode="RGB", **options):
    """An image file of width and height; another number, another image."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
    out = io.BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def tar(path: Path, members, form=tarfile.USTAR_FORMAT, **options) -> Path:
    """A tar of (name, content)s, as Python writes it."""
    with tarfile.open(path, "w", format=form, **options) as out:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def members(names, **more):
    """Those of samples with an image and a caption."""
    for i, name in enumerate(names):
        yield f"{name}.jpg", encoded(i)
        yield f"{name}.txt", f"caption of {name}".encode()


def place(path: Path, name: str) -> int:
    """Where the header of a member begins."""
    with tarfile.open(path) as opened:
        return opened.getmember(name).offset
