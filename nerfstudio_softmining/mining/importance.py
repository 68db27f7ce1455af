"""Error, importance and weight of a training sample (section 3.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_DENSITY = 1e-6
"""Relative densities are raised to at least this, so that a sample without any error has a finite weight."""


def squared_error(prediction: Float[Tensor, "n c"], truth: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """The error that is minimised (eq. 7), as the mean over channels: the mean over samples is the usual MSE.

    >>> squared_error(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    return (prediction - truth).square().mean(dim=-1)


def l1_importance(prediction: Float[Tensor, "n c"], truth: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """The importance Q: the L1 error, as the mean over channels, cut off from the gradient (eq. 6 and 8).

    >>> l1_importance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    return (prediction - truth).detach().abs().mean(dim=-1)


def warmed_up(alpha: float, step: int, warmup: int) -> float:
    """The softness at a training step: from 0 at step 0 linearly to `alpha` at step `warmup` (end of section 3.3).

    >>> warmed_up(0.6, step=500, warmup=1000)
    0.3
    """
    return alpha * min(step / warmup, 1.0) if warmup > 0 else alpha


def relative_density(importance: Float[Tensor, " n"], mean_importance: Float[Tensor, ""]) -> Float[Tensor, " n"]:
    """Density p / u of samples drawn in proportion to the importance, relative to uniform draws u.

    Args:
        importance: Q of each sample.
        mean_importance: the mean of Q under uniform draws, which makes the integral of p one.

    >>> relative_density(torch.tensor([0.1, 0.4]), torch.tensor(0.2))
    tensor([0.5000, 2.0000])
    """
    return importance / mean_importance.clamp_min(torch.finfo(mean_importance.dtype).tiny)


def soft_weights(density: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    """Weight (u / p)^alpha of each sample's error (eq. 9).

    With p in proportion to Q this is the paper's 1 / Q^alpha times a factor that all samples of a batch share, the mean
    importance to the power of alpha. The factor keeps the reconstruction loss on the scale of the other losses of a
    model while Q shrinks; samples of uniform error have weight 1.

    Args:
        density: p / u of each sample.
        alpha: the softness, in [0, 1]: 0 is hard mining, 1 is importance sampling (an unbiased uniform loss).

    >>> soft_weights(torch.tensor([0.25, 1.0, 4.0]), alpha=0.5)
    tensor([2.0000, 1.0000, 0.5000])
    """
    return density.clamp_min(SMALLEST_DENSITY).pow(-alpha)
