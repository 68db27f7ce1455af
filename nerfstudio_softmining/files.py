"""Files that are written whole or not at all, errors that name them, and names that lead nowhere else."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nerfstudio_softmining.errors import UserError

NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a disk without space."""
FORBIDDEN = re.compile(r'[/\\:*?"<>|\x00-\x1f]')
"""What some file system gives a meaning of its own, or refuses."""


class CannotWriteError(UserError):
    """A file that cannot be written. No other file can be expected to be, so that it ends a whole comparison.

    Args:
        path: the file.
        error: the reason.
    """

    def __init__(self, path: Path | str, error: OSError) -> None:
        fix = "Free some space" if error.errno in NO_PLACE else "Make it writable, or name another place"
        self.cause = f"{path} cannot be written ({error.strerror or error})"
        super().__init__(f"{self.cause}. {fix}, then run the same command again.")


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn an error of the system into a [CannotWriteError][] that names a file.

    Args:
        path: the file, of which an error in the middle of a file does not know the name.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason: BaseException | None = error
        while isinstance(reason, Exception) and not isinstance(reason, OSError):
            reason = reason.__context__  # torch.save raises another error where it cannot end the file
        if reason is None:
            raise
        if not isinstance(reason, OSError):  # Ctrl-C
            raise reason from None
        raise CannotWriteError(reason.filename or path, reason) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside another one, which it replaces once it is written.

    A crash or a full disk leaves the other file as it was. Folders are made as needed.

    Raises:
        CannotWriteError: if the file cannot be written.
    """
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def write(content: str | bytes, path: Path) -> None:
    """Write text or bytes to a file."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure of matplotlib to a file, with the options of its `savefig`."""
    with replacing(path) as part:
        figure.savefig(part, **options)


def file_name(name: str) -> str:
    """Return a name as one part of a path, which leads neither up nor down.

    >>> file_name("nerf_synthetic/lego"), file_name("langevin,noise=0.03"), file_name("..")
    ('nerf_synthetic_lego', 'langevin,noise=0.03', '__')
    """
    plain = FORBIDDEN.sub("_", name)
    return plain if plain.strip(". ") else "_" * max(1, len(plain))
