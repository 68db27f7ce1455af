"""A pool of Langevin chains that follows the importance Q (section 3.3)."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

SPARE = 64
"""Starts that are drawn for chains that leave, at least."""


class Pool(NamedTuple):
    """Positions of the chains. A chain lives on one of several charts: images of a data set, say, or one square.

    Two chains in the unit square, whose places were drawn uniformly:

    >>> pool = Pool(chart=torch.tensor([0, 0]), position=torch.rand(2, 2), density=torch.ones(2))
    >>> pool.position.shape
    torch.Size([2, 2])
    """

    chart: Int64[Tensor, " n"]
    """The chart that each chain lives on."""
    position: Float[Tensor, "n d"]
    """Where it is there, in the unit of the caller (pixels, for images)."""
    density: Float[Tensor, " n"]
    """Density p / u that a chain was drawn with, where it has not moved since; NaN where it follows Q."""


@runtime_checkable
class Domain(Protocol):
    """Where chains may be, and how new ones are drawn.

    >>> class Cube:
    ...     def contains(self, pool):
    ...         return ((pool.position >= 0) & (pool.position <= 1)).all(dim=-1)
    ...
    ...     def propose(self, count):
    ...         return Pool(torch.zeros(count, dtype=torch.int64), torch.rand(count, 3), torch.ones(count))
    >>> isinstance(Cube(), Domain)
    True
    """

    def contains(self, pool: Pool) -> Bool[Tensor, " n"]:
        """Whether each chain is on its chart; false for positions that are not finite."""
        ...

    def propose(self, count: int) -> Pool:
        """Draw the starts of re-initialised chains, with their densities."""
        ...


class Info(NamedTuple):
    """What happened to the chains in a step; to look at only."""

    left: Bool[Tensor, " n"]
    """Chains that left the domain."""
    low: Bool[Tensor, " n"]
    """Chains that were re-initialised for their low importance."""


def grad_log_importance(
    gradient: Float[Tensor, "n d"], loss_gradient: Float[Tensor, " n"], weighted_error: Float[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """Drift direction of eq. 10 from the backward pass of the training loss.

    The training loss holds a weighted squared error for each sample, w e^2. Its gradient with respect to the sample's
    position is that of the error times w and whatever the loss is multiplied by: the mean over the batch, a loss scale.
    `loss_gradient` measures the latter, so neither counts here. Half of the gradient of log e^2 is returned: that is
    the gradient of log Q for one channel, and for several that of the logarithm of the L2 norm instead of the L1 norm
    of the error. One backward pass can give only one of the two.

    Args:
        gradient: of the training loss with respect to the positions.
        loss_gradient: of the training loss with respect to each weighted error.
        weighted_error: the squared error of each sample times its weight.

    Returns:
        The gradient, per unit of the positions. Not finite where the error is zero.

    The error e = x1 x2, so that log |e| has the gradient (1 / x1, 1 / x2):

    >>> x = torch.tensor([[2.0, 4.0]], requires_grad=True)
    >>> weighted_error = 0.3 * x.prod(dim=-1).square()
    >>> weighted_error.retain_grad()
    >>> (1024 * weighted_error.mean()).backward()
    >>> grad_log_importance(x.grad, weighted_error.grad, weighted_error.detach())
    tensor([[0.5000, 0.2500]])
    """
    return gradient / (2 * loss_gradient * weighted_error)[:, None]


def lowest(importance: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """Mark the given share of the chains: those of the lowest importance.

    >>> lowest(torch.tensor([0.3, 0.1, 0.2, 0.4]), share=0.25)
    tensor([False,  True, False, False])
    """
    mark = torch.zeros_like(importance, dtype=torch.bool)
    return mark.index_fill_(
        0, importance.topk(round(share * len(importance)), largest=False, sorted=False).indices, True
    )


def step(
    pool: Pool,
    grad_log_q: Float[Tensor, "n d"],
    importance: Float[Tensor, " n"],
    domain: Domain,
    *,
    drift: Float[Tensor, "n k"] | float,
    noise: Float[Tensor, "n k"] | float,
    reinit_share: float,
    generator: torch.Generator | None = None,
) -> tuple[Pool, Info]:
    """Move every chain by x + a grad log Q(x) + b eta (eq. 10), then re-initialise those that left or have low Q.

    O(n), no host synchronisation. Starts are drawn for the chains of low Q and for a sixteenth of all, which may leave;
    when more than that leave at once, some share a start.

    Args:
        pool: the chains.
        grad_log_q: the gradient of log Q at each chain, per unit of the positions.
        importance: Q at each chain, before the move.
        domain: where chains may be, and how new ones are drawn.
        drift: a, in squared units of the positions; for all, each chain [n, 1] or each of its coordinates [n, d].
        noise: b, in units of the positions: the standard deviation of one step; likewise.
        reinit_share: share of the chains, those of the lowest importance, that start anew.
        generator: source of randomness on the pool's device; torch's own if None.

    The half line x > 0, with new chains at 5. Of three chains one moves, one leaves, and one has the lowest importance:

    >>> class HalfLine:
    ...     def contains(self, pool):
    ...         return (pool.position > 0).all(dim=-1)
    ...
    ...     def propose(self, count):
    ...         return Pool(torch.zeros(count, dtype=torch.int64), torch.full((count, 1), 5.0), torch.ones(count))
    >>> pool = Pool(torch.zeros(3, dtype=torch.int64), torch.tensor([[1.0], [1.0], [1.0]]), torch.ones(3))
    >>> gradient, importance = torch.tensor([[10.0], [-20.0], [10.0]]), torch.tensor([0.3, 0.3, 0.1])
    >>> moved, info = step(pool, gradient, importance, HalfLine(), drift=0.1, noise=0.0, reinit_share=1 / 3)
    >>> moved.position.flatten(), moved.density
    (tensor([2., 5., 5.]), tensor([nan, 1., 1.]))
    >>> info.left, info.low
    (tensor([False,  True, False]), tensor([False, False,  True]))
    """
    count = len(importance)
    eta = torch.empty_like(pool.position).normal_(generator=generator)
    moved = Pool(pool.chart, pool.position + drift * grad_log_q + noise * eta, torch.full_like(pool.density, torch.nan))
    info = Info(left=~domain.contains(moved), low=lowest(importance, reinit_share))
    anew = info.left | info.low
    starts = domain.propose(min(count, round(reinit_share * count) + max(SPARE, count // 16)))
    place = (anew.cumsum(0) - 1) % len(starts.chart)
    return select(anew, Pool(*(part[place] for part in starts)), moved), info


def select(condition: Bool[Tensor, " n"] | Bool[Tensor, ""], chosen: Pool, other: Pool) -> Pool:
    """Take each chain from `chosen` where the condition holds, else from `other`.

    >>> a = Pool(torch.tensor([0, 0]), torch.tensor([[0.1], [0.2]]), torch.ones(2))
    >>> b = Pool(torch.tensor([1, 1]), torch.tensor([[0.3], [0.4]]), torch.ones(2))
    >>> select(torch.tensor([True, False]), a, b).chart
    tensor([0, 1])
    """
    return Pool(
        torch.where(condition, chosen.chart, other.chart),
        torch.where(condition[..., None], chosen.position, other.position),
        torch.where(condition, chosen.density, other.density),
    )
