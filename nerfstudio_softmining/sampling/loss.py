"""The reconstruction loss of soft mining."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nerfstudio_softmining.mining import importance as imp
from nerfstudio_softmining.sampling.feedback import MiningBatch

WeightBy = Literal["density", "importance"]
"""Weigh a sample by the density it was drawn with, which is Q only for the chains, or any sample by its Q."""


class SoftMinedLoss(nn.Module):
    """Mean squared error, weighted by soft mining while a mining batch is at hand (eq. 9).

    Takes the place of a model's reconstruction loss, so that a random background is drawn once, by the model itself.

    Args:
        alpha: the softness.
        weight_by: what samples are weighed by.
    """

    def __init__(self, alpha: float, weight_by: WeightBy) -> None:
        super().__init__()
        self.alpha, self.weight_by = alpha, weight_by
        self.batch: MiningBatch | None = None

    def forward(self, truth: Tensor, prediction: Tensor) -> Tensor:
        """Loss of colours [rays, channels] against the truth."""
        if self.batch is None:
            return nn.functional.mse_loss(prediction, truth)
        prediction, truth = prediction.float(), truth.float()
        batch = self.batch
        batch.importance = imp.l1_importance(prediction, truth)
        batch.error = imp.squared_error(prediction, truth)
        if batch.reweighted:
            alpha = imp.warmed_up(self.alpha, batch.step, batch.alpha_warmup)
            batch.weighted_error = imp.soft_weights(self._density(batch, batch.importance), alpha) * batch.error
        else:
            batch.weighted_error = batch.error
        if batch.coords is not None and batch.weighted_error.requires_grad:
            batch.weighted_error.retain_grad()
        return batch.weighted_error.mean()

    def _density(self, batch: MiningBatch, importance: Tensor) -> Tensor:
        """Density p / u of each ray; for those that follow Q it is their importance over the mean of uniform rays."""
        known = batch.density.to(importance.device)
        uniform = importance[len(importance) - batch.num_uniform :]
        reference = (uniform if batch.num_uniform else importance).mean()
        estimated = imp.relative_density(importance, reference)
        return estimated if self.weight_by == "importance" else torch.where(known.isnan(), estimated, known)
