"""What messages are made of: fields with a number and a rule that their values must obey."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import WireError

PLAIN = "[^\x00-\x1f\x7f\ud800-\udfff]*"
"""Text without control characters, and without halves of surrogate pairs, which UTF-8 does not know."""


@dataclass(frozen=True)
class Rule:
    """What a value may be, in words and as a check that takes any object."""

    wanted: str
    check: Callable[[Any], bool]


def number(low: int, high: int) -> Rule:
    """Allow integers from ``low`` to ``high``."""
    return Rule(f"integer {low}..{high}", lambda value: type(value) is int and low <= value <= high)


def flag() -> Rule:
    """Allow true and false."""
    return Rule("boolean", lambda value: type(value) is bool)


def text(size: int, pattern: str = PLAIN) -> Rule:
    """Allow text of at most ``size`` bytes of UTF-8 that matches ``pattern`` as a whole."""
    matches = re.compile(pattern).fullmatch

    def check(value: Any) -> bool:
        return type(value) is str and matches(value) is not None and len(value.encode()) <= size

    return Rule(f"text of at most {size} bytes" + ("" if pattern == PLAIN else f", {pattern}"), check)


def octets(low: int, high: int) -> Rule:
    """Allow ``low`` to ``high`` bytes."""
    count = f"{low}" if low == high else f"{low}..{high}"
    return Rule(f"{count} bytes", lambda value: type(value) is bytes and low <= len(value) <= high)


def choice(options: tuple[str, ...]) -> Rule:
    """Allow a few words."""
    return Rule("one of " + ", ".join(options), lambda value: type(value) is str and value in options)


def many(of: Rule, low: int, high: int, *, distinct: bool = True) -> Rule:
    """Allow ``low`` to ``high`` (different) values of one kind."""

    def check(value: Any) -> bool:
        if type(value) is not tuple or not low <= len(value) <= high or not all(map(of.check, value)):
            return False
        return not distinct or len(set(value)) == len(value)

    count = f"{low}" if low == high else f"{low}..{high}"
    return Rule(f"array of {count}{' different' if distinct else ''}: {of.wanted}", check)


@dataclass(frozen=True)
class Message:
    """What every message is: a type number, and fields that are checked when it is made.

    Raises:
        WireError: a field out of range.
    """

    type: ClassVar[int]
    sender: ClassVar[str]
    """Who may send it: "client", "server" or "both"."""

    def __post_init__(self) -> None:
        for field in layout(type(self)):
            value = getattr(self, field.name)
            if not field.rule.check(value) and not (value is None and field.default is None):
                name = f"{type(self).__name__.lower()}.{field.name}"
                raise WireError(f"{name} is {short(value)}; wanted {field.rule.wanted}")


@dataclass(frozen=True)
class Field:
    """One field of a message: its key in the map, and ``dataclasses.MISSING`` for a default if it must be there."""

    name: str
    key: int
    rule: Rule
    default: Any


_layouts: dict[type[Message], tuple[Field, ...]] = {}


def layout(kind: type[Message]) -> tuple[Field, ...]:
    """Return the fields of a message."""
    if kind not in _layouts:
        hints = typing.get_type_hints(kind, include_extras=True)
        pairs = [(field, *hints[field.name].__metadata__) for field in dataclasses.fields(kind)]
        _layouts[kind] = tuple(Field(field.name, key, rule, field.default) for field, key, rule in pairs)
    return _layouts[kind]


def short(value: object) -> str:
    """Show a stranger's value in an error message without letting it fill the log."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
