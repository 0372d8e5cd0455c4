"""Images as people have them, beside what PIL makes of them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from d2m_jax.data.decode import Crop, Undecodable, decode


def gradient(height=48, width=64):
    """Red grows to the right, green downwards."""
    rows, columns = np.mgrid[:height, :width]
    red, green = columns * 255 // width, rows * 255 // height
    return np.stack([red, green, np.full_like(red, 90)], -1).astype(np.uint8)


def saved(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content, size=(48, 64), **options):
    return decode(content, size, **options).pixels.astype(int)


def test_as_it_is():
    np.testing.assert_array_equal(pixels(saved(gradient())), gradient())
    assert np.abs(pixels(saved(gradient(), "JPEG", quality=95)) - gradient()).max() < 12
    assert np.abs(pixels(saved(gradient(), "WEBP", lossless=True)) - gradient()).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Stored turned, with a note to turn it back."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    image = Image.fromarray(gradient())
    stored = image.transpose(undo[orientation]) if orientation in undo else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(saved(stored, "JPEG", quality=95, exif=exif), (48, 64))
    assert found.original == (48, 64)
    assert np.abs(found.pixels.astype(int) - gradient()).max() < 14


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_says_nothing():
    broken = saved(gradient(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\1\2")
    assert np.abs(pixels(broken) - gradient()).max() < 12


def test_cmyk():
    image = Image.fromarray(gradient()).convert("CMYK")
    found = pixels(saved(image, "JPEG", quality=98))  # PIL writes Adobe's, which is inverted
    assert np.abs(found - gradient()).max() < 16
    np.testing.assert_array_equal(pixels(saved(image, "TIFF")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_shows_the_background(mode):
    image = Image.fromarray(gradient()).convert("RGBA")
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, 32:] = 255
    image.putalpha(Image.fromarray(alpha))
    content = saved(image) if mode == "RGBA" else saved(image.convert("LA"))
    if mode == "PA":
        content = saved(image.quantize(64), "PNG")
    found = pixels(content, background=(10, 20, 30))
    np.testing.assert_array_equal(found[:, :32], np.broadcast_to([10, 20, 30], (48, 32, 3)))
    expected = (
        gradient()
        if mode != "LA"
        else np.asarray(Image.fromarray(gradient()).convert("L"))[..., None]
    )
    assert np.abs(found - expected)[:, 32:].max() < 48 * (mode == "PA") + 1


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (64, 48), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 32, 48))
    found = pixels(saved(image, transparency=0), background=(1, 2, 3))
    assert found[0, 0].tolist() == [1, 2, 3] and found[0, 63].tolist() == [0, 0, 255]


def test_sixteen_bits():
    grey = (np.mgrid[:48, :64][1] * 1000).astype(np.uint16)
    found = pixels(saved(grey))
    np.testing.assert_array_equal(found, np.repeat((grey >> 8)[..., None], 3, -1))
    assert pixels(saved(Image.fromarray(grey), "TIFF")).max() == 63000 >> 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "green")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(pixels(content) - [255, 0, 0]).max() < 8


def test_colour_profiles():
    """Linear light under a profile that says so: sRGB's curve is put on."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    plain = pixels(saved(gradient(), icc_profile=bytes(profile)))
    assert np.abs(plain - gradient()).max() <= 1
    xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    np.testing.assert_array_equal(pixels(saved(gradient(), icc_profile=xyz)), gradient())
    np.testing.assert_array_equal(pixels(saved(gradient(), icc_profile=b"none")), gradient())
    image = Image.fromarray(gradient())
    swapped = _swapped_profile()
    expected = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(swapped)), ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )  # fmt: skip
    found = pixels(saved(gradient(), icc_profile=swapped))
    np.testing.assert_array_equal(found, np.asarray(expected))
    assert np.abs(found - gradient()).max() > 50
    see_through = image.convert("RGBA")
    found = pixels(saved(see_through, icc_profile=swapped))
    np.testing.assert_array_equal(found, np.asarray(expected))


def _swapped_profile():
    """sRGB's with the colorants of red and blue exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {}
    for i in range(int.from_bytes(profile[128:132], "big")):
        entry = 132 + 12 * i
        places[bytes(profile[entry : entry + 4])] = entry + 4
    red, blue = places[b"rXYZ"], places[b"bXYZ"]
    profile[red : red + 8], profile[blue : blue + 8] = (
        profile[blue : blue + 8], profile[red : red + 8],
    )  # fmt: skip
    return bytes(profile)


def test_a_bomb_is_not_decoded():
    with pytest.raises(Undecodable, match="64 × 48 pixels, expected at most 3,000"):
        decode(saved(gradient()), (48, 64), most=3000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_cut_off_is_no_image(kind):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    content = saved(noise, kind)
    with pytest.raises(Undecodable, match="no image that can be decoded"):
        decode(content[: len(content) * 2 // 3], (48, 64))
    for nothing in (b"", b"<html>not found</html>"):
        with pytest.raises(Undecodable, match="no image that can be decoded"):
            decode(nothing, (48, 64))


def test_the_short_side_fits_and_the_middle_is_kept():
    found = decode(saved(gradient(48, 96)), (32, 32))
    assert found.original == (48, 96) and found.crop == Crop(0, 24, 48, 48)
    middle = Image.fromarray(gradient(48, 96)[:, 24:72]).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.abs(found.pixels.astype(int) - np.asarray(middle)).max() <= 2
    tall = decode(saved(gradient(96, 48)), (32, 32))
    assert tall.crop == Crop(24, 0, 48, 48)


def test_every_size_fits_every_image():
    """But for rounding, a side is kept whole: no box goes over the edge."""
    content = {}
    for height in range(28, 64, 3):
        for width in range(28, 64, 3):
            content[height, width] = saved(Image.new("RGB", (width, height)))
    for size in ((28, 36), (36, 28), (32, 32), (30, 41)):
        for original, image in content.items():
            found = decode(image, size)
            assert found.pixels.shape == (*size, 3) and found.original == original
            assert min(found.crop.top, found.crop.left) >= 0


def test_a_large_jpeg_is_reduced_while_it_is_decoded():
    image = Image.fromarray(gradient()).resize((1280, 960), Image.Resampling.BICUBIC)
    found = decode(saved(image, "JPEG", quality=95), (48, 64))
    assert found.original == (960, 1280) and found.crop == Crop(0, 0, 960, 1280)
    plain = image.resize((64, 48), Image.Resampling.LANCZOS)
    assert np.abs(found.pixels.astype(int) - np.asarray(plain)).max() <= 6
