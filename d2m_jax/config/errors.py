"""What is told to the person who must mend it."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A value that cannot work, or values that contradict each other: one line, exit code 2."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`, did you mean …?` where a known name is near, else the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""
