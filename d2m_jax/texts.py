"""Texts and names as people have them: what of one is none."""

import re

HALVES = re.compile("[\ud800-\udfff]")  # of a pair of surrogates: no text by itself


def half_letter(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone, as a message tells it, or None. JSON
    can hold one, and it stands for what a terminal could not decode; no encoding can write it."""
    found = HALVES.search(text)
    return ascii(found[0]) if found else None


def printable(path: str) -> str:
    """A path for messages and keys: of a name that is no UTF-8 the odd bytes by their numbers."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
