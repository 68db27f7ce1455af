"""What nerfstudio loads through entry points.

nerfstudio loads the entry points of every plugin in each of its commands, and does not catch what they raise. So this
module imports nothing until nerfstudio asks for an attribute, and it never raises. A method that cannot work in this
environment stays listed, and says why when it is chosen.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a specification.

    Returns:
        The specification. In its place, for a method that cannot be imported, one that says why when it is chosen; for
        a dataparser None, which nerfstudio skips with a warning.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    is_method = name.startswith("softmining_")
    try:
        module = importlib.import_module(f"nerfstudio_softmining.plugin.{'methods' if is_method else 'dataparsers'}")
        return getattr(module, name)
    except Exception as error:
        return _unavailable(name.replace("_", "-"), error) if is_method else None


def _unavailable(name: str, error: Exception) -> Any:
    try:
        from nerfstudio_softmining.plugin.unavailable import unavailable_method

        return unavailable_method(name, error)
    except Exception:  # a nerfstudio whose own modules have moved
        return None
