"""Texts and names as people have them: their encodings, their lines, and what of one is none."""

import codecs
import re
from pathlib import Path

from d2m_jax.config import ConfigError, check

HALVES = re.compile("[\ud800-\udfff]")  # of a pair of surrogates: no text by itself
# Byte-order marks; UTF-32's begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}


def half_letter(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone, as a message tells it, or None. JSON
    can hold one, and it stands for what a terminal could not decode; no encoding can write it."""
    found = HALVES.search(text)
    return ascii(found[0]) if found else None


def printable(path: str) -> str:
    """A path for messages and keys: of a name that is no UTF-8 the odd bytes by their numbers."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def lines_of(text: str) -> list[str]:
    """A text's lines, without what ends them."""
    # Not str.splitlines, to which U+2028 and others within a prompt are ends of lines too.
    return re.split("\r\n|\r|\n", text)


def text_of(file: Path, expected: str) -> str:
    """What a text file holds; `expected` says what, where it is not there.

    UTF-8, with a byte-order mark or without; UTF-16 and UTF-32 with one. ConfigError names the line
    that is something else: to guess at its encoding would change words without a word.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file, {expected}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    encoding, data = MARKS.get(mark, "UTF-8"), data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(lines_of(data[: error.start].decode(encoding)))
        byte = f"byte 0x{data[error.start]:02x}"
        raise ConfigError(
            f"{file}, line {line}: {byte} is not {encoding}; save the file as UTF-8"
        ) from None
    before, nul, _ = text.partition("\0")
    what = "a NUL byte, as in UTF-16 without its byte-order mark"
    check(not nul, f"{file}, line {len(lines_of(before))}: {what}; save the file as UTF-8")
    return text
