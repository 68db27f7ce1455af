"""Exact draws from a density over any number of entries: fixed weights within tiles, and a factor for each tile."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int32, Int64, UInt8
from torch import Tensor

TILE = 64
"""Entries of a tile where the caller has none of its own."""
CHUNK = 1 << 16
"""Tiles summed at a time, which bounds temporary memory."""
OCTAVES = 24
"""Bytes stand for weights from 2^-OCTAVES to 1."""
LARGEST = 1 << 30
"""Integer weight of the largest byte. All sums are exact up to 2^23 entries of it, and to 16 digits beyond."""


class TiledDensity(NamedTuple):
    """A density over entries in tiles of equal size; entry `i` is in tile `i // size`.

    The probability of an entry is proportional to its weight times the factor of its tile. A table takes 1 byte an
    entry and 20 bytes a tile. A draw takes one binary search over the tiles and one within a tile.

    >>> density = from_weights(torch.full((3, 4), 255, dtype=torch.uint8))
    >>> density.sums == 4 * LARGEST
    tensor([True, True, True])
    """

    weights: UInt8[Tensor, "tiles size"] | Int32[Tensor, "tiles size"]
    """Weights of the entries: logarithmic bytes (see [encode][]), or integers as they are."""
    sums: Int64[Tensor, " tiles"]
    """Sum of the integer weights of each tile, without its factor."""
    factors: Float[Tensor, " tiles"]
    """Factor of each tile."""
    ends: Float64[Tensor, " tiles"]
    """Sum of all weights times factors, up to and including each tile."""


class Draw(NamedTuple):
    """Entries drawn from a [TiledDensity][] and the probability of each."""

    index: Int64[Tensor, " k"]  # pyright: ignore[reportIncompatibleMethodOverride] # a tuple's own, which nobody needs
    probability: Float[Tensor, " k"]


def encode(weights: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """Round weights in [0, 1] to logarithmic bytes.

    Weights from 2^-24 to 1 are at most 3.4 % off. Smaller ones become 2^-24, and only 0 becomes 0.

    >>> encode(torch.tensor([0.0, 1e-9, 0.5, 1.0]))
    tensor([  0,   1, 244, 255], dtype=torch.uint8)
    """
    log_weights = 255 + weights.clamp(0.0, 1.0).log2() * (254 / OCTAVES)
    return torch.where(weights > 0, log_weights.clamp(1, 255).round(), 0).to(torch.uint8)


def integer_weight(weights: UInt8[Tensor, "*n"] | Int32[Tensor, "*n"], power: float = 1.0) -> Int64[Tensor, "*n"]:
    """Return the integer weights that a table stands for, or a power of them.

    Bytes stand for integers proportional to 2^(24 byte / 254), up to `LARGEST`. Integers stand for themselves.

    >>> integer_weight(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, LARGEST]
    True
    """
    if weights.dtype == torch.int32:
        return weights.long() if power == 1 else weights.double().pow(power).long()
    rows = torch.atleast_2d(weights).flatten(0, -2)
    # on CPUs twice as fast as index_select
    integers = _integers_of_bytes(weights.device, power).expand(len(rows), -1).gather(1, rows.long())
    return integers.view(weights.shape)


@functools.lru_cache
def _integers_of_bytes(device: torch.device, power: float) -> Tensor:
    steps = torch.arange(256, dtype=torch.float64)
    table = (LARGEST * torch.exp2((steps - 255) * (power * OCTAVES / 254))).round().long()
    table[0] = 0
    return table.to(device)


def from_weights(
    weights: UInt8[Tensor, "tiles size"] | Int32[Tensor, "tiles size"] | UInt8[Tensor, " n"] | Int32[Tensor, " n"],
) -> TiledDensity:
    """Make a density whose factors are all 1. O(n), for set-up.

    Args:
        weights: weights by tile. Weights in a row are cut into tiles of 64, the last one filled up with zeros.

    >>> density = from_weights(torch.tensor([1, 4], dtype=torch.int32))
    >>> probability(density, torch.tensor([0, 1]))
    tensor([0.2000, 0.8000])
    """
    if weights.dim() == 1:
        padding = -len(weights) % TILE or (0 if len(weights) else TILE)
        weights = F.pad(weights, (0, padding)).view(-1, TILE)
    sums = torch.cat([integer_weight(part).sum(dim=1) for part in weights.split(CHUNK)])
    factors = torch.ones(len(sums), device=sums.device)
    return with_factors(TiledDensity(weights, sums, factors, sums.double()), factors)


def with_factors(density: TiledDensity, factors: Float[Tensor, " tiles"]) -> TiledDensity:
    """Replace the factors of all tiles. O(tiles), without host synchronisation.

    >>> density = from_weights(torch.full((2, 4), 255, dtype=torch.uint8))
    >>> probability(with_factors(density, torch.tensor([3.0, 1.0])), torch.tensor([0, 7]))
    tensor([0.1875, 0.0625])
    """
    return density._replace(factors=factors, ends=(factors.double() * density.sums).cumsum(0))


def total(density: TiledDensity) -> Float64[Tensor, ""]:
    """Return the sum of all weights times factors. Nothing can be drawn where it is 0.

    >>> total(from_weights(torch.zeros(3, dtype=torch.uint8)))
    tensor(0., dtype=torch.float64)
    """
    return density.ends[-1]


def draw(density: TiledDensity, count: int, generator: torch.Generator | None = None) -> Draw:
    """Draw entries independently. O(count (size + log tiles)), without host synchronisation.

    Args:
        density: a density with a [total][] above 0.
        count: number of draws.
        generator: source of randomness on the density's device; torch's own if None.

    >>> draw(from_weights(torch.tensor([0, 0, 7], dtype=torch.uint8)), count=2).index
    tensor([2, 2])
    """
    high, low = torch.randint(1 << 31, (2, count), generator=generator, device=density.ends.device)
    tile, target = _tile_at(density, ((high << 31) + low).double() * 2.0**-62)
    before = torch.where(tile > 0, density.ends[(tile - 1).clamp_min(0)], 0.0)
    return _entry_at(density, tile, ((target - before) / density.factors[tile]).long())


def draw_stratified(density: TiledDensity, count: int, generator: torch.Generator | None = None) -> Draw:
    """Draw one entry from each of `count` strata of equal probability, without host synchronisation.

    Every tile receives its expected number of draws, up to rounding; independent draws scatter around it. Each draw by
    itself follows the density. Draws come in the order of the tiles, from a random tile on.

    Args:
        density: a density with a [total][] above 0.
        count: number of draws.
        generator: source of randomness on the density's device; torch's own if None.

    >>> draw_stratified(from_weights(torch.tensor([0, 0, 7], dtype=torch.uint8)), count=2).index
    tensor([2, 2])
    """
    device = density.ends.device
    chance = torch.rand(2, count, dtype=torch.float64, generator=generator, device=device)
    turn = torch.rand((), dtype=torch.float64, generator=generator, device=device)
    stratum = (torch.arange(count, device=device) + chance[0]) / count
    tile, _ = _tile_at(density, (stratum + turn) % 1)
    return _entry_at(density, tile, (chance[1] * density.sums[tile]).long())


def draw_within(
    density: TiledDensity,
    tile: Int64[Tensor, " k"],
    power: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " k"]:
    """Draw one entry of each given tile, in proportion to a power of its weight. O(count size).

    Args:
        density: a density.
        tile: tiles with a sum above 0; each may occur several times.
        power: power of the weights.
        generator: source of randomness on the density's device; torch's own if None.

    >>> draw_within(from_weights(torch.tensor([[0, 3], [7, 0]], dtype=torch.uint8)), torch.tensor([1, 0, 1]))
    tensor([2, 1, 2])
    """
    chance = torch.rand(len(tile), 1, dtype=torch.float64, generator=generator, device=tile.device)
    ends = integer_weight(density.weights.index_select(0, tile), power).cumsum(dim=1)
    place = torch.searchsorted(ends, (chance * ends[:, -1:]).long(), right=True)[:, 0]
    size = density.weights.shape[1]
    return tile * size + place.clamp_max(size - 1)


def _tile_at(density: TiledDensity, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tile at a fraction of the total [k], and that fraction times the total [k]."""
    everything = density.ends[-1]
    # below the end even if the product is rounded up to it
    target = (fraction * everything).minimum(everything.nextafter(torch.zeros_like(everything)))
    return torch.searchsorted(density.ends, target, right=True).clamp_max(len(density.ends) - 1), target


