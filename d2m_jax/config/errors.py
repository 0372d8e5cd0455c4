"""What is told to the person who must mend it."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A value that cannot work, or values that contradict each other: one line, exit code 2."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raise ConfigError for a field of a dataclass that is a number below `least`, or none."""
    for name in names:
        value = getattr(config, name)
        field = f"{type(config).__name__}.{name}"
        check(least <= value < math.inf, f"{field} = {value}: expected at least {least}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`, did you mean …?` where a known name is near, else the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""
