"""Settings: bounds annotated on their types, and values written as text, as in langevin,drift=0."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from nerfstudio_softmining.errors import SettingError, UserError


@dataclass(frozen=True)
class Interval:
    """Bounds of a number, as a marker for `typing.Annotated`.

    >>> Interval(0, 1).contains(0.5)
    True
    """

    low: float
    """Smallest value."""
    high: float = math.inf
    """Largest value."""
    excludes_low: bool = False
    """Whether the number must be above `low` instead of at least it."""

    def contains(self, value: float) -> bool:
        """Return whether a value is within the bounds; false for what is not finite."""
        is_above = self.low < value if self.excludes_low else self.low <= value
        return is_above and value <= self.high and value != math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"it must be finite and {'above' if self.excludes_low else 'at least'} {self.low}."
        return f"it must be in {'(' if self.excludes_low else '['}{self.low}, {self.high}]."


Fraction = Annotated[float, Interval(0, 1)]
"""A number from 0 to 1."""
PositiveFraction = Annotated[float, Interval(0, 1, excludes_low=True)]
"""A number above 0, up to 1."""
NonNegative = Annotated[float, Interval(0)]
"""A number of 0 or more."""
Positive = Annotated[float, Interval(0, excludes_low=True)]
"""A number above 0."""
LARGEST_COUNT = 2**31 - 1
"""Largest whole number of a setting, which torch can hold in any of its types."""
Count = Annotated[int, Interval(0, LARGEST_COUNT)]
"""A whole number of 0 or more."""
PositiveCount = Annotated[int, Interval(1, LARGEST_COUNT)]
"""A whole number of 1 or more."""


def check(config: Any) -> None:
    """Check all fields of a settings dataclass against the bounds and the choices annotated on their types.

    Raises:
        SettingError: naming the first field out of bounds, or set to none of its choices.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name, None)
        for bounds in _intervals(hint):
            if value is not None and not bounds.contains(value):
                raise SettingError(name, value, str(bounds))
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise SettingError(name, value, f"it is one of {', '.join(map(str, get_args(hint)))}.")


def _intervals(hint: Any) -> Iterator[Interval]:
    yield from (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Interval))
    if get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from _intervals(part)


VALUE_TYPES: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
"""What may be given for a setting of a type."""


def suits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type: a number, truth, text or choice, a tuple of these, or one that may be None.

    >>> suits((1, 2), tuple[int, ...]), suits(0.5, int | None), suits(None, int | None)
    (True, False, True)
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return suits(value, parts[0])
    if origin in (UnionType, Union):
        return any(suits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple and type(value) is tuple:
        hints = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(hints) == len(value) and all(map(suits, value, hints))
    if hint is NoneType:
        return value is None
    return type(value) in VALUE_TYPES.get(hint, ())


def apply(setting: str, configs: Sequence[Any], required: bool, sampler: str) -> bool:
    """Set name=value in every settings dataclass with a field of that name. Return whether there is one.

    Args:
        setting: the text name=value.
        configs: settings dataclasses; anything else among them is left alone.
        required: whether one of them must have the field; of settings shared by all samplers, some may have none.
        sampler: the sampler as the user wrote it, for messages.

    Raises:
        UserError: if a required setting is unknown, or its value does not suit it.
    """
    key, equals, text = setting.partition("=")
    key = key.replace("-", "_")
    owners = [config for config in configs if is_dataclass(config) and key in {field.name for field in fields(config)}]
    if not equals or (required and not owners):
        raise UserError(f"{sampler!r} has {setting!r}: no part of the method has a setting {key!r}.")
    for owner in owners:
        value, hint = _literal(text), _without_none(get_type_hints(type(owner)).get(key))
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{sampler!r} has {setting!r}: {key} is one of {', '.join(map(str, get_args(hint)))}.")
        if not suits(value, hint):
            raise UserError(f"{sampler!r} has {setting!r}: {key} is written as in {key}={getattr(owner, key)}.")
        try:
            setattr(owner, key, float(value) if hint is float else value)
        except OverflowError as error:
            raise UserError(f"{sampler!r} has {setting!r}: {error}.") from error
    return bool(owners)


def _without_none(hint: Any) -> Any:
    """Return the type of a setting that may also be None."""
    is_union = get_origin(hint) in (UnionType, Union)
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if is_union else []
    return kinds[0] if len(kinds) == 1 else hint


def _literal(text: str) -> Any:
    """Parse a number, tuple or truth value as Python writes it; anything else is the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
