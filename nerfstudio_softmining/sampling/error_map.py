"""Instant-ngp's error map: a coarse grid of the error of each image, rebuilt at growing intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import error_map
from nerfstudio_softmining.sampling.feedback import MiningBatch
from nerfstudio_softmining.sampling.grid import Grid
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.strategy import CellDensity, MapStrategy, StrategyConfig, rays_of

GROWTH = 1.5
"""Factor from one interval to the next."""
LARGEST_CELL = 32
"""Side in pixels of a cell where there are masks, at most: all pixels of a drawn cell are looked at there."""
LARGEST = 1 << 30
"""Integer that stands for the largest probability."""


@dataclass
class ErrorMapConfig(StrategyConfig):
    """A coarse error grid for each image (instant-ngp)."""

    positive: ClassVar[tuple[str, ...]] = ("interval",)
    interval: int = 128
    """Steps until the first map is used; each further interval is 1.5 times as long."""
    reweighted: bool = False
    """Weigh rays by their density (eq. 9); the original does not."""


class ErrorMapStrategy(MapStrategy):
    """Draws from the error of the previous interval while it gathers that of the next.

    Until the first map is there rays are uniform. A map has about 3.5 (rays per image and interval)^(1/4) rows and
    columns: some thousand cells an image, at 9.3 bytes each, which is far below a byte a training pixel.
    """

    config: ErrorMapConfig
    error: Tensor | None = None
    """Error of this interval [images of the data set, rows, columns]."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.interval, self.steps = self.config.interval, 0
        self._map_error: Tensor | None = None

    def cache(self, pixels: CachedPixels) -> None:
        super().cache(pixels)
        self._build()

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        assert feedback.error is not None
        pixels = self.pixels
        if self.error is None:
            samples = self.interval * len(feedback.indices) / pixels.num_slots
            side = error_map.resolution(samples)
            if not pixels.all_kept:
                side = max(side, *(-(-size // LARGEST_CELL) for sizes in pixels.sizes for size in sizes))
            rows, columns = (min(side, *sizes) for sizes in zip(*pixels.sizes, strict=True))
            self.error = torch.zeros(self.surroundings.num_images, rows, columns, device=pixels.device)
        rays = rays_of(feedback, pixels.device)
        slot = pixels.slot[rays.chart]
        size = torch.stack((pixels.height[slot], pixels.width[slot]), dim=-1)
        value = feedback.error.detach().to(pixels.device) / rays.density
        value = torch.where(value.isfinite() & applied, value, 0.0)
        error_map.deposit(self.error, rays.chart, rays.position / size, value)
        self.steps += 1
        if self.steps == self.interval:
            self._map_error, self.error = self.error, None
            self.interval, self.steps = max(int(self.interval * GROWTH), self.interval + 1), 0
            self._build()

    def _build(self) -> None:
        """Make the density over the cached images; images that had no ray in the interval have their floor."""
        self.map = None
        if self._map_error is None:
            return
        pixels, (_, rows, columns) = self.pixels, self._map_error.shape
        shapes = [(min(rows, height), min(columns, width)) for height, width in pixels.sizes]
        if any(shape != (rows, columns) for shape in shapes):
            return  # images smaller than the map have been cached: uniform until the next one
        grid = Grid(pixels, shapes)
        chances = error_map.probabilities(self._map_error[pixels.image_idx]).flatten()
        if not pixels.all_kept:
            kept = torch.cat([grid.sums(slot, pixels.keeps(slot).float()) for slot in range(pixels.num_slots)])
            chances = torch.where(kept > 0, chances, 0.0)
        codes = (chances / chances.max() * LARGEST).ceil().to(torch.int32)
        self.map = CellDensity(grid, dens.tabulate(codes))

    def state_dict(self) -> dict:
        return {"interval": self.interval, "steps": self.steps, "error": self.error, "map_error": self._map_error}

    def load_state_dict(self, state: dict) -> None:
        self.interval, self.steps = state["interval"], state["steps"]
        self.error, self._map_error = (
            None if error is None else error.to(self.pixels.device) for error in (state["error"], state["map_error"])
        )
        self._build()
