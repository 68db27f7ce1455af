"""Exact draws from a density over any number of entries, at one byte each, that can change entry by entry."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor

BRANCHES = 32
"""Entries that are summed into one entry of the level above."""
CHUNK = BRANCHES << 16
"""Entries summed at a time while a density is tabulated, which bounds its temporary memory."""
SEARCHED = 1 << 15
"""Entries of a level that is searched as a whole."""
OCTAVES = 24
"""Bytes stand for weights from 2^-OCTAVES to 1."""
LARGEST = 1 << 30
"""Integer weight that the largest byte stands for; more than 2^32 entries of it would overflow a sum."""


class DiscreteDensity(NamedTuple):
    """A density over the entries 0 ... n - 1, and the sums of its weights in a tree of 32 branches.

    Takes 1 byte an entry and 0.26 bytes for the tree. Sums are of integers, so that a draw is exact for any n
    (`torch.multinomial` ends at 2^24 entries) and stays so however often entries change.
    """

    codes: UInt8[Tensor, " n"] | Int32[Tensor, " n"]
    """Weights: bytes on a logarithmic scale (see [encode][]), or integers as they are, which take 4 bytes an entry."""
    sums: tuple[Int64[Tensor, " blocks"], ...]
    """Sums of the weights of 32 entries, of 32 of those, and so on, down to 32 sums; zeros at the end of each level
    make its length a multiple of 32."""


class Draw(NamedTuple):
    """Entries drawn from a [DiscreteDensity][] and the probability of each."""

    entry: Int64[Tensor, " k"]
    probability: Float[Tensor, " k"]


def encode(weights: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """Round weights to bytes on a logarithmic scale: at most 3.4 % off between 2^-24 and 1, and only 0 becomes 0.

    >>> encode(torch.tensor([0.0, 1e-9, 0.5, 1.0]))
    tensor([  0,   1, 244, 255], dtype=torch.uint8)
    """
    code = 255 + weights.clamp(0.0, 1.0).log2() * (254 / OCTAVES)
    return torch.where(weights > 0, code.clamp(1, 255).round(), 0).to(torch.uint8)


def weight(codes: UInt8[Tensor, "*n"] | Int32[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """The integer weights that codes stand for; those of bytes are in proportion to 2^(24 code / 254).

    >>> weight(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, LARGEST]
    True
    """
    if codes.dtype == torch.int32:
        return codes.long()
    return _weights(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


@functools.lru_cache
def _weights(device: torch.device) -> Tensor:
    steps = torch.arange(256, dtype=torch.float64)
    table = (LARGEST * torch.exp2((steps - 255) * (OCTAVES / 254))).round().long()
    table[0] = 0
    return table.to(device)


def tabulate(codes: UInt8[Tensor, " n"] | Int32[Tensor, " n"]) -> DiscreteDensity:
    """Sum up the weights of all entries; O(n), for set-up. The density keeps the codes themselves, not a copy.

    >>> total(tabulate(torch.tensor([1, 4], dtype=torch.int32)))
    tensor(5)
    """
    sums: list[Tensor] = []
    values = codes
    while not sums or len(values) > BRANCHES:
        parts = [_block_sums(values[start : start + CHUNK]) for start in range(0, max(len(values), 1), CHUNK)]
        values = _padded(torch.cat(parts))
        sums.append(values)
    return DiscreteDensity(codes, tuple(sums))


def _block_sums(values: Tensor) -> Tensor:
    values = values if values.dtype == torch.int64 else weight(values)
    return _padded(values).view(-1, BRANCHES).sum(dim=1)


def _padded(values: Tensor) -> Tensor:
    """Values and zeros, a whole number of blocks."""
    return torch.nn.functional.pad(values, (0, -len(values) % BRANCHES))


def total(density: DiscreteDensity) -> Int64[Tensor, ""]:
    """Sum of all weights; 0 means that there is nothing to draw.

    >>> total(tabulate(torch.zeros(3, dtype=torch.uint8)))
    tensor(0)
    """
    return density.sums[-1].sum()


def draw(density: DiscreteDensity, count: int, generator: torch.Generator | None = None) -> Draw:
    """Draw entries independently; O(count log n), no host synchronisation.

    Args:
        density: what [tabulate][] returned, with a [total][] above 0.
        count: number of draws.
        generator: source of randomness on the density's device; torch's own if None.

    >>> draw(tabulate(torch.tensor([0, 0, 7], dtype=torch.uint8)), count=2).entry
    tensor([2, 2])
    """
    device = density.codes.device
    everything = total(density)
    target = _below(everything, torch.randint(1 << 31, (2, count), generator=generator, device=device))
    # one search in the largest level that can be summed up in no time saves the levels above it
    start = next((n for n, values in enumerate(density.sums) if len(values) <= SEARCHED), len(density.sums) - 1)
    ends = density.sums[start].cumsum(0)
    entry = torch.searchsorted(ends, target, right=True).clamp_max(len(ends) - 1)
    chosen = density.sums[start][entry]
    target = target - (ends[entry] - chosen)
    for values in (*reversed(density.sums[:start]), density.codes):
        children = _children(values, entry)
        ends = children.cumsum(dim=1)
        branch = torch.searchsorted(ends, target[:, None], right=True).clamp_max(BRANCHES - 1)
        chosen = children.gather(1, branch)[:, 0]
        target = target - (ends.gather(1, branch)[:, 0] - chosen)
        entry = entry * BRANCHES + branch[:, 0]
    return Draw(entry, chosen / everything)


def _below(end: Tensor, bits: Tensor) -> Tensor:
    """floor(end * x) for x in [0, 1) of 62 bits and an end up to 2^62, without overflow.

    A remainder (modulo the end) would favour the first entries, by up to a factor of 2 where the end is near 2^62.
    """
    (high, low), mask = bits, (1 << 31) - 1
    upper, lower = end >> 31, end & mask
    return high * upper + ((high * lower + low * upper + (low * lower >> 31)) >> 31)


def _children(values: Tensor, block: Tensor) -> Tensor:
    """Weights [k, 32] of the entries of some blocks; 0 past the end."""
    whole = len(values) // BRANCHES
    if whole == 0:
        chosen = _padded(values).expand(len(block), BRANCHES)
    else:
        chosen = values[: whole * BRANCHES].view(-1, BRANCHES).index_select(0, block.clamp_max(whole - 1))
        if len(values) % BRANCHES:
            rest = _padded(values[whole * BRANCHES :])
            chosen = torch.where((block == whole)[:, None], rest, chosen)
    return chosen if chosen.dtype == torch.int64 else weight(chosen)


def probability(density: DiscreteDensity, index: Int64[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Probability of drawing each of the given entries.

    >>> probability(tabulate(torch.tensor([1, 4], dtype=torch.int32)), torch.tensor([0, 1]))
    tensor([0.2000, 0.8000])
    """
    return weight(density.codes[index]) / total(density)


