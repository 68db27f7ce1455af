"""Quadtrees of the error: Zhang et al., "Fast Learning Radiance Fields by Shooting Much Fewer Rays", TIP 2023."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import priors
from nerfstudio_softmining.samplers.base import (
    DensitySampler,
    MiningBatch,
    SamplerConfig,
    SamplerContext,
    pixel_centres,
)
from nerfstudio_softmining.samplers.cells import Grid, PixelDensity
from nerfstudio_softmining.samplers.images import TrainingImages
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.settings import Count, Fraction, NonNegative, PositiveCount

FINEST = 8
"""Side in pixels below which a leaf is not divided."""
HEADROOM = 64
"""Densities relative to a uniform draw, up to this, can be told apart."""


@dataclass
class QuadtreeConfig(SamplerConfig):
    """Settings of the sampler quadtree."""

    importance_weighted: bool = False
    """Weight rays by their density (eq. 9); the original does not."""
    initial_depth: Count = 2
    """Depth of the trees at the start: 2 makes 4 x 4 leaves of an image."""
    threshold: NonNegative = 0.02
    """Mean Q of a leaf above which it is divided at the end of an epoch."""
    reduction: PositiveCount = 16
    """An epoch draws one ray for this many training pixels."""
    settled_rays: NonNegative = 10.0
    """Rays of an epoch in a leaf that was not divided."""
    contrast_fraction: Fraction = 0.3
    """Fraction of a leaf's rays that follow its local contrast instead of being uniform, in [0, 1]."""


class QuadtreeState(NamedTuple):
    """The trees, and what this epoch has observed."""

    rays: int
    """Rays of this epoch."""
    depth: UInt8[Tensor, " parts"]
    """Depth of the leaf that each part of an image is in; a part is the smallest that a leaf can become."""
    error: Float[Tensor, " parts"]
    """Sum of the importance observed in each part in this epoch."""
    num_seen: Float[Tensor, " parts"]
    """Number of rays in each part in this epoch."""
    density: PixelDensity | None
    """Density of the leaves as they are."""


