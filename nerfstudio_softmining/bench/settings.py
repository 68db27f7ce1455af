"""Settings given as text, as in langevin,drift=0."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nerfstudio_softmining.errors import UserError

KINDS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), tuple: (tuple,)}
"""What may be given for a setting of a type."""


def apply(setting: str, places: Sequence[Any], required: bool, sampler: str) -> None:
    """Set name=value wherever that name is; settings that all samplers share may be unknown to some.

    Raises:
        UserError: if a required setting is known nowhere, or has no value.
    """
    key, equals, text = setting.partition("=")
    key = key.replace("-", "_")
    owners = [place for place in places if is_dataclass(place) and key in {field.name for field in fields(place)}]
    if not equals or (required and not owners):
        raise UserError(f"{sampler!r} has {setting!r}: neither the model nor the sampler has a setting {key!r}.")
    for owner in owners:
        value, hint = _literal(text), _without_none(get_type_hints(type(owner)).get(key))
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{sampler!r} has {setting!r}: {key} is one of {', '.join(map(str, get_args(hint)))}.")
        accepted = KINDS.get(hint if get_origin(hint) is None else get_origin(hint))
        if accepted is not None and type(value) not in accepted:
            raise UserError(f"{sampler!r} has {setting!r}: {key} is written as in {key}={getattr(owner, key)}.")
        setattr(owner, key, float(value) if hint is float else value)


def _without_none(hint: Any) -> Any:
    """The kind of value of a setting that may also be left open."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if isinstance(hint, UnionType) else []
    return kinds[0] if len(kinds) == 1 else hint


def _literal(text: str) -> Any:
    """A number, tuple or truth value as Python writes it, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
