"""Configs to JSON and back."""

# What a kind is shows only at run time:
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from d2m_jax.config.errors import ConfigError, at_path, check, suggestion
from d2m_jax.config.fields import hints

# Fields that files of earlier versions have, and that no longer mean anything.
RETIRED = {
    "IconsConfig": ("glyphs",),
    "LossConfig": ("timesteps",),
    "MoEConfig": ("implementation",),
    "StageConfig": ("kind",),
}


def to_json(config: Any) -> Any:
    """The JSON form of a config: dataclasses become objects, tuples lists."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_json(value) for value in config]
    return config


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """The inverse of to_json. ConfigError names the field, what was found and what was expected."""
    where = where or getattr(kind, "__name__", "config")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        if not dataclasses.is_dataclass(kinds[0]):
            return value
        if len(kinds) > 1:  # dataclasses, told apart by their field `kind`; without one, the first
            by_name = {a.kind: a for a in kinds}
            check(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
            name = value.get("kind", kinds[0].kind)
            expected = ", ".join(map(repr, by_name))
            check(name in by_name, f"{where}.kind = {name!r}: expected one of {expected}")
            kinds = [by_name[name]]
        return from_json(kinds[0], value, where)
    if origin is tuple:
        check(isinstance(value, list), f"{where}: expected a list, found {value!r}")
        return tuple(from_json(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        check(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        return {key: from_json(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), f"{where}: expected an object, found {value!r}")
        known = hints(kind)
        retired = RETIRED.get(kind.__name__, ())
        value = {key: item for key, item in value.items() if key not in retired}
        for key in value:
            check(key in known, f"{where}.{key}: unknown field{suggestion(key, known)}")
        for field in dataclasses.fields(kind):
            needed = field.default is field.default_factory is dataclasses.MISSING
            check(field.name in value or not needed, f"{where}.{field.name}: missing")
        fields = {key: from_json(known[key], item, f"{where}.{key}") for key, item in value.items()}
        try:
            return kind(**fields)
        except ConfigError as error:
            raise ConfigError(at_path(str(error), where)) from None
    return value  # the config that it goes into checks it


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, value here and value there of every field in which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            absent = "(absent)"
            inner = f"{name}.{key}" if name else key
            yield from differences(one.get(key, absent), other.get(key, absent), inner)
    elif one != other:
        yield name, one, other


def check_same(found: Any, expected: Any, where: Any, hint: str) -> None:
    """Raise ConfigError for the first difference of what lies at `where` from what a run has."""
    for name, there, here in differences(found, expected):
        raise ConfigError(f"{where}: {name} = {there}, this run's is {here}; {hint}")
