"""Draws by local detail, corrected by the error of tiles as it becomes known."""

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

GROWTH = 1.25
"""Factor from one interval to the next."""
KEPT = 0.5
"""Share of the weight of all errors seen so far that is kept after a correction."""
LEVELS = 4
"""Sizes of tiles, each twice the one before."""
HEADROOM = 8
"""Octaves by which a tile's density may be corrected, up or down."""
CODES = 254 / dens.OCTAVES
"""Codes of a density to an octave."""
SMALLEST_TILE = 4
"""Side in cells of the smallest tiles, at least."""
TILE_BYTES = 16
"""Memory that is counted for a tile and its share of the larger ones."""
CHUNK = 1 << 20
"""Cells that are corrected at a time, which bounds the temporary memory."""


@dataclass
class DetailConfig(StrategyConfig):
    """Local detail, corrected by the error of tiles."""

    positive: ClassVar = ("interval", "tile")
    uniform_share: float = 0.1
    """Share of each batch that is drawn uniformly over all images, in [0, 1]."""
    floor: float = 0.003
    """Detail that flat places have, in units of the colour."""
    tile: int = 8
    """Side in pixels of the smallest tiles whose error is kept; at least 4 cells."""
    interval: int = 32
    """Steps until the first correction; each further interval is 1.25 times as long."""
    trust: float = 4.0
    """Rays after which a tile's own error counts as much as that of its surroundings."""
    correction: float = 2.0
    """Power of the error, over what the detail lets expect, that corrects the density; 0 leaves the detail alone."""
    reweighted: bool = True
    """Weigh rays by their density (eq. 9)."""


class DetailStrategy(MapStrategy):
    """Draws in proportion to detail, times the squared error of a tile over what its detail lets expect.

    Detail is the difference of a pixel and its surroundings, known before any error is. Error is taken to grow with its
    root; what a tile of 8 x 8 pixels has above or below that, as far as it has been seen, and else what larger tiles
    around it have, corrects the density of all its pixels. At the optimum of a training whose errors fall as powers of
    the rays spent, rays are in proportion to the squared error.

    Takes 0.54 bytes a training pixel, in cells of 2 x 2. A step costs O(batch); corrections take all cells, at
    growing intervals.
    """

    config: DetailConfig
    map: CellDensity

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.interval, self.steps = self.config.interval, 0

    def cache(self, pixels: CachedPixels) -> None:
        super().cache(pixels)
        grid = self.make_grid("details", dens.bytes_per_entry() + TILE_BYTES / SMALLEST_TILE**2)

        def weights(slot: int) -> Tensor:
            detail = (edges.laplacian(pixels.image(slot)) + self.config.floor).clamp_max(1.0)
            return detail * 2.0**-HEADROOM

        self.map = CellDensity.of_weights(grid, weights, "Finding details")
        side = max(self.config.tile, SMALLEST_TILE * grid.side)
        self.tiles = [Grid.of_side(pixels, side << level) for level in range(LEVELS)]
        self.seen = [torch.zeros(2, tiles.num_cells, device=pixels.device) for tiles in self.tiles]
        """Sums of the errors of rays in each tile, and of what was expected of them, of each size."""
        self.rays = 0.0
        """How many rays these are of."""
        self.offset = torch.zeros(self.tiles[0].num_cells, dtype=torch.int32, device=pixels.device)
        """Correction of the density of each of the smallest tiles, in codes."""

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        if self.config.correction == 0:
            return
        assert feedback.importance is not None
        device = self.pixels.device
        rays = rays_of(feedback, device)
        tile = self.tiles[0].cell(rays)
        code = self.map.table.codes[self.map.grid.cell(rays)].int() - self.offset[tile]
        seen = torch.stack((feedback.importance.detach().to(device), torch.exp2((code - 255) / (2 * CODES))))
        seen = torch.where(seen[0].isfinite() & applied, seen, 0.0)
        for tiles, sums in zip(self.tiles, self.seen, strict=True):
            sums.index_add_(1, tiles.cell(rays), seen)
        self.rays += len(code)
        self.steps += 1
        if self.steps == self.interval:
            self._correct()
            for sums in self.seen:
                sums *= KEPT
            self.rays *= KEPT
            self.interval, self.steps = max(int(self.interval * GROWTH), self.interval + 1), 0

    def _correct(self) -> None:
        """Correct the density by what has been seen."""
        mean = self.seen[0].sum(dim=1) / self.rays
        trust = self.config.trust * mean[1]
        ratio = (mean[0] / mean[1])[None]
        for level in reversed(range(LEVELS)):
            tiles, (error, expected) = self.tiles[level], self.seen[level]
            if level < LEVELS - 1:
                slot, first = tiles.first(torch.arange(tiles.num_cells, device=error.device))
                ratio = ratio[self.tiles[level + 1].cell_of(slot, first)]
            ratio = (error + trust * ratio) / (expected + trust)
        octaves = self.config.correction * (ratio / (mean[0] / mean[1])).log2().nan_to_num(0.0)
        self._set((octaves.clamp(-HEADROOM, HEADROOM) * CODES).round().int())

    def _set(self, offset: Tensor) -> None:
        """Take other corrections."""
        grid, codes = self.map.grid, self.map.table.codes
        change = offset - self.offset
        for start in range(0, grid.num_cells, CHUNK):
            part = slice(start, min(start + CHUNK, grid.num_cells))
            slot, first = grid.first(torch.arange(part.start, part.stop, device=codes.device))
            code = codes[part].int()
            moved = (code + change[self.tiles[0].cell_of(slot, first)]).clamp(1, 255)
            codes[part] = torch.where(code > 0, moved, 0).to(torch.uint8)
        self.offset = offset
        self.map = CellDensity(grid, dens.tabulate(codes))

    def state_dict(self) -> dict:
        return {
            "interval": self.interval,
            "steps": self.steps,
            "rays": self.rays,
            "seen": [sums.clone() for sums in self.seen],
            "offset": self.offset,
        }

    def load_state_dict(self, state: dict) -> None:
        self.interval, self.steps = state["interval"], state["steps"]
        if len(state["offset"]) == len(self.offset):
            self.rays = state["rays"]
            self.seen = [sums.to(self.pixels.device) for sums in state["seen"]]
            self._set(state["offset"].to(self.pixels.device))
