"""Detail with corrections: where error is to be expected, and how much of it tiles have shown. This plugin's own.

Each pixel's error is predicted as the square root of its local detail, known before any error is. Each tile stores the
ratio of observed to predicted error, shrunk towards its parent tile. A power of the ratio scales the density of the
tile's pixels. With the power 2, rays are in proportion to the squared error: the optimum of a training whose errors
fall as powers of the rays spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import priors
from nerfstudio_softmining.mining.shrinkage import shrunk_ratio
from nerfstudio_softmining.samplers.base import (
    AHEAD,
    Ahead,
    DensitySampler,
    MiningBatch,
    SamplerConfig,
    SamplerContext,
    Samples,
)
from nerfstudio_softmining.samplers.cells import PixelDensity
from nerfstudio_softmining.samplers.images import TrainingImages
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.settings import Fraction, Interval, NonNegative, PositiveCount

ERROR_POWER = 0.5
"""Power of the detail of a pixel that predicts its error."""
INTERVAL_GROWTH = 1.25
"""Factor from one interval to the next."""
DECAY = 0.5
"""Factor on the weight of all errors seen so far after a correction."""
MAX_RATIO = 64.0
"""Largest ratio of a tile's error to its prediction, which bounds the effect of a single error beyond measure."""
LEVELS = 3
"""Levels of larger tiles, each twice the one before, that the smallest ones are shrunk towards."""
MIN_TILE_SIDE = 4
"""Least side in cells of a tile."""


@dataclass
class DetailConfig(SamplerConfig):
    """Settings of the sampler detail."""

    uniform_fraction: Fraction = 0.1
    """Fraction of each batch that is drawn uniformly over all images, in [0, 1]."""
    floor: NonNegative = 0.003
    """Detail that flat places have, in units of the colour."""
    tile: Annotated[int, Interval(1, 128)] = 8
    """Side in pixels of the smallest tiles whose error is kept; rounded up to 4, 8, 16, ... cells."""
    interval: PositiveCount = 32
    """Steps until the first correction; each further interval is 1.25 times as long."""
    prior_strength: NonNegative = 4.0
    """Rays after which a tile's own error counts as much as that of the tile around it."""
    error_exponent: Annotated[float, Interval(0, 8)] = 2.0
    """Power of the ratio of observed to predicted error that scales the density; 0 leaves the detail alone."""


class Observation(NamedTuple):
    """Errors of one batch that are not part of the tiles' sums yet."""

    indices: Int64[Tensor, "rays 3"]
    """Image, row and column of each ray."""
    error: Float[Tensor, " rays"]
    """L1 error of each ray; NaN where the optimizer skipped the step."""


class DetailState(NamedTuple):
    """What is known of the tiles, and the batches drawn in advance."""

    interval: int
    """Steps of the interval under way."""
    steps: int
    """Steps since the last correction."""
    seen: Float[Tensor, "3 tiles"]
    """Sums of observed errors, of their predictions, and of rays, by tile."""
    ratio: Float[Tensor, " tiles"]
    """Ratio of observed to predicted error of each tile."""
    pending: tuple[Observation, ...]
    """Observations that are not in `seen` yet."""
    ahead: Ahead | None
    """Batches that are drawn and not used yet."""
    density: PixelDensity | None
    """Detail times a power of the ratio; None where there is no detail at all."""


