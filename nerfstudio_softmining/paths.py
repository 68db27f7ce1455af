"""Names that others have chosen, as parts of paths."""

from __future__ import annotations

import re

FORBIDDEN = re.compile(r'[/\\:*?"<>|\x00-\x1f]')
"""What some file system gives a meaning of its own, or refuses."""


def file_name(name: str) -> str:
    """Return a name as one part of a path, which leads neither up nor down.

    >>> file_name("nerf_synthetic/lego"), file_name("langevin,noise=0.03"), file_name("..")
    ('nerf_synthetic_lego', 'langevin,noise=0.03', '__')
    """
    plain = FORBIDDEN.sub("_", name)
    return plain if plain.strip(". ") else "_" * max(1, len(plain))
