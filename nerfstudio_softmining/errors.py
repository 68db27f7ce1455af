"""Errors that a user can mend."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any


class UserError(ValueError):
    """A mistake in the settings or the data. The message names the setting, its value and the fix."""


class SettingError(UserError):
    """A setting that cannot be used, by the name of its field.

    Args:
        field: name of the field of a settings dataclass.
        value: what it is set to.
        message: what is wrong, and the fix.
    """

    def __init__(self, field: str, value: Any, message: str) -> None:
        super().__init__(f"{field} is {value}: {message}")
        self.field, self.value, self.message = field, value, message


@contextlib.contextmanager
def naming_flags(flag: Callable[[str], str]) -> Iterator[None]:
    """Turn a [SettingError][] into a [UserError][] that names the command-line flag of the field.

    Args:
        flag: gives the flag of a field.
    """
    try:
        yield
    except SettingError as error:
        raise UserError(f"{flag(error.field)} is {error.value}: {error.message}") from error


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
