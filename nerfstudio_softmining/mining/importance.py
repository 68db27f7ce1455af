"""Error, importance and weight of a training sample (section 3.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MIN_DENSITY_RATIO = 1e-6
"""Density ratios are raised to at least this, so that a sample without any error has a finite weight."""


def squared_error(prediction: Float[Tensor, "n c"], truth: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Compute the error to minimise (eq. 7), as the mean over channels. Its mean over samples is the usual MSE.

    >>> squared_error(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    return (prediction - truth).square().mean(dim=-1)


def absolute_error(prediction: Float[Tensor, "n c"], truth: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Compute the error that models with an L1 loss minimise, as the mean over channels.

    >>> absolute_error(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    return (prediction - truth).abs().mean(dim=-1)


def l1_importance(prediction: Float[Tensor, "n c"], truth: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Compute the importance Q: the L1 error, as the mean over channels, detached (eq. 6 and 8).

    >>> l1_importance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    return absolute_error(prediction, truth).detach()


def warmed_up(alpha: float, step: int, warmup: int) -> float:
    """Return the softness at a step: linear from 0 at step 0 to `alpha` at step `warmup` (end of section 3.3).

    >>> warmed_up(0.6, step=500, warmup=1000)
    0.3
    """
    return alpha * min(step / warmup, 1.0) if warmup > 0 else alpha


def density_ratio(importance: Float[Tensor, " n"], mean_importance: Float[Tensor, ""]) -> Float[Tensor, " n"]:
    """Compute the density p / u of samples drawn in proportion to the importance, with uniform draws u.

    Args:
        importance: Q of each sample.
        mean_importance: mean of Q under uniform draws, so that p integrates to one.

    >>> density_ratio(torch.tensor([0.1, 0.4]), torch.tensor(0.2))
    tensor([0.5000, 2.0000])
    """
    return importance / mean_importance.clamp_min(torch.finfo(mean_importance.dtype).tiny)


def soft_weights(density_ratio: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    """Compute the weight (u / p)^alpha of each sample's error (eq. 9).

    With p proportional to Q this is the paper's 1 / Q^alpha, times the mean importance to the power of alpha. That
    factor keeps the reconstruction loss on the scale of a model's other losses while Q shrinks. Samples of uniform
    error have weight 1.

    Args:
        density_ratio: p / u of each sample.
        alpha: the softness, in [0, 1]: 0 is hard mining, 1 is importance sampling (an unbiased uniform loss).

    >>> soft_weights(torch.tensor([0.25, 1.0, 4.0]), alpha=0.5)
    tensor([2.0000, 1.0000, 0.5000])
    """
    return density_ratio.clamp_min(MIN_DENSITY_RATIO).pow(-alpha)


def effective_sample_size(weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Compute how many samples of equal weight are worth as much as these weighted ones, (sum w)^2 / sum w^2 (Kish).

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    tensor(3.)
    """
    return weights.sum().square() / weights.square().sum()