@register
class Quadtree(DensitySampler[QuadtreeConfig, QuadtreeState]):
    """Draw by local contrast, and by quadtrees that divide where the error is (Zhang et al. 2023).

    The deepest leaves of an image are drawn by their area and the others rarely, and within a leaf by local contrast.
    The density is tabulated anew after each epoch, which is amortised to some cells for each ray. Takes 0.58 bytes a
    training pixel in cells of 2 x 2, and at most 0.16 for the trees.
    """

    config_class = QuadtreeConfig
    state_class = QuadtreeState
    image_fields = ("depth",)

    def __init__(self, config: QuadtreeConfig, context: SamplerContext, images: TrainingImages) -> None:
        super().__init__(config, context, images)
        self.grid = self.make_grid("local contrast and leaves", dens.bytes_per_entry(2))
        self.contrast = torch.empty(self.grid.num_cells, dtype=torch.uint8, device=images.device)
        for index in images.track("Finding contrast"):
            deviation = priors.local_deviation(images.image(index)) * images.pixel_weight(index)
            sums = self.grid.sums(index, deviation)
            self.contrast[self.grid.cell_slice(index)] = dens.encode(sums / self.grid.cell_size**2)
        self.max_depth = [max(0, (min(sizes) // FINEST).bit_length() - 1) for sizes in images.sizes]
        self.parts = Grid(images, [(2**depth, 2**depth) for depth in self.max_depth])

    def image_slice(self, cache_index: int) -> slice:
        return self.parts.cell_slice(cache_index)

    def init(self, previous: QuadtreeState | None = None) -> QuadtreeState:
        device = self.images.device
        depth = torch.empty(self.parts.num_cells, dtype=torch.uint8, device=device)
        for index, deepest in enumerate(self.max_depth):
            depth[self.parts.cell_slice(index)] = min(self.config.initial_depth, deepest)
        error, count = torch.zeros(2, len(depth), device=device)
        return QuadtreeState(0 if previous is None else previous.rays, depth, error, count, None)

    def update(self, state: QuadtreeState, batch: MiningBatch, applied: Tensor | bool) -> QuadtreeState:
        batch = batch.shared or batch
        assert batch.importance is not None
        importance = batch.importance.to(self.images.device)
        is_known = (importance.isfinite() & applied).float()
        part = self.parts.cell(pixel_centres(self.images, batch))
        state.error.index_add_(0, part, torch.where(is_known > 0, importance, 0.0))
        state.num_seen.index_add_(0, part, is_known)
        state = state._replace(rays=state.rays + len(importance))
        if state.rays < self.images.num_pixels / self.config.reduction:
            return state
        self._divide(state)
        return self.rebuild(state._replace(rays=0, error=state.error.zero_(), num_seen=state.num_seen.zero_()))

    def _divide(self, state: QuadtreeState) -> None:
        """Divide the deepest leaves of each image where their mean error is above the threshold, in place."""
        for index, deepest in enumerate(self.max_depth):
            part = self.parts.cell_slice(index)
            depth = state.depth[part]
            level = int(depth.max())
            if level == deepest:
                continue
            within = torch.arange(2**deepest, device=depth.device) >> (deepest - level)
            leaf = (within[:, None] * 2**level + within).flatten()  # as if all leaves were of this level
            error, count = (
                torch.zeros(4**level, device=depth.device).index_add_(0, leaf, values[part])
                for values in (state.error, state.num_seen)
            )
            is_divided = (error > self.config.threshold * count)[leaf] & (depth == level)
            state.depth[part] = torch.where(is_divided, level + 1, depth).to(torch.uint8)

    def rebuild(self, state: QuadtreeState) -> QuadtreeState:
        weights = torch.empty_like(self.contrast)
        for index in range(self.images.num_cached):
            weights[self.grid.cell_slice(index)] = self._cell_weights(index, state.depth[self.image_slice(index)])
        return state._replace(density=PixelDensity.from_cells(self.grid, weights))

    def _cell_weights(self, cache_index: int, depth: Tensor) -> UInt8[Tensor, " cells"]:
        """Return the table weights of one image's cells for the depths of its parts."""
        grid, config, deepest = self.grid, self.config, self.max_depth[cache_index]
        height, width = sizes = self.images.sizes[cache_index]
        pixel_weights = grid.pixel_weights(cache_index)
        depth = depth.view(2**deepest, 2**deepest)
        # the part that each row and each column of cells begins in
        row, column = (
            -(-torch.arange(count, device=depth.device) * size // count) * 2**deepest // size
            for size, count in zip(sizes, grid.shapes[cache_index], strict=True)
        )
        level = depth[row][:, column].int()
        # a number for the leaf of each cell: its depth, row and column
        leaf = ((1 << 2 * level) - 1) // 3
        leaf += (row[:, None].int() >> deepest - level) << level
        leaf += column.int() >> deepest - level
        level, leaf = level.flatten(), leaf.flatten()

        contrast = dens.integer_weight(self.contrast[grid.cell_slice(cache_index)]) / dens.LARGEST
        sums = torch.zeros(2, (4 ** (deepest + 1) - 1) // 3, device=depth.device)
        sums[0].index_add_(0, leaf, contrast)
        sums[1].index_add_(0, leaf, pixel_weights)
        tiny = torch.finfo(torch.float32).tiny
        by_contrast = contrast * (sums[1] / sums[0].clamp_min(tiny))[leaf]
        by_contrast = torch.where(sums[0][leaf] > 0, by_contrast, pixel_weights)
        within = (1 - config.contrast_fraction) * pixel_weights + config.contrast_fraction * by_contrast

        area = height * width / 4.0**level
        settled = (config.settled_rays * config.reduction / area).clamp_max(1.0)
        rate = torch.where(level == depth.max(), 1.0, settled)
        return torch.where(pixel_weights > 0, dens.encode(rate * within / HEADROOM), 0).to(torch.uint8)
