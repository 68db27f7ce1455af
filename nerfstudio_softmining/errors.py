"""Errors that a user can mend."""

from __future__ import annotations

import sys
from types import TracebackType


class UserError(ValueError):
    """A mistake in the settings or the data. The message names the setting, its value and the fix."""


def hide_traceback_of_user_errors() -> None:
    """Let an uncaught [UserError][] end the process with its message alone, as nerfstudio's commands do not catch
    it."""
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print(f"\nError: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = excepthook
