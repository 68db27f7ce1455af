"""Langevin chains that follow the importance Q (section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nerfstudio_softmining.mining.records import take, where

MIN_SPARE_STARTS = 64
"""Least number of starts drawn for chains that leave the domain."""


class ChainState(NamedTuple):
    """Chains, each on one part of the domain: an image of a data set, say, or the only part there is."""

    image_index: Int64[Tensor, " n"]
    """Image that each chain is on."""
    position: Float[Tensor, "n d"]
    """Position there, in the unit of the caller (pixels, for images)."""
    density_ratio: Float[Tensor, " n"]
    """Density p / u that a chain was started with."""
    follows_importance: Bool[Tensor, " n"]
    """Whether the chain has moved since, so that its density is that of Q and `density_ratio` is out of date."""


def start(
    image_index: Int64[Tensor, " n"], position: Float[Tensor, "n d"], density_ratio: Float[Tensor, " n"]
) -> ChainState:
    """Return chains that have not moved yet.

    Two chains in the unit square, drawn uniformly:

    >>> chains = start(torch.tensor([0, 0]), torch.rand(2, 2), torch.ones(2))
    >>> chains.follows_importance
    tensor([False, False])
    """
    return ChainState(image_index, position, density_ratio, torch.zeros_like(density_ratio, dtype=torch.bool))


@runtime_checkable
class Domain(Protocol):
    """Where chains may be, and how new ones are drawn.

    >>> class Cube:
    ...     def contains(self, chains):
    ...         return ((chains.position >= 0) & (chains.position <= 1)).all(dim=-1)
    ...
    ...     def propose(self, count):
    ...         return start(torch.zeros(count, dtype=torch.int64), torch.rand(count, 3), torch.ones(count))
    >>> isinstance(Cube(), Domain)
    True
    """

    def contains(self, chains: ChainState) -> Bool[Tensor, " n"]:
        """Return whether each chain is in the domain; false for positions that are not finite."""
        ...

    def propose(self, count: int) -> ChainState:
        """Draw the starts of re-initialised chains from a proposal of known density."""
        ...


class Info(NamedTuple):
    """What happened to the chains in a step; to look at only."""

    is_outside: Bool[Tensor, " n"]
    """Chains that left the domain."""
    is_lowest: Bool[Tensor, " n"]
    """Chains re-initialised for their low importance."""


def grad_log_importance(
    gradient: Float[Tensor, "n d"],
    loss_gradient: Float[Tensor, " n"],
    weighted_error: Float[Tensor, " n"],
    error_power: int = 2,
) -> Float[Tensor, "n d"]:
    """Compute the drift direction of eq. 10 from the backward pass of the training loss.

    The training loss holds a weighted squared error w e^2 for each sample, or an absolute one. Its gradient with
    respect to a position is that of e^2, times w and times whatever multiplies the loss: the mean over the batch, a
    loss scale. `loss_gradient` measures the latter, so that neither counts here.

    Args:
        gradient: of the training loss with respect to the positions.
        loss_gradient: of the training loss with respect to each weighted error.
        weighted_error: the error of each sample times its weight.
        error_power: 2 if that error is squared, 1 if it is absolute.

    Returns:
        The gradient of log |e|, per unit of the positions; not finite where the error is zero. For one channel
        this is the gradient of log Q. For several it is that of the logarithm of the L2 norm, not the L1 norm, of the
        error: one backward pass can give only one of the two.

    The error e = x1 x2, so that log |e| has the gradient (1 / x1, 1 / x2):

    >>> x = torch.tensor([[2.0, 4.0]], requires_grad=True)
    >>> weighted_error = 0.3 * x.prod(dim=-1).square()
    >>> weighted_error.retain_grad()
    >>> (1024 * weighted_error.mean()).backward()
    >>> grad_log_importance(x.grad, weighted_error.grad, weighted_error.detach())
    tensor([[0.5000, 0.2500]])
    """
    return gradient / (error_power * loss_gradient * weighted_error)[:, None]


def lowest(importance: Float[Tensor, " n"], fraction: float) -> Bool[Tensor, " n"]:
    """Mark the given fraction of the chains, those of the lowest importance.

    >>> lowest(torch.tensor([0.3, 0.1, 0.2, 0.4]), fraction=0.25)
    tensor([False,  True, False, False])
    """
    mark = torch.zeros_like(importance, dtype=torch.bool)
    return mark.index_fill_(
        0, importance.topk(round(fraction * len(importance)), largest=False, sorted=False).indices, True
    )


def step(
    chains: ChainState,
    grad_log_q: Float[Tensor, "n d"],
    importance: Float[Tensor, " n"],
    domain: Domain,
    *,
    drift: Float[Tensor, "n k"] | float,
    noise: Float[Tensor, "n k"] | float,
    reinit_fraction: float,
    generator: torch.Generator | None = None,
    wrap: Callable[[ChainState], ChainState] | None = None,
) -> tuple[ChainState, Info]:
    """Move every chain by x + a grad log Q(x) + b eta (eq. 10), then re-initialise those that left or have low Q.

    O(n), without host synchronisation. Starts are drawn for the chains of low Q, and for a sixteenth of all chains,
    which may leave. Where more than that leave at once, some share a start.

    Args:
        chains: the chains.
        grad_log_q: gradient of log Q at each chain, per unit of the positions.
        importance: Q at each chain, before the move.
        domain: where chains may be, and how new ones are drawn.
        drift: a, in squared units of the positions; for all chains, each of them [n, 1] or each coordinate [n, d].
        noise: b, in units of the positions: the standard deviation of one step; likewise.
        reinit_fraction: fraction of the chains, those of the lowest importance, to re-initialise.
        generator: source of randomness on the chains' device; torch's own if None.
        wrap: brings chains that have left a closed domain, such as a panorama, back in at the other side.

    The half line x > 0, with new chains at 5. Of three chains one moves, one leaves, and one has the lowest importance:

    >>> class HalfLine:
    ...     def contains(self, chains):
    ...         return (chains.position > 0).all(dim=-1)
    ...
    ...     def propose(self, count):
    ...         return start(torch.zeros(count, dtype=torch.int64), torch.full((count, 1), 5.0), torch.ones(count))
    >>> chains = start(torch.zeros(3, dtype=torch.int64), torch.ones(3, 1), torch.ones(3))
    >>> gradient, importance = torch.tensor([[10.0], [-20.0], [10.0]]), torch.tensor([0.3, 0.3, 0.1])
    >>> moved, info = step(chains, gradient, importance, HalfLine(), drift=0.1, noise=0.0, reinit_fraction=1 / 3)
    >>> moved.position.flatten(), moved.follows_importance
    (tensor([2., 5., 5.]), tensor([ True, False, False]))
    >>> info.is_outside, info.is_lowest
    (tensor([False,  True, False]), tensor([False, False,  True]))
    """
    count = len(importance)
    eta = torch.empty_like(chains.position).normal_(generator=generator)
    moved = chains._replace(
        position=chains.position + drift * grad_log_q + noise * eta,
        follows_importance=torch.ones_like(chains.follows_importance),
    )
    moved = moved if wrap is None else wrap(moved)
    info = Info(is_outside=~domain.contains(moved), is_lowest=lowest(importance, reinit_fraction))
    is_restarted = info.is_outside | info.is_lowest
    starts = domain.propose(min(count, round(reinit_fraction * count) + max(MIN_SPARE_STARTS, count // 16)))
    place = (is_restarted.cumsum(0) - 1) % len(starts.image_index)
    return where(is_restarted, take(starts, place), moved), info
