"""Evolution of the selected pixels (EVOS).

Zhang et al., "EVOS: Efficient Implicit Neural Training via EVOlutionary Selector", CVPR 2025.

Sparse fitness evaluation: the fitness of all pixels is found anew at intervals that shrink linearly. Frequency-guided
crossover: fitness is the squared error plus that of the Laplacian, here each over its mean. Unbiased mutation: a
fraction of the batch is random. The paper's candidates are all pixels and its batches half of them; here both are
smaller by the same factor. Its additional loss on the Laplacian of early steps is no matter of sampling, and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from nerfstudio_softmining.mining.records import take
from nerfstudio_softmining.samplers.base import SamplerConfig
from nerfstudio_softmining.samplers.images import PixelSamples
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.samplers.residual import ResidualSampler
from nerfstudio_softmining.settings import Fraction, Interval, PositiveCount

EPSILON = 1e-30
"""Keeps errors of zero from being divided by."""


@dataclass
class EvosConfig(SamplerConfig):
    """Settings of the sampler evos."""

    importance_weighted: bool = False
    """Has no effect: the density of what is selected is not known."""
    first_interval: PositiveCount = 100
    """Steps between two evaluations of the fitness at the start."""
    last_interval: PositiveCount = 50
    """Steps between two evaluations of the fitness at the end; linear in between."""
    selected_fraction: Annotated[float, Interval(0.01, 1)] = 0.5
    """Fraction of the candidates that make up a batch, in [0.01, 1]."""
    mutated_fraction: Fraction = 0.5
    """Fraction of a batch that is drawn from the candidates that are not the fittest, in [0, 1]."""
    side: PositiveCount = 1
    """Side in pixels of the cells of which one pixel each is evaluated; 1 evaluates all."""


@register
class Evos(ResidualSampler[EvosConfig]):
    """Keep the fittest of uniform candidates, and some others at random (EVOS)."""

    config_class = EvosConfig

    def interval(self, step: int) -> int:
        first, last = self.config.first_interval, self.config.last_interval
        return max(1, int(first + (last - first) * min(1.0, step / self.context.num_iterations)))

    def evaluate(self, residual: Tensor) -> Tensor:
        padded = F.pad(residual.permute(2, 0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
        kernel = residual.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        laplacian = F.conv2d(padded, kernel[None, None])[:, 0].permute(1, 2, 0)
        errors = (part.square().mean(dim=-1) for part in (residual, laplacian))
        return sum((error / error.mean().clamp_min(EPSILON) for error in errors), residual.new_zeros(()))

    def choose(self, values: Tensor, count: int) -> PixelSamples:
        candidates = self.images.uniform(round(count / self.config.selected_fraction))
        order = values[self.grid.cell(candidates)].argsort(descending=True)
        num_mutated = min(round(self.config.mutated_fraction * count), len(order) - 1)
        fittest, rest = order[: count - num_mutated], order[count - num_mutated :]
        chance = torch.rand(len(rest), generator=self.context.generator, device=rest.device)
        return take(candidates, torch.cat((fittest, rest[chance.argsort()[:num_mutated]])))
