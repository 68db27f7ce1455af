"""Draws from a density that is fine, fixed and stored in bytes within tiles, and can change from tile to tile."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int32, Int64, UInt8
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining.density import Draw


class TiledDensity(NamedTuple):
    """A density over entries that are parted into tiles of as many entries each.

    An entry has a weight, and a tile a factor on the weights of its entries; entry number i is in tile i // size.
    Takes 1 byte an entry and 16 bytes a tile. Weights are whole parts of the largest, so small that the sum of a tile
    has 31 bits.

    >>> density = tabulate(torch.full((3, 4), 255, dtype=torch.uint8))
    >>> density.sums
    tensor([4., 4., 4.])
    """

    codes: UInt8[Tensor, "tiles size"]
    """Weights of the entries, on the logarithmic scale of [density.encode][]."""
    sums: Float[Tensor, " tiles"]
    """Sum of the weights of each tile, without its factor; 1 is the largest weight of an entry."""
    factors: Float[Tensor, " tiles"]
    """Factor of each tile."""
    ends: Float64[Tensor, " tiles"]
    """Sum of the weights, with their factors, of all tiles up to each."""


def tabulate(codes: UInt8[Tensor, "tiles size"]) -> TiledDensity:
    """A density with the factor 1 everywhere; O(n), for set-up.

    >>> codes = dens.encode(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]))
    >>> tabulate(codes).ends.round(decimals=1)
    tensor([1., 2., 2.], dtype=torch.float64)
    """
    size = codes.shape[1]
    sums = torch.cat([_integers(part, size).sum(dim=1) for part in codes.split(1 << 16)]) / _largest(size)
    return corrected(TiledDensity(codes, sums, torch.ones_like(sums), sums.double()), torch.ones_like(sums))


def corrected(density: TiledDensity, factors: Float[Tensor, " tiles"]) -> TiledDensity:
    """The same density with other factors; O(tiles), no host synchronisation.

    >>> density = tabulate(torch.full((2, 4), 255, dtype=torch.uint8))
    >>> probability(corrected(density, torch.tensor([3.0, 1.0])), torch.tensor([0, 7]))
    tensor([0.1875, 0.0625])
    """
    return density._replace(factors=factors, ends=(factors * density.sums).double().cumsum(0))


def draw(density: TiledDensity, count: int, generator: torch.Generator | None = None) -> Draw:
    """Draw entries, one from each of `count` parts of the same probability; no host synchronisation.

    So there are nearly as many draws of every tile as it should have, where independent draws scatter. They come in the
    order of the tiles, from a random tile on; by itself, each draw follows the density. O(count (size + log tiles)).

    >>> draw(tabulate(torch.tensor([[0, 0], [0, 7]], dtype=torch.uint8)), count=2).entry
    tensor([3, 3])
    """
    total = density.ends[-1]
    chance = torch.rand(2, count, dtype=torch.float64, generator=generator, device=total.device)
    turn = torch.rand((), dtype=torch.float64, generator=generator, device=total.device)
    part = (torch.arange(count, device=total.device) + chance[0]) / count
    # below the end even if the product is rounded up to it
    target = ((part + turn) % 1 * total).minimum(total.nextafter(torch.zeros_like(total)))
    tile = torch.searchsorted(density.ends, target, right=True).clamp_max(len(density.ends) - 1)
    size = density.codes.shape[1]
    ends = _integers(density.codes.index_select(0, tile), size).cumsum(dim=1, dtype=torch.int32)
    place = torch.searchsorted(ends, (chance[1] * ends[:, -1]).int()[:, None], right=True)[:, 0]
    entry = tile * size + place.clamp_max(size - 1)
    return Draw(entry, probability(density, entry))


def weight(density: TiledDensity, index: Int64[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Weight of each of the given entries, in [0, 1], without the factor of its tile.

    >>> weight(tabulate(torch.tensor([[255, 0]], dtype=torch.uint8)), torch.tensor([0, 1]))
    tensor([1., 0.])
    """
    size = density.codes.shape[1]
    return _integers(density.codes.view(-1)[index], size) / _largest(size)


def probability(density: TiledDensity, index: Int64[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Probability of drawing each of the given entries.

    >>> probability(tabulate(torch.full((2, 2), 255, dtype=torch.uint8)), torch.tensor([3]))
    tensor([0.2500])
    """
    factor = density.factors[index // density.codes.shape[1]]
    return (weight(density, index).double() * factor / density.ends[-1]).float()


def _largest(size: int) -> int:
    """Integer weight of the largest byte: as many as a tile has entries are a sum of 31 bits."""
    return (2**31 - 1) // size


def _integers(codes: UInt8[Tensor, "*n"], size: int) -> Int32[Tensor, "*n"]:
    """Integer weights of entries of tiles of a size."""
    return _integer_weights(size, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


@functools.lru_cache
def _integer_weights(size: int, device: torch.device) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    weights = dens.weight(codes).double() / dens.LARGEST * _largest(size)
    return torch.where(codes > 0, weights.round().clamp_min(1), 0).int().to(device)


def borrowed(
    error: Float[Tensor, " tiles"],
    expected: Float[Tensor, " tiles"],
    above: Iterable,
    trust: Float[Tensor, ""] | float,
) -> Float[Tensor, " tiles"]:
    """Error over expectation of each tile, where those seen little have that of the larger tiles around them.

    The ratio of a tile is (error + trust * ratio of the tile above) / (expected + trust), down from all tiles together.

    Args:
        error: sum of the errors seen in each tile.
        expected: sum of what was expected of them.
        above: for each size but the largest, the number of the next larger tile that each tile of it belongs to
            [tiles of that size].
        trust: sum of expectations at which a tile's own ratio counts as much as the one above.

    Two tiles that belong to one, of which one has not been seen:

    >>> borrowed(torch.tensor([6.0, 0.0]), torch.tensor([2.0, 0.0]), [torch.tensor([0, 0])], trust=2.0)
    tensor([3., 3.])
    """
    above = list(above)
    sums = [torch.stack((error, expected))]
    for place, count in zip(above, [*map(len, above[1:]), len(above[-1])], strict=True):  # the last are fewer than that
        sums.append(sums[-1].new_zeros(2, count).index_add_(1, place, sums[-1]))
    overall = error.sum() / expected.sum()
    ratio = (sums[-1][0] + trust * overall) / (sums[-1][1] + trust)
    for (error, expected), place in zip(reversed(sums[:-1]), reversed(above), strict=True):
        ratio = (error + trust * ratio[place]) / (expected + trust)
    return ratio
