"""Errors that a user can mend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class UserError(SystemExit, ValueError):
    """A mistake in the settings or the data. The message names the setting, its value and the fix.

    nerfstudio's commands do not catch it. As a `SystemExit` it ends the process with its message alone, without a
    traceback and without a hook that other methods would share.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = f"\nError: {message}"


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
