"""Quadtrees of the error: Zhang et al., "Fast Learning Radiance Fields by Shooting Much Fewer Rays", TIP 2023."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import edges
from nerfstudio_softmining.sampling.feedback import MiningBatch
from nerfstudio_softmining.sampling.grid import Grid
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.strategy import CellDensity, MapStrategy, StrategyConfig, rays_of

FINEST = 8
"""Side in pixels below which a leaf is not divided."""
HEADROOM = 64
"""Densities relative to a uniform draw, up to this, can be told apart."""


@dataclass
class QuadtreeConfig(StrategyConfig):
    """Local contrast, and quadtrees that divide where the error is (Zhang et al. 2023)."""

    positive: ClassVar[tuple[str, ...]] = ("reduction",)
    initial_depth: int = 2
    """Depth of the trees at the start: 2 makes 4 x 4 leaves of an image."""
    threshold: float = 0.02
    """Mean Q of a leaf above which it is divided at the end of an epoch."""
    reduction: int = 16
    """An epoch draws one ray for this many training pixels."""
    settled_rays: float = 10.0
    """Rays of an epoch in a leaf that was not divided."""
    contrast_share: float = 0.3
    """Share of a leaf's rays that follow its local contrast instead of being uniform, in [0, 1]."""
    reweighted: bool = False
    """Weigh rays by their density (eq. 9); the original does not."""


class QuadtreeStrategy(MapStrategy):
    """Draws leaves, the deepest of an image by their area and the others rarely, and within a leaf by local contrast.

    The density is tabulated anew after each epoch, which is amortised to some cells for each ray. Takes 0.57 bytes a
    training pixel in cells of 2 x 2, and at most 0.16 for the trees.
    """

    config: QuadtreeConfig

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._rays = 0
        self._depths: dict[int, Tensor] = {}
        """Depth of the leaf that each part of an image is in, for images seen before."""

    def cache(self, pixels: CachedPixels) -> None:
        if self.map is not None:
            self._keep()
        super().cache(pixels)
        self.grid = self.make_grid("local contrast and leaves", dens.bytes_per_entry(2))
        self.contrast = torch.empty(self.grid.num_cells, dtype=torch.uint8, device=pixels.device)
        for slot in pixels.each_slot("Finding contrast"):
            deviation = edges.local_deviation(pixels.image(slot)) * pixels.mass(slot)
            self.contrast[self.grid.part(slot)] = dens.encode(self.grid.sums(slot, deviation) / self.grid.side**2)
        # a part is the smallest that a leaf can become
        self.deepest = [max(0, (min(sizes) // FINEST).bit_length() - 1) for sizes in pixels.sizes]
        self.parts = Grid(pixels, [(2**depth, 2**depth) for depth in self.deepest])
        self.depth = torch.empty(self.parts.num_cells, dtype=torch.uint8, device=pixels.device)
        for slot, (image, deepest) in enumerate(zip(pixels.image_idx.tolist(), self.deepest, strict=True)):
            start = min(self.config.initial_depth, deepest)
            self.depth[self.parts.part(slot)] = self._depths.get(image, torch.tensor(start)).to(self.depth)
        self._forget()
        self._tabulate()

    def _keep(self) -> None:
        """Remember the trees, by image."""
        for slot, image in enumerate(self.pixels.image_idx.tolist()):
            self._depths[image] = self.depth[self.parts.part(slot)].cpu()

    def _forget(self) -> None:
        self.error = torch.zeros(self.parts.num_cells, device=self.pixels.device)
        self.count = torch.zeros(self.parts.num_cells, device=self.pixels.device)

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        assert feedback.importance is not None
        importance = feedback.importance.to(self.pixels.device)
        seen = (importance.isfinite() & applied).float()
        part = self.parts.cell(rays_of(feedback, self.pixels.device))
        self.error.index_add_(0, part, torch.where(seen > 0, importance, 0.0))
        self.count.index_add_(0, part, seen)
        self._rays += len(importance)
        if self._rays >= self.pixels.num_pixels / self.config.reduction:
            self._divide()
            self._tabulate()
            self._forget()
            self._rays = 0

    def _divide(self) -> None:
        """Divide the deepest leaves of each image where their mean error is above the threshold."""
        for slot, deepest in enumerate(self.deepest):
            part = self.parts.part(slot)
            depth = self.depth[part]
            level = int(depth.max())
            if level == deepest:
                continue
            within = torch.arange(2**deepest, device=depth.device) >> (deepest - level)
            leaf = (within[:, None] * 2**level + within).flatten()  # as if all leaves were of this level
            error, count = (
                torch.zeros(4**level, device=depth.device).index_add_(0, leaf, values[part])
                for values in (self.error, self.count)
            )
            divided = (error > self.config.threshold * count)[leaf] & (depth == level)
            self.depth[part] = torch.where(divided, level + 1, depth).to(torch.uint8)

    def _tabulate(self) -> None:
        """Make the density of the leaves as they are."""
        pixels, grid, config = self.pixels, self.grid, self.config
        codes = torch.empty_like(self.contrast)
        for slot, deepest in enumerate(self.deepest):
            (height, width), part = pixels.sizes[slot], grid.part(slot)
            mass = grid.masses(slot)
            depth = self.depth[self.parts.part(slot)].view(2**deepest, 2**deepest)
            # the part that each row and each column of cells begins in
            row, column = (
                -(-torch.arange(count, device=pixels.device) * size // count) * 2**deepest // size
                for size, count in zip((height, width), grid.shapes[slot], strict=True)
            )
            level = depth[row][:, column].int()
            # a number for the leaf of each cell: its depth, row and column
            leaf = ((1 << 2 * level) - 1) // 3
            leaf += (row[:, None].int() >> deepest - level) << level
            leaf += column.int() >> deepest - level
            level, leaf = level.flatten(), leaf.flatten()

            contrast = dens.weight(self.contrast[part]) / dens.LARGEST
            sums = torch.zeros(2, (4 ** (deepest + 1) - 1) // 3, device=pixels.device)
            sums[0].index_add_(0, leaf, contrast)
            sums[1].index_add_(0, leaf, mass)
            tiny = torch.finfo(torch.float32).tiny
            by_contrast = contrast * (sums[1] / sums[0].clamp_min(tiny))[leaf]
            by_contrast = torch.where(sums[0][leaf] > 0, by_contrast, mass)
            within = (1 - config.contrast_share) * mass + config.contrast_share * by_contrast

            area = height * width / 4.0**level
            settled = (config.settled_rays * config.reduction / area).clamp_max(1.0)
            rate = torch.where(level == depth.max(), 1.0, settled)
            codes[part] = torch.where(mass > 0, dens.encode(rate * within / HEADROOM), 0)
        self.map = CellDensity(grid, dens.tabulate(codes))

    def state_dict(self) -> dict:
        if self.map is not None:
            self._keep()
        return {"rays": self._rays, "depths": self._depths, "error": self.error, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self._rays, self._depths, self.map = state["rays"], state["depths"], None
        self.cache(self.pixels)
        if len(state["error"]) == self.parts.num_cells:
            self.error, self.count = (state[name].to(self.pixels.device) for name in ("error", "count"))
