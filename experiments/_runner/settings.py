"""What all settings share: limits of single values, choices of parts, and their form in JSON.

Settings are nested frozen dataclasses. Through tyro each field is a command-line flag, and the
comment above it is its help text; where parts can be exchanged, a union of classes becomes a choice
such as `field:mlp`, with the flags of that part alone.
"""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import subcommand

from jcnf._checks import InputError

MAX_INT = 2**31 - 1
MIN_FLOAT = 1e-37  # smaller numbers underflow in float32


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def choice(name: str) -> Any:
    """Return the tyro configuration of a member of a union, chosen by the word `name`."""
    return subcommand(name, prefix_name=False)


@dataclasses.dataclass(frozen=True)
class Range:
    """The limits of a number, or of each number in a tuple; both ends are allowed."""

    low: float = -math.inf
    high: float = math.inf
    min_length: int = 0
    max_length: int = 1000

    def check(self, name: str, value: Any) -> None:
        """Raise `ValueError` if a value is out of range or NaN, or a tuple has a wrong length."""
        limits = f"from {self.low:.10g} to {self.high:.10g}"
        if not isinstance(value, tuple):
            if not self.low <= value <= self.high:
                raise ValueError(f"{flag(name)} must be {limits}; got {value}")
            return
        in_range = all(self.low <= item <= self.high for item in value)
        if not (self.min_length <= len(value) <= self.max_length and in_range):
            count = f"{self.min_length} to {self.max_length}"
            raise ValueError(f"{flag(name)} must be {count} numbers {limits}; got {value}")


MAX_WIDTH, MAX_LAYERS = 65_536, 1000  # of networks
MAX_COUNT = 10_000_000  # of rows, points or the like held in memory at once

Whole = Annotated[int, Range(0, MAX_INT)]
Steps = Annotated[int, Range(1, MAX_INT)]
Count = Annotated[int, Range(1, MAX_COUNT)]
Points = Annotated[int, Range(2, MAX_COUNT)]
Width = Annotated[int, Range(1, MAX_WIDTH)]
Widths = Annotated[tuple[int, ...], Range(1, MAX_WIDTH, max_length=MAX_LAYERS)]
Positive = Annotated[float, Range(MIN_FLOAT, 1e9)]
NonNegative = Annotated[float, Range(0, 1e9)]


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
class Settings:
    """Base of the settings. Each is a frozen dataclass, valid from the moment it exists.

    **Raises:** `ValueError` that names the flag, for a value out of its range or choices, and for
    values that do not go together.
    """

    def __post_init__(self):
        hints = typing.get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            hint = hints[field.name]
            for limit in _limits(hint):
                if value is not None:
                    limit.check(field.name, value)
            if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
                choices = ", ".join(typing.get_args(hint))
                raise ValueError(f"{flag(field.name)} must be one of {choices}; got {value!r}")
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for values that do not go together."""


def _limits(hint):
    """Return the ranges that a type hint states, of an optional value too."""
    found = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)]
    for part in typing.get_args(hint) if _is_union(hint) else ():
        found += _limits(part)
    return found


def _is_union(hint):
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def to_json(settings: Any) -> Any:
    """Return settings as nested dicts; "kind" names the class of each part."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        parts = {f.name: to_json(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
        return {"kind": type(settings).__name__, **parts}
    return settings


def from_json(hint: Any, content: Any) -> Any:
    """Return the settings that `to_json` described, with a type of which they are.

    **Raises:** `InputError` if they are not of that type.
    """
    if isinstance(content, dict) and "kind" in content:
        for kind in _dataclasses_in(hint):
            hints = typing.get_type_hints(kind, include_extras=True)
            names = {field.name for field in dataclasses.fields(kind)}
            if kind.__name__ == content["kind"] and names == content.keys() - {"kind"}:
                return kind(**{name: from_json(hints[name], content[name]) for name in names})
        raise InputError(f"settings of another version: {content['kind']}")
    if isinstance(content, list):
        return tuple(from_json(None, item) for item in content)
    if isinstance(content, str) and "Path" in str(hint):
        return Path(content)
    return content


def _dataclasses_in(hint):
    """Return the dataclasses that a type hint allows."""
    if typing.get_origin(hint) is Annotated or _is_union(hint):
        parts = typing.get_args(hint)
        parts = parts[:1] if typing.get_origin(hint) is Annotated else parts
        return [kind for part in parts for kind in _dataclasses_in(part)]
    return [hint] if dataclasses.is_dataclass(hint) else []


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of `to_json(settings)` by dotted names."""
    found = {}
    for name, value in config.items():
        whole = f"{prefix}{name}"
        found |= flat(value, f"{whole}.") if isinstance(value, dict) else {whole: value}
    return found