@register
class Detail(DensitySampler[DetailConfig, DetailState]):
    """Draw in proportion to local detail, corrected by the observed error of tiles.

    Takes 0.75 bytes a training pixel, in cells of 2 x 2. The batches of some steps are drawn together, stratified by
    tile, and their errors are summed together: O(batch) a step. Corrections cost O(tiles), at growing intervals.
    """

    config_class = DetailConfig
    state_class = DetailState
    image_fields = ("seen", "ratio")
    is_stratified = True
    photo_settings = {"alpha": 0.3, "uniform_fraction": 0.5}

    tile_bytes: ClassVar[int] = 32
    """Memory of a tile beside that of its cells."""

    def __init__(self, config: DetailConfig, context: SamplerContext, images: TrainingImages) -> None:
        super().__init__(config, context, images)
        bytes_per_cell = 1 + self.tile_bytes / MIN_TILE_SIDE**2
        grid = self.make_grid("details", bytes_per_cell, config.tile, MIN_TILE_SIDE, LEVELS)
        self.grid = grid
        prior = PixelDensity.from_weights(
            grid, lambda index: priors.laplacian(images.image_or_bytes(index)) + config.floor, "Finding details"
        )
        self.prior = None if prior is None else prior.without_factors()
        """Density of the detail, which takes the factors of the state; None where there is no detail at all."""

    def image_slice(self, cache_index: int) -> slice:
        return self.grid.tile_slice(cache_index)

    def init(self, previous: DetailState | None = None) -> DetailState:
        interval, steps = (self.config.interval, 0) if previous is None else (previous.interval, previous.steps)
        seen = torch.zeros(3, self.grid.num_tiles, device=self.images.device)
        return DetailState(interval, steps, seen, torch.ones_like(seen[0]), (), None, None)

    def rebuild(self, state: DetailState) -> DetailState:
        if self.prior is None:
            return state
        exponent = self.config.error_exponent
        factors = state.ratio if exponent == 1 else state.ratio.pow(exponent)  # which may take memory of its own
        return state._replace(density=self.prior.with_factors(factors))

    def draw(self, state: DetailState, count: int) -> tuple[Samples, DetailState]:
        num_uniform, steps_left = self.num_uniform(state, count), state.interval - state.steps
        batch, ahead = self.next_batch(state, state.ahead, steps_left, count - num_uniform, num_uniform)
        return self.mix(batch, num_uniform), state._replace(ahead=ahead)

    def update(self, state: DetailState, batch: MiningBatch, applied: Tensor | bool) -> DetailState:
        if self.config.error_exponent == 0 or self.prior is None:
            return state
        batch = batch.shared or batch
        assert batch.importance is not None
        error = batch.importance.detach()
        if isinstance(applied, Tensor):
            error = torch.where(applied.to(error.device), error, torch.nan)
        pending = state.pending if applied is False else (*state.pending, Observation(batch.indices, error))
        state = state._replace(pending=pending, steps=state.steps + 1)
        if state.steps == state.interval or len(pending) * len(error) >= AHEAD:
            state = self.flush(state)
        return self._correct(state) if state.steps == state.interval else state

    def flush(self, state: DetailState) -> DetailState:
        if not state.pending or self.prior is None:
            return state
        device = self.images.device
        indices, error = (torch.cat(parts).to(device) for parts in zip(*state.pending, strict=True))
        cell = self.grid.cell_at(self.images.cache_index[indices[:, 0]], indices[:, 1:])
        predicted = dens.relative_weight(self.prior.table, cell, ERROR_POWER)
        is_known = error.isfinite()
        error, predicted = torch.where(is_known, torch.stack((error, predicted)), 0.0)
        # on the scale of the errors of now: they fall while training, and tiles are seen at different times
        predicted = predicted * (error.sum() / predicted.sum()).nan_to_num(0.0)
        tile = self.grid.tile_of(cell)
        state.seen.index_add_(1, tile, torch.stack((error, predicted, is_known.float())))
        return state._replace(pending=())

    def _correct(self, state: DetailState) -> DetailState:
        """Estimate the ratio of each tile's error to the prediction anew, and begin the next interval."""
        observed, predicted, rays = state.seen
        prior_strength = self.config.prior_strength * observed.sum() / rays.sum()
        ratio = shrunk_ratio(observed, predicted, self.grid.tile_parents(), prior_strength)
        ratio = ratio.nan_to_num(1.0).clamp(1 / MAX_RATIO, MAX_RATIO)
        interval = max(int(state.interval * INTERVAL_GROWTH), state.interval + 1)
        state = state._replace(interval=interval, steps=0, seen=state.seen.mul_(DECAY), ratio=ratio, ahead=None)
        return self.rebuild(state)
