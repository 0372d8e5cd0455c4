"""What every config checks when it is made: that its fields have the types that they state."""

import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from d2m_jax.config.errors import check

# In words, and in the plural.
WORDS = {
    bool: ("True or False", "True or False"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
}


class Config:
    """A dataclass whose fields have their types, or making it raises ConfigError."""

    def __post_init__(self):
        for name, kind in hints(type(self)).items():
            value = fitted(kind, getattr(self, name), f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)  # for it is frozen


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The types of a config's fields by name."""
    return typing.get_type_hints(kind)


def fitted(kind: Any, value: Any, where: str) -> Any:
    """The value as a field of this type holds it: a list as a tuple, a whole number as a float.

    ConfigError names `where` and what else was expected.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    message = f"{where} = {shown(value)}: expected {described(kind)}"
    if origin in (typing.Union, types.UnionType):
        one = next((a for a in arguments if _fits(a, value)), None)
        check(one is not None, message)
        return fitted(one, value, where)
    if origin is tuple:
        check(isinstance(value, list | tuple), message)
        return tuple(fitted(arguments[0], a, f"{where}[{i}]") for i, a in enumerate(value))
    if origin is Mapping:
        check(isinstance(value, Mapping), message)
        for key in value:
            check(isinstance(key, str), f"{where}[{key!r}]: expected a string as name")
        return {key: fitted(arguments[1], a, f"{where}[{key!r}]") for key, a in value.items()}
    check(_fits(kind, value), message)
    return float(value) if kind is float else value


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple)
    if kind in (int, float):  # to Python a truth value is a whole number
        wanted = int if kind is int else int | float
        return isinstance(value, wanted) and not isinstance(value, bool)
    return isinstance(value, kind)


def described(kind: Any, one: bool = True) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in WORDS:
        return WORDS[kind][not one]
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if a is type(None) else described(a) for a in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a tuple or list of {described(arguments[0], one=False)}"
    if origin is Mapping:
        return f"a dict of names and {described(arguments[1], one=False)}"
    return f"a {kind.__name__}" if one else f"{kind.__name__}s"


def shown(value: Any) -> str:
    """A value in a message: not pages of it."""
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:46]} …"
