"""What the samplers share that evaluate the residual of a whole photograph now and then."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nerfstudio_softmining.samplers.base import Config, Sampler, SamplerContext, Samples
from nerfstudio_softmining.samplers.cells import Grid
from nerfstudio_softmining.samplers.images import PixelSamples, TrainingImages


class ResidualState(NamedTuple):
    """What the last evaluation gave."""

    steps: int
    """Batches drawn."""
    next_evaluation: int
    """Number of batches after which the residual is evaluated again."""
    values: Tensor | None
    """What is kept of the residuals; None before the first evaluation."""


class ResidualSampler(Sampler[Config, ResidualState]):
    """A sampler that keeps numbers from the residuals of the first pixel of each cell."""

    state_class = ResidualState
    needs_residual: ClassVar[bool] = True

    def __init__(self, config: Config, context: SamplerContext, images: TrainingImages) -> None:
        super().__init__(config, context, images)
        self.grid = Grid.with_cell_size(images, getattr(config, "side", 1))

    def init(self, previous: ResidualState | None = None) -> ResidualState:
        return ResidualState(0, 0, None)

    def draw(self, state: ResidualState, count: int) -> tuple[Samples, ResidualState]:
        if state.steps == state.next_evaluation:
            first = self.grid.first_pixels(torch.arange(self.grid.num_cells, device=self.images.device))
            assert self.context.residual is not None
            residual = self.context.residual(first)
            values = self.evaluate(residual.view(*self.grid.shapes[0], -1)).flatten()
            state = state._replace(next_evaluation=state.steps + self.interval(state.steps), values=values)
        assert state.values is not None
        return Samples(self.choose(state.values, count), 0), state._replace(steps=state.steps + 1)

    def interval(self, step: int) -> int:
        """Return the steps until the next evaluation."""
        raise NotImplementedError

    def evaluate(self, residual: Float[Tensor, "h w c"]) -> Tensor:
        """Return what is kept of the residuals."""
        raise NotImplementedError

    def choose(self, values: Tensor, count: int) -> PixelSamples:
        """Draw pixels by what is kept."""
        raise NotImplementedError
