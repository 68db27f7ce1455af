"""Error maps: a coarse grid of the error of each image, rebuilt at growing intervals, as in instant-ngp.

Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", SIGGRAPH 2022, and its
released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import error_map
from nerfstudio_softmining.samplers.base import DensitySampler, MiningBatch, SamplerConfig, pixel_centres
from nerfstudio_softmining.samplers.cells import Grid, PixelDensity
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.settings import PositiveCount

INTERVAL_GROWTH = 1.5
"""Factor from one interval to the next."""
MAX_CELL_SIZE = 32
"""Side in pixels of a cell where there are masks, at most: all pixels of a drawn cell are tested there."""


@dataclass
class ErrorMapConfig(SamplerConfig):
    """Settings of the sampler error-map."""

    importance_weighted: bool = False
    """Weight rays by their density (eq. 9); the original does not."""
    interval: PositiveCount = 128
    """Steps until the first map is used; each further interval is 1.5 times as long."""


class ErrorMapState(NamedTuple):
    """The map in use and the one that is being filled."""

    interval: int
    """Steps of the interval under way."""
    steps: int
    """Steps since the last map was finished."""
    filling: Float[Tensor, "images rows columns"] | None
    """Error of this interval, for all images of the data set; None before its first batch."""
    finished: Float[Tensor, "images rows columns"] | None
    """Error of the interval before; None in the first."""
    density: PixelDensity | None
    """Density that follows from the finished map; None while rays are uniform."""


@register
class ErrorMap(DensitySampler[ErrorMapConfig, ErrorMapState]):
    """Draw by a coarse grid of the error of each image (instant-ngp).

    Draws follow the error of the previous interval, while that of the next is gathered. Rays are uniform until the
    first map is there. A map has about 3.5 (rays per image and interval)^(1/4) rows and columns: some thousand cells
    an image, which is far below a byte a training pixel.
    """

    config_class = ErrorMapConfig
    state_class = ErrorMapState

    def init(self, previous: ErrorMapState | None = None) -> ErrorMapState:
        return ErrorMapState(self.config.interval, 0, None, None, None) if previous is None else previous

    def update(self, state: ErrorMapState, batch: MiningBatch, applied: Tensor | bool) -> ErrorMapState:
        batch = batch.shared or batch
        assert batch.error is not None
        images, filling = self.images, state.filling
        if filling is None:
            filling = self._empty_map(state.interval * len(batch.indices) / images.num_cached)
        rays = pixel_centres(images, batch)
        index = images.cache_index[rays.image_index]
        size = torch.stack((images.height[index], images.width[index]), dim=-1)
        value = batch.error.detach().to(images.device) / rays.density_ratio
        value = torch.where(value.isfinite() & applied, value, 0.0)
        error_map.deposit(filling, rays.image_index, rays.position / size, value)
        state = state._replace(filling=filling, steps=state.steps + 1)
        if state.steps < state.interval:
            return state
        interval = max(int(state.interval * INTERVAL_GROWTH), state.interval + 1)
        return self.rebuild(ErrorMapState(interval, 0, None, filling, None))

    def _empty_map(self, samples: float) -> Float[Tensor, "images rows columns"]:
        """Return a map without error that the given number of samples of each image can fill."""
        images, side = self.images, error_map.resolution(samples)
        if not images.all_valid:
            side = max(side, *(-(-size // MAX_CELL_SIZE) for sizes in images.sizes for size in sizes))
        rows, columns = (min(side, *sizes) for sizes in zip(*images.sizes, strict=True))
        return torch.zeros(self.context.num_images, rows, columns, device=images.device)

    def rebuild(self, state: ErrorMapState) -> ErrorMapState:
        """Make the density over the cached images; images that had no ray in the interval have their floor."""
        if state.finished is None:
            return state._replace(density=None)
        images, (_, rows, columns) = self.images, state.finished.shape
        shapes = [(min(rows, height), min(columns, width)) for height, width in images.sizes]
        if any(shape != (rows, columns) for shape in shapes):
            return state._replace(density=None)  # images smaller than the map are cached: uniform until the next one
        grid = Grid(images, shapes)
        probability = error_map.probabilities(state.finished[images.image_index]).flatten()
        if not images.all_valid:
            valid = [grid.sums(index, images.valid_mask(index).float()) for index in range(images.num_cached)]
            probability = torch.where(torch.cat(valid) > 0, probability, 0.0)
        weights = (probability / probability.max() * dens.LARGEST).ceil().to(torch.int32)
        return state._replace(density=PixelDensity.from_cells(grid, weights))
