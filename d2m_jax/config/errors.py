"""Errors that a user can mend, the checks that raise them, and the words of their messages."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

SHOWN = 8  # names that `listed` tells
MOST_SEED = 2**32 - 1  # JAX would cut a larger one to its last 32 bits


class ConfigError(ValueError):
    """A value that cannot work, or values that contradict each other: one line, exit code 2."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_whole(config: Any, least: int, *fields: str) -> None:
    """Raise ConfigError for a field of a config that is less than `least`."""
    for field in fields:
        value = getattr(config, field)
        check(
            value >= least,
            f"{type(config).__name__}.{field} = {value!r}: expected a whole number, at least"
            f" {least}",
        )


def check_seed(name: str, seed: int) -> None:
    """Raise ConfigError for a seed that JAX does not take, or takes for another."""
    check(
        0 <= seed <= MOST_SEED,
        f"{name} = {seed}: expected a whole number from 0 to {MOST_SEED}",
    )


def check_number(
    config: Any, *fields: str, least: float = -math.inf, below: float = math.inf
) -> None:
    """Raise ConfigError for a field that is not finite, less than `least`, or not `below`."""
    limits = [f"at least {least:g}"] if least > -math.inf else []
    limits += [f"less than {below:g}"] if below < math.inf else []
    for field in fields:
        value = getattr(config, field)
        check(
            math.isfinite(value) and least <= value < below,
            f"{type(config).__name__}.{field} = {value!r}: expected a finite number"
            + "".join(f", {limit}" for limit in limits),
        )


def at_path(message: str, path: str) -> str:
    """The message of a config's own check, `StageConfig.steps = 0: …`, where the path of the config
    is known: `stages.moe.steps = 0: …`."""
    return re.sub(r"^\w+Config(?=[.:])", lambda _: path, message)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`, did you mean …?` where a known name is near, else the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def first_line(error: BaseException, most: int | None = 160) -> str:
    """The first line of an error's message, shortened to `most` letters; without one its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def listed(names: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "; ".join(names[:SHOWN]) + more