def replace(
    density: DiscreteDensity, index: Int64[Tensor, " k"], codes: UInt8[Tensor, " k"] | Int32[Tensor, " k"]
) -> None:
    """Give some entries other weights, in place; O(k log n), no host synchronisation.

    Of an entry that is named more than once, any one of its codes is kept.

    >>> density = tabulate(torch.tensor([1, 4], dtype=torch.int32))
    >>> replace(density, torch.tensor([1]), torch.tensor([1], dtype=torch.int32))
    >>> probability(density, torch.tensor([1]))
    tensor([0.5000])
    """
    density.codes[index] = codes
    values = density.codes
    for sums in density.sums:
        index = index // BRANCHES
        # from all children anew, so that an entry named twice counts once
        sums[index] = _children(values, index).sum(dim=1)
        values = sums


def bytes_per_entry(code_bytes: int = 1) -> float:
    """Memory of a large density: its codes and its tree.

    >>> round(bytes_per_entry(), 3)
    1.258
    """
    return code_bytes + 8 / (BRANCHES - 1)


def scale(codes: UInt8[Tensor, "*n"], factor: float) -> UInt8[Tensor, "*n"]:
    """Multiply the weights of bytes, on their scale; what leaves the scale stays at its end, and 0 stays 0.

    >>> scale(torch.tensor([0, 10, 255], dtype=torch.uint8), 0.5)
    tensor([  0,   1, 244], dtype=torch.uint8)
    """
    moved = (codes.int() + round(math.log2(factor) * 254 / OCTAVES)).clamp(1, 255)
    return torch.where(codes > 0, moved, 0).to(torch.uint8)
