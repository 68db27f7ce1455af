"""The reconstruction loss of soft mining."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nerfstudio_softmining.mining import importance as imp
from nerfstudio_softmining.samplers.base import MiningBatch

WeightBy = Literal["density", "importance"]
"""Weight a sample by the density it was drawn with, which is Q only for the chains, or any sample by its Q."""


class SoftMinedLoss(nn.Module):
    """Mean squared error, weighted by soft mining while a mining batch is set (eq. 9).

    Takes the place of a model's reconstruction loss, so that a random background is drawn once, by the model itself.

    Args:
        alpha: the softness, in [0, 1].
        weight_by: what samples are weighted by.
    """

    def __init__(self, alpha: float, weight_by: WeightBy) -> None:
        super().__init__()
        self.alpha, self.weight_by = alpha, weight_by
        self.batch: MiningBatch | None = None

    def forward(self, truth: Tensor, prediction: Tensor) -> Tensor:
        """Compute the loss of colours [rays, channels] against the truth."""
        if self.batch is None:
            return nn.functional.mse_loss(prediction, truth)
        prediction, truth = prediction.float(), truth.float()
        batch = self.batch
        batch.importance = imp.l1_importance(prediction, truth)
        batch.error = imp.squared_error(prediction, truth)
        if batch.importance_weighted:
            batch.weights = self.weights(self._density_ratio(batch, batch.importance), self.alpha_at(batch))
            batch.weighted_error = batch.weights * batch.error
        else:
            batch.weighted_error = batch.error
        if batch.coords is not None and batch.weighted_error.requires_grad:
            batch.weighted_error.retain_grad()
        return batch.weighted_error.mean()

    def alpha_at(self, batch: MiningBatch) -> float:
        """Return the softness at the step of a batch."""
        return imp.warmed_up(self.alpha, batch.step, batch.alpha_warmup)

    def weights(self, density_ratio: Tensor, alpha: float) -> Tensor:
        """Compute the weight of each sample [rays] from its density p / u."""
        return imp.soft_weights(density_ratio, alpha)

    def _density_ratio(self, batch: MiningBatch, importance: Tensor) -> Tensor:
        """Return the density p / u of each ray; where it follows Q, its importance over the mean of uniform rays."""
        if batch.follows_importance is None and self.weight_by == "density":
            return batch.density_ratio.to(importance.device)
        uniform = importance[len(importance) - batch.num_uniform :]
        reference = (uniform if batch.num_uniform else importance).mean()
        estimated = imp.density_ratio(importance, reference)
        if self.weight_by == "importance":
            return estimated
        assert batch.follows_importance is not None
        follows_importance = batch.follows_importance.to(importance.device)
        return torch.where(follows_importance, estimated, batch.density_ratio.to(importance.device))
