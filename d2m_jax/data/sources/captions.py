"""Captions out of what people write beside an image: lines of text, JSON, a column of a table."""

import json
from typing import Any

from d2m_jax.data.sources.any_source import BadSample
from d2m_jax.texts import half_letter, lines_of

FIELDS = ("caption", "captions", "text", "txt")  # where JSON and tables have it, the first found
LONGEST = 65_536  # bytes of all captions of an image: a page of text has about 3,000
LONGEST_JSON = 2**20  # bytes, for there is other metadata too


def from_text(key: str, data: bytes) -> tuple[str, ...]:
    """One caption per line that is not blank. BadSample for what is no text."""
    try:
        lines = lines_of(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample(f"{key}: its caption is no UTF-8: {error.reason}") from None
    return clean(key, lines)


def from_json(key: str, data: bytes) -> tuple[str, ...]:
    """Those of a JSON object's field. BadSample for what is no JSON object."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{key}: its .json is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadSample(f"{key}: its .json is a {type(found).__name__}, expected an object")
    return from_fields(key, found)


def from_fields(key: str, fields: dict[str, Any]) -> tuple[str, ...]:
    """Those of the first of FIELDS that has some: a text or a list of texts."""
    for name in FIELDS:
        value = fields.get(name)
        if value is not None and (
            found := clean(key, [value] if isinstance(value, str) else value)
        ):
            return found
    return ()


def clean(key: str, captions: Any) -> tuple[str, ...]:
    """Texts without blanks around them, and without blank ones. BadSample for what is no list of
    texts, holds half a letter, or is too long."""
    if not isinstance(captions, list | tuple) or not all(isinstance(c, str) for c in captions):
        raise BadSample(f"{key}: its caption is {str(captions)[:40]!r}, expected text")
    found = tuple(text for caption in captions if (text := caption.strip()))
    if half := half_letter("\n".join(found)):
        raise BadSample(f"{key}: its caption holds {half}, half a letter; expected text")
    check_length(key, sum(len(text.encode()) for text in found))
    return found


def check_length(key: str, size: int, most: int = LONGEST) -> None:
    """BadSample for captions of more than `most` bytes."""
    if size > most:
        raise BadSample(f"{key}: its caption has {size} bytes, expected at most {most}")
