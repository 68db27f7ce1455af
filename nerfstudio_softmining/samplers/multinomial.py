"""The exact density over all training pixels, re-evaluated now and then: the upper bound of the paper's figure 8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int32
from rich.progress import track
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.samplers.base import DensitySampler, SamplerConfig, SamplerContext, Samples
from nerfstudio_softmining.samplers.cells import Grid, PixelDensity
from nerfstudio_softmining.samplers.images import TrainingImages
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.settings import Fraction, PositiveCount

CHUNK = 1 << 18
"""Cells evaluated between two ticks of the progress bar."""


@dataclass
class MultinomialConfig(SamplerConfig):
    """Settings of the sampler multinomial."""

    refresh: PositiveCount = 500
    """Steps between two evaluations of all training pixels; 1 is the paper's upper bound."""
    side: PositiveCount = 1
    """Side in pixels of the cells of which one pixel each is evaluated; 1 evaluates all."""
    uniform_fraction: Fraction = 0.1
    """Fraction of each batch that is drawn uniformly over all images, in [0, 1]."""


class MultinomialState(NamedTuple):
    """The importance of all cells at the last evaluation."""

    steps: int
    """Batches drawn."""
    weights: Int32[Tensor, " cells"] | None
    """Importance of each cell, up to a factor; None before the first evaluation."""
    density: PixelDensity | None
    """Density proportional to the weights; None where all are 0."""


@register
class Multinomial(DensitySampler[MultinomialConfig, MultinomialState]):
    """Draw by the exact error of all pixels, rendered now and then; slow (the paper's upper bound).

    Takes 4.3 bytes a pixel, less by side^2. An evaluation costs as much as rendering all training images.
    """

    config_class = MultinomialConfig
    state_class = MultinomialState

    def __init__(self, config: MultinomialConfig, context: SamplerContext, images: TrainingImages) -> None:
        super().__init__(config, context, images)
        self.grid = Grid.with_cell_size(images, config.side)

    def init(self, previous: MultinomialState | None = None) -> MultinomialState:
        return MultinomialState(0 if previous is None else previous.steps, None, None)

    def rebuild(self, state: MultinomialState) -> MultinomialState:
        if state.weights is None or len(state.weights) != self.grid.num_cells:  # of a checkpoint with another side
            return state._replace(weights=None, density=None)
        return state._replace(density=PixelDensity.from_cells(self.grid, state.weights))

    def draw(self, state: MultinomialState, count: int) -> tuple[Samples, MultinomialState]:
        if state.weights is None or state.steps % self.config.refresh == 0:
            state = self.rebuild(state._replace(weights=self._evaluate()))
        return super().draw(state._replace(steps=state.steps + 1), count)

    @torch.no_grad()
    def _evaluate(self) -> Int32[Tensor, " cells"]:
        """Evaluate the importance of one pixel in each cell."""
        assert self.context.importance is not None
        grid, images = self.grid, self.images
        importance = torch.zeros(grid.num_cells, device=images.device)
        starts = range(0, grid.num_cells, CHUNK)
        for start in track(starts, "Evaluating all training pixels", transient=True, disable=len(starts) < 2):
            cells = torch.arange(start, min(start + CHUNK, grid.num_cells), device=images.device)
            num_valid = grid.num_valid(cells)
            cells, num_valid = cells[num_valid > 0], num_valid[num_valid > 0]
            samples, _ = grid.draw_within(cells)
            q = self.context.importance(samples.indices).to(images.device).nan_to_num(0.0, 0.0, 0.0)
            weight = images.integer_weight(images.cache_index[samples.image_index], samples.pixels)
            importance[cells] = q * num_valid * weight
        scaled = importance / importance.max().clamp_min(torch.finfo(torch.float32).tiny) * dens.LARGEST
        return scaled.round().to(torch.int32)
