"""Settings given as text, as in langevin,drift=0."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from nerfstudio_softmining.errors import UserError


def apply(setting: str, places: Sequence[Any], required: bool, sampler: str) -> None:
    """Set name=value wherever that name is; settings that all samplers share may be unknown to some.

    Raises:
        UserError: if a required setting is known nowhere, or has no value.
    """
    key, equals, value = setting.partition("=")
    key = key.replace("-", "_")
    owners = [place for place in places if hasattr(place, key)]
    if not equals or (required and not owners):
        raise UserError(f"{sampler!r} has {setting!r}: neither the model nor the sampler has a setting {key!r}.")
    for owner in owners:
        new, old = _literal(value), getattr(owner, key)
        if isinstance(old, int | float) and not isinstance(new, int | float):
            raise UserError(f"{sampler!r} has {setting!r}: {key} is a number or a truth value, such as {old}.")
        setattr(owner, key, new)


def _literal(text: str) -> Any:
    """A number, tuple or truth value as Python writes it, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
