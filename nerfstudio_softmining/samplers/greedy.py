"""Greedy selection of the largest errors (INT).

Zhang et al., "Nonparametric Teaching of Implicit Neural Representations", ICML 2024, whose batches are whole
selections; here a batch is drawn from the selection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerfstudio_softmining.samplers.base import SamplerConfig
from nerfstudio_softmining.samplers.images import PixelSamples
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.samplers.residual import ResidualSampler
from nerfstudio_softmining.settings import PositiveCount, PositiveFraction


@dataclass
class GreedyConfig(SamplerConfig):
    """Settings of the sampler greedy."""

    importance_weighted: bool = False
    """Weight rays by their density (eq. 9); the original does not."""
    fraction: PositiveFraction = 0.2
    """Fraction of all pixels that is selected, in (0, 1]."""
    interval: PositiveCount = 100
    """Steps between two selections."""
    side: PositiveCount = 1
    """Side in pixels of the cells of which one pixel each is evaluated; 1 evaluates all."""


@register
class Greedy(ResidualSampler[GreedyConfig]):
    """Draw from the pixels of the largest error alone, until the next selection (INT)."""

    config_class = GreedyConfig

    def interval(self, step: int) -> int:
        return self.config.interval

    def evaluate(self, residual: Tensor) -> Tensor:
        error = residual.square().sum(dim=-1).flatten()
        return error.topk(max(1, round(self.config.fraction * len(error))), sorted=False).indices

    def choose(self, values: Tensor, count: int) -> PixelSamples:
        chosen = torch.randint(len(values), (count,), generator=self.context.generator, device=values.device)
        samples, num_valid = self.grid.draw_within(values[chosen])
        return samples._replace(density_ratio=self.images.density_ratio(1 / (len(values) * num_valid), samples))
