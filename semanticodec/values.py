"""Nested frozen dataclasses as JSON and back, every field checked."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal, TypeVar

from .errors import ConfigError

V = TypeVar("V")


def to_json(value: Any) -> str:
    """Write a frozen dataclass as JSON; :func:`from_json` reads it back."""
    return json.dumps(dataclasses.asdict(value), sort_keys=True, separators=(",", ":"))


def from_json(kind: type[V], text: str) -> V:
    """Read a frozen dataclass written by :func:`to_json`.

    Args:
        kind: the dataclass; its fields are numbers, text, tuples, unions and such classes again.
        text: JSON.

    Raises:
        ConfigError: the text is not JSON, or its fields are not those of this version.
    """
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the configuration is not JSON: {error}") from error
    result: V = _build(kind, data, "configuration")
    return result


def _fits(kind: Any, value: Any) -> bool:
    """Tell whether plain JSON data may stand for one option of a union."""
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict) and value.get("kind") == getattr(kind, "kind", None)
    return type(value) is kind


def _build(kind: Any, value: Any, where: str) -> Any:
    """Turn plain JSON data back into the (nested, frozen) value its annotation names."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        fitting = [option for option in options if _fits(option, value)]
        if len(fitting) != 1:
            seen = value.get("kind") if isinstance(value, dict) else value
            wanted = " or ".join(option.__name__ for option in options)
            raise ConfigError(f"{where} needs {wanted} (told apart by 'kind'), seen {seen!r}")
        return _build(fitting[0], value, where)
    if origin is Literal:
        if not any(type(value) is type(option) and value == option for option in options):
            raise ConfigError(f"{where} needs one of {options}, seen {value!r}")
    elif origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} needs a list, seen {value!r}")
        return tuple(_build(options[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            seen = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ConfigError(f"{where} ({kind.__name__}) needs the fields {sorted(names)}, seen {seen}")
        return kind(**{key: _build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(f"{where} needs {kind.__name__}, seen {value!r}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
