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
    """Mean squared or absolute error, weighted by soft mining while a mining batch is set (eq. 9).

    Takes the place of a model's reconstruction loss, so that a random background is drawn once, by the model itself.

    A model of several stages computes it once for each, the finest last. All of these losses are weighted. Importance,
    error and pixel gradient are those of the last one.

    Args:
        alpha: the softness, in [0, 1].
        weight_by: what samples are weighted by.
        error_power: 2 for the squared error, 1 for the absolute one.
        num_losses: how many losses the model computes from a batch.
    """

    def __init__(self, alpha: float, weight_by: WeightBy, error_power: int = 2, num_losses: int = 1) -> None:
        super().__init__()
        self.alpha, self.weight_by, self.error_power, self.num_losses = alpha, weight_by, error_power, num_losses
        self.num_computed = 0
        """Losses that have been computed from the batch."""
        self._batch: MiningBatch | None = None

    @property
    def batch(self) -> MiningBatch | None:
        """The mining batch that losses are computed from; None where they are not weighted."""
        return self._batch

    @batch.setter
    def batch(self, batch: MiningBatch | None) -> None:
        self._batch, self.num_computed = batch, 0

    def forward(self, truth: Tensor, prediction: Tensor) -> Tensor:
        """Compute the loss of colours [rays, channels] against the truth."""
        if self._batch is None:
            unweighted = nn.functional.mse_loss if self.error_power == 2 else nn.functional.l1_loss
            return unweighted(prediction, truth)
        self.num_computed += 1
        prediction, truth, batch = prediction.float(), truth.float(), self._batch
        if self.num_computed < self.num_losses:
            truth = truth.detach()  # it may carry the pixel gradient, which is that of the last loss
        importance = imp.l1_importance(prediction, truth)
        squared = imp.squared_error(prediction, truth)
        error = squared if self.error_power == 2 else imp.absolute_error(prediction, truth)
        if batch.importance_weighted:
            batch.weights = self.weights(self._density_ratio(batch, importance), self.alpha_at(batch))
            error = batch.weights * error
        batch.importance, batch.error, batch.weighted_error = importance, squared, error
        batch.error_power = self.error_power
        if batch.coords is not None and error.requires_grad:
            error.retain_grad()
        return error.mean()

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
