"""Exact draws from a density over any number of pixels, at one byte each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

BLOCK = 64
"""Entries summed into one entry of the cumulative table."""
CHUNK = BLOCK << 16
"""Entries summed at a time while the table is built, which bounds its temporary memory."""


class DiscreteDensity(NamedTuple):
    """A density over the entries 0 ... n - 1, in proportion to the square of a byte.

    Takes 1 byte an entry and 8 bytes a block of 64: 1.125 bytes an entry, of which the bytes may be a view of a mask
    that exists already. Sums are integers, so a draw is exact for any n; `torch.multinomial` ends at 2^24 entries.
    """

    roots: UInt8[Tensor, " n"]
    """Square roots of the densities, up to a factor. A mask is one as it is."""
    cumulative: Int64[Tensor, " blocks"]
    """Sum of the squares up to and including each block."""
    total: int
    """Sum of all squares; 0 means that there is nothing to draw."""


class Draw(NamedTuple):
    """Entries drawn from a [DiscreteDensity][] and the probability of each."""

    entry: Int64[Tensor, " k"]
    probability: Float[Tensor, " k"]


def tabulate(roots: UInt8[Tensor, " n"]) -> DiscreteDensity:
    """Make the table that [draw][] needs. Reads every entry once and waits for the device: for set-up, not for a step.

    >>> tabulate(torch.tensor([0, 1, 2], dtype=torch.uint8)).total
    5
    """
    sums = []
    for start in range(0, len(roots), CHUNK):
        squares = roots[start : start + CHUNK].to(torch.int32).square()
        squares = torch.nn.functional.pad(squares, (0, -len(squares) % BLOCK))
        sums.append(squares.view(-1, BLOCK).sum(dim=1))
    cumulative = torch.cat(sums).cumsum(dim=0) if sums else torch.zeros(0, dtype=torch.int64, device=roots.device)
    return DiscreteDensity(roots, cumulative, int(cumulative[-1]) if len(cumulative) else 0)


def encode(weights: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """Round weights in [0, 1] up to the bytes of a [DiscreteDensity][]; only 0 becomes 0.

    >>> encode(torch.tensor([0.0, 1e-9, 0.25, 1.0]))
    tensor([  0,   1, 128, 255], dtype=torch.uint8)
    """
    return weights.clamp(0.0, 1.0).sqrt().mul_(255).ceil_().to(torch.uint8)


def draw(density: DiscreteDensity, count: int, generator: torch.Generator | None = None) -> Draw:
    """Draw entries independently; O(count), no host synchronisation.

    Args:
        density: what [tabulate][] returned, with a total above 0.
        count: number of draws.
        generator: source of randomness on the density's device; torch's own if None.

    >>> draw(tabulate(torch.tensor([0, 0, 7], dtype=torch.uint8)), count=2).entry
    tensor([2, 2])
    """
    device = density.roots.device
    target = torch.randint(density.total, (count,), generator=generator, device=device)
    block = torch.searchsorted(density.cumulative, target, right=True)
    before = torch.where(block > 0, density.cumulative[(block - 1).clamp_min(0)], 0)

    entry = block[:, None] * BLOCK + torch.arange(BLOCK, device=device)
    last = len(density.roots) - 1
    squares = density.roots[entry.clamp_max(last)].to(torch.int32).square()
    offset = (squares.cumsum(dim=1) <= (target - before)[:, None]).sum(dim=1, keepdim=True)
    return Draw(entry.gather(1, offset)[:, 0], squares.gather(1, offset)[:, 0] / density.total)


def probability(density: DiscreteDensity, index: Int64[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Probability of drawing each of the given entries.

    >>> probability(tabulate(torch.tensor([1, 2], dtype=torch.uint8)), torch.tensor([0, 1]))
    tensor([0.2000, 0.8000])
    """
    return density.roots[index].to(torch.int32).square() / density.total
