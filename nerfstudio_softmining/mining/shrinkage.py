"""Ratios of observed to predicted error by tile, shrunk towards those of larger tiles where little was observed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def shrunk_ratio(
    observed: Float[Tensor, " tiles"],
    predicted: Float[Tensor, " tiles"],
    parents: Iterable,
    prior_strength: Float[Tensor, ""] | float,
) -> Float[Tensor, " tiles"]:
    """Estimate the ratio of observed to predicted error of each tile.

    The ratio of a tile is (observed + s * ratio of its parent) / (predicted + s) with the prior strength s. The largest
    tiles are shrunk towards the ratio of all of them together.

    Args:
        observed: sum of the errors observed in each tile.
        predicted: sum of their predictions.
        parents: for each level but the largest tiles, the index [tiles of that level] of the parent of each tile.
        prior_strength: sum of predictions at which a tile's own ratio counts as much as its parent's.

    Returns:
        The ratios. Not finite where nothing at all was observed.

    Two tiles of one parent, of which one was never observed:

    >>> shrunk_ratio(torch.tensor([6.0, 0.0]), torch.tensor([2.0, 0.0]), [torch.tensor([0, 0])], prior_strength=2.0)
    tensor([3., 3.])
    """
    parents = list(parents)
    sums = [torch.stack((observed, predicted))]
    # the number of the largest tiles is not known: there are at most as many as those of the level below
    for parent, count in zip(parents, [*map(len, parents[1:]), len(parents[-1])], strict=True):
        sums.append(sums[-1].new_zeros(2, count).index_add_(1, parent, sums[-1]))
    overall = observed.sum() / predicted.sum()
    ratio = (sums[-1][0] + prior_strength * overall) / (sums[-1][1] + prior_strength)
    for (observed, predicted), parent in zip(reversed(sums[:-1]), reversed(parents), strict=True):
        ratio = (observed + prior_strength * ratio[parent]) / (predicted + prior_strength)
    return ratio
