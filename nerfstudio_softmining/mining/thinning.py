"""Thinning: keep some of many terms of a sum, the large ones more likely, and weight them so that the sum stays."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

ROUNDS = 3
"""Rounds that find which terms are kept for certain. More change nothing that can be measured."""
FLOOR = 1e-6
"""Score that every term has, relative to the mean, so that none is left out for ever."""


def keep_probability(scores: Float[Tensor, " n"], count: int) -> Float[Tensor, " n"]:
    """Compute the probability min(1, c * score) with which each term is kept, for `count` terms in the mean.

    Of all probabilities with that mean, these give the weighted sum the least variance if scores are the terms' sizes.

    Args:
        scores: sizes of the terms, at least 0.
        count: terms to keep, less than n.

    Of three small terms and a large one, the large one is kept for certain:

    >>> keep_probability(torch.tensor([1.0, 1.0, 1.0, 9.0]), count=2)
    tensor([0.3333, 0.3333, 0.3333, 1.0000])
    """
    tiny = torch.finfo(scores.dtype).tiny
    scores = scores + FLOOR * scores.mean() + tiny
    factor = count / scores.sum()
    for _ in range(ROUNDS):
        is_certain = scores * factor >= 1
        others = scores.masked_fill(is_certain, 0).sum()
        factor = torch.where(others > 0, (count - is_certain.sum()).clamp_min(1) / others.clamp_min(tiny), factor)
    return (scores * factor).clamp_max(1)


def draw_kept(
    probability: Float[Tensor, " n"], count: int, generator: torch.Generator | None = None
) -> tuple[Int64[Tensor, " count"], Float[Tensor, " count"]]:
    """Draw which terms are kept, by systematic sampling.

    Args:
        probability: probability of each term, whose sum is about `count`.
        count: terms to keep.
        generator: source of randomness.

    Returns:
        Indices in rising order, and weights: the weighted sum of the kept terms has the sum of all terms as its mean.

    >>> draw_kept(torch.tensor([0.0, 1.0, 1.0]), count=2)
    (tensor([1, 2]), tensor([1., 1.]))
    """
    ends = probability.cumsum(0)
    spacing = ends[-1] / count
    offset = torch.rand(1, generator=generator, device=ends.device, dtype=ends.dtype)
    place = (torch.arange(count, device=ends.device) + offset) * spacing
    index = torch.searchsorted(ends, place, right=True).clamp_max(len(ends) - 1)
    return index, spacing / probability[index]