def _entry_at(density: TiledDensity, tile: Tensor, rank: Tensor) -> Draw:
    """Return the entry of each tile [k] at a rank [k] among the sum of its integer weights."""
    size = density.weights.shape[1]
    ends = integer_weight(density.weights.index_select(0, tile)).cumsum(dim=1)
    rank = rank.clamp_min(0).minimum(ends[:, -1] - 1)  # rounding may carry it past either end
    place = torch.searchsorted(ends, rank[:, None], right=True)[:, 0]
    index = tile * size + place.clamp_max(size - 1)
    return Draw(index, probability(density, index))


def probability(density: TiledDensity, index: Int64[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return the probability of drawing each of the given entries.

    >>> probability(from_weights(torch.full((2, 2), 255, dtype=torch.uint8)), torch.tensor([3]))
    tensor([0.2500])
    """
    factor = density.factors[index // density.weights.shape[1]]
    return integer_weight(density.weights.view(-1)[index]).float() * factor / density.ends[-1].float()


def relative_weight(density: TiledDensity, index: Int64[Tensor, " k"], power: float = 1.0) -> Float[Tensor, " k"]:
    """Return a power of the weight in [0, 1] that bytes stand for, without the factor of the tile.

    >>> relative_weight(from_weights(torch.tensor([255, 0], dtype=torch.uint8)), torch.tensor([0, 1]))
    tensor([1., 0.])
    """
    return integer_weight(density.weights.view(-1)[index], power).float() / LARGEST


def bytes_per_entry(entry_bytes: int = 1, size: int = TILE) -> float:
    """Return the memory of a table for each of its entries, in bytes.

    >>> bytes_per_entry()
    1.3125
    """
    return entry_bytes + 20 / size
