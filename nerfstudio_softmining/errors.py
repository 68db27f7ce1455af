"""Errors that a user can mend."""

from __future__ import annotations


class UserError(SystemExit, ValueError):
    """A mistake in the settings or the data. The message names the setting, its value and the fix.

    nerfstudio's commands do not catch it. As a `SystemExit` it ends the process with its message alone, without a
    traceback and without a hook that other methods would share.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = f"\nError: {message}"
