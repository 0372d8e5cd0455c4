"""Height and width of an encoded image as it is displayed, from its first bytes."""

import io
import struct
import warnings
from collections.abc import Callable

Peek = Callable[[int, int], bytes]  # (start, size) in the file of an image, fewer where it ends
NONE = (0, 0)
ORIENTATION = 0x0112  # EXIF's tag; from 5 on height and width change places
LONGEST = 2**26  # bytes of an image of a rarer kind, which is read whole


def image_size(start: bytes, peek: Peek) -> tuple[int, int]:
    """Height and width in pixels, EXIF orientation applied; 0 0 where they cannot be told.

    `start` are the first bytes, as many as are at hand; `peek` reads what else is needed. JPEG, PNG
    and WebP are read here, header by header; PIL reads the others.
    """
    if len(start) < 32:
        start = peek(0, 32)
    try:
        if start[:2] == b"\xff\xd8":
            return _jpeg(start, peek)
        if start[:8] == b"\x89PNG\r\n\x1a\n":
            return _png(peek)
        if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            return _webp(peek)
    except (IndexError, struct.error):  # it ends before its size is told
        return NONE
    return _other(peek)


def _jpeg(start: bytes, peek: Peek) -> tuple[int, int]:
    at, turned, here = 2, False, len(start) - 10
    while True:
        head = start[at : at + 10] if at <= here else peek(at, 10)
        marker = head[1]
        if head[0] != 0xFF:
            return NONE
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame
            height, width = head[5] << 8 | head[6], head[7] << 8 | head[8]
            return _displayed(height, width, turned)
        if marker == 0xFF:  # a filling byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no content
            at += 2
            continue
        if marker in (0xD9, 0xDA):
            return NONE
        length = head[2] << 8 | head[3]
        if marker == 0xE1 and head[4:10] == b"Exif\0\0":
            turned = _turned(peek(at + 10, length - 8))
        at += 2 + length


def _png(peek: Peek) -> tuple[int, int]:
    width, height = struct.unpack(">II", peek(16, 8))
    at, turned = 8, False
    while True:
        head = peek(at, 8)
        if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
            return _displayed(height, width, turned)
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            turned = _turned(peek(at + 8, length))
        at += 12 + length


def _webp(peek: Peek) -> tuple[int, int]:
    start = peek(0, 30)
    kind = start[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", start[26:30])
        return _displayed(height & 0x3FFF, width & 0x3FFF, False)
    if kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return _displayed((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, False)
    if kind != b"VP8X" or len(start) < 30:
        return NONE
    width, height = (int.from_bytes(start[a : a + 3], "little") + 1 for a in (24, 27))
    turned, at = False, 12
    while start[20] & 0x08 and len(head := peek(at, 8)) == 8:  # it says that it has EXIF
        length = int.from_bytes(head[4:], "little")
        if head[:4] == b"EXIF":
            turned = _turned(peek(at + 8, length).removeprefix(b"Exif\0\0"))
            break
        at += 8 + length + length % 2
    return _displayed(height, width, turned)


def _other(peek: Peek) -> tuple[int, int]:
    from PIL import Image

    content = peek(0, LONGEST)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, of odd metadata
            image = Image.open(io.BytesIO(content))
            width, height = image.size
            if image.format == "TIFF":  # of which some versions tell the size as displayed
                width, height = (vars(image)["tag_v2"][tag] for tag in (256, 257))
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # each format of PIL's has its own
        return NONE
    return _displayed(height, width, turned)


def _turned(exif: bytes) -> bool:
    """Whether EXIF data say that height and width change places; broken ones do not."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return False
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == ORIENTATION and kind in (3, 4):
                form = "H" if kind == 3 else "I"
                return struct.unpack_from(f"{order}{form}", exif, entry + 8)[0] in (5, 6, 7, 8)
    except struct.error:
        pass
    return False


def _displayed(height: int, width: int, turned: bool) -> tuple[int, int]:
    if height == 0 or width == 0 or max(height, width) >= 2**31:
        return NONE
    return (width, height) if turned else (height, width)
