"""Encoded images, whatever they are, as pixels of a given size."""

import contextlib
import functools
import io
import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps

Size = tuple[int, int]  # height and width in pixels

# `decode` looks at the size itself, and broken EXIF data say nothing.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")


class Undecodable(Exception):
    """Bytes that are no image, or one that cannot be used; the message says what was found."""


@dataclass(frozen=True)
class Crop:
    """What was kept of an image: the rectangle in its own pixels, as displayed."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True)
class Decoded:
    """An image at the size that was asked for, and where it comes from."""

    pixels: UInt8[np.ndarray, "h w 3"]
    original: Size
    crop: Crop


def decode(
    content: bytes,
    size: Size,
    background: tuple[int, ...] = (255, 255, 255),
    most: int = 100_000_000,
) -> Decoded:
    """The image in sRGB, upright as its EXIF data say, over `background` where it is transparent,
    the first frame if it moves; scaled so that the short side fits, the middle of the long one.

    Undecodable for what is no image, is cut off, or has more than `most` pixels: these are told
    from the header.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            count = image.width * image.height
            if count > most:
                raise Undecodable(
                    f"{image.width} × {image.height} pixels, expected at most {most:,}"
                )
            # JPEG's own reduction by 2, 4 or 8, as far as the image stays larger than wanted.
            original = image.size
            image.draft(None, (2 * max(size), 2 * max(size)))
            image.load()
            before = image.size
            _turn_upright(image)
            original = original if image.size == before else original[::-1]
            rgb = _rgb(image, background)
    except Undecodable:
        raise
    except Exception as error:  # each format of PIL's has its own
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise Undecodable(f"no image that can be decoded ({told})") from None
    return _scaled(rgb, size, (original[1], original[0]))


def _scaled(image: Image.Image, size: Size, original: Size) -> Decoded:
    height, width = size
    scale = max(height / image.height, width / image.width)
    kept = min(height / scale, image.height), min(width / scale, image.width)  # but for rounding
    top, left = (image.height - kept[0]) / 2, (image.width - kept[1]) / 2
    box = (left, top, left + kept[1], top + kept[0])
    small = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    drafted = original[0] / image.height, original[1] / image.width
    crop = Crop(top * drafted[0], left * drafted[1], kept[0] * drafted[0], kept[1] * drafted[1])
    return Decoded(np.asarray(small), original, crop)


def _turn_upright(image: Image.Image) -> None:
    # Broken EXIF data say nothing.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)  # else it copies those that are upright too


def _rgb(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """The image in sRGB, without transparency."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    see_through = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        image = image.convert("RGBA" if see_through else "RGB")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    image = _srgb(image, profile) if profile else image
    if image.mode == "RGBA":
        under = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(under, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of 16 bits (or 32, as PIL holds some of these) the high ones; of floats [0, 1]."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        return Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))
    return Image.fromarray((np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8))


def _srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """From the colours of its profile; as it is where that is broken, or of another kind."""
    if image.mode == "L":
        image = image.convert("RGB") if b"RGB " in profile[16:20] else image
    try:
        done = _transform(profile, image.mode).apply(image)
    except (ImageCms.PyCMSError, ValueError, OSError):
        return image
    if image.mode == "RGBA":
        done.putalpha(image.getchannel("A"))
    return done


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    target = "RGBA" if mode == "RGBA" else "RGB"
    return ImageCms.ImageCmsTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
        mode,
        target,
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.NOCACHE,  # threads share it
    )
