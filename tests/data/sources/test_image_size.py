import io
import warnings

import pytest
from PIL import Image, ImageOps

from d2m_jax.data.sources.image_size import image_size
from tests.data.sources.making import encoded


def size_of(data):
    for at_hand in (b"", data[:40], data):
        found = image_size(at_hand, lambda start, size: data[start : start + size])
    return found


def displayed(data):
    width, height = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    return height, width


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_as_pillow_displays_it(kind, orientation):
    data = encoded(kind=kind, size=(300, 17), orientation=orientation)
    assert size_of(data) == displayed(data)


@pytest.mark.parametrize(
    "kind, mode, options",
    [
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"icc_profile": b"x" * 200_000, "comment": b"c" * 60_000}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True, "quality": 0}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"icc_profile": b"x" * 999}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
    ],
)
def test_kinds(kind, mode, options):
    data = encoded(kind=kind, mode=mode, size=(70, 501), **options)
    assert size_of(data) == (501, 70) == displayed(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_cut_off_anywhere(kind):
    """Of what has been cut off the size is told or none is; nothing is raised."""
    data = encoded(kind=kind, orientation=6 if kind != "GIF" else None, size=(20, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in range(len(data)):
            assert size_of(data[:end]) in {(0, 0), (20, 10), (10, 20)}
    assert size_of(b"") == size_of(b"no image" * 99) == (0, 0)


def test_broken_exif_turns_nothing():
    good = encoded(orientation=6, size=(30, 20))
    at = good.index(b"Exif\0\0") + 6
    assert size_of(good) == (30, 20)
    for broken in (
        good[:at] + b"XX" + good[at + 2 :],
        good[: at + 4] + b"\xff" * 4 + good[at + 8 :],
    ):
        assert size_of(broken) == (20, 30)


def test_reads_a_header_and_not_the_image():
    data = encoded(size=(400, 300), icc_profile=b"x" * 200_000)
    read = []

    def peek(start, size):
        read.append(size)
        return data[start : start + size]

    assert image_size(data[:40], peek) == (300, 400)
    assert sum(read) < 1000


def test_a_table_of_huffman_codes_is_no_frame():
    """It may stand before the frame, and its marker is among those of frames."""
    data = encoded(size=(30, 20))
    at = data.index(b"\xff\xc4")
    table = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
    assert size_of(data[:2] + table + data[2:]) == (20, 30)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError])
def test_whatever_pillow_says_of_an_odd_file_it_has_no_size(monkeypatch, error):
    """Its decoder of AVIF raises RuntimeError for one of some bytes."""

    def refuse(file):
        raise error

    monkeypatch.setattr(Image, "open", refuse)
    assert size_of(b"\0\0\0\x20ftypavif" + b"\xff" * 300) == (0, 0)


def test_what_reading_says_is_not_taken_for_the_image_s():
    def peek(start, size):
        raise OSError

    with pytest.raises(OSError):
        image_size(b"GIF89a" + b"\0" * 40, peek)
