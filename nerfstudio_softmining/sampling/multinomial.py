"""The exact density over all training pixels, re-evaluated now and then: the paper's upper bound (fig. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from rich.progress import track
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.sampling.grid import Grid
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.strategy import CellDensity, MapStrategy, StrategyConfig, indices_of

CHUNK = 1 << 18
"""Cells evaluated between two ticks of the progress bar."""
LARGEST = 1 << 30
"""Integer that stands for the largest importance."""


@dataclass
class MultinomialConfig(StrategyConfig):
    """The exact density of Q over all pixels, at the price of rendering them all now and then."""

    positive: ClassVar[tuple[str, ...]] = ("refresh", "side")
    refresh: int = 500
    """Steps between two evaluations of all training pixels; 1 is the paper's upper bound."""
    side: int = 1
    """Side in pixels of the cells of which one pixel each is evaluated; 1 evaluates all."""
    uniform_share: float = 0.1
    """Share of each batch that is drawn uniformly over all images, in [0, 1]."""
    reweighted: bool = True
    """Weigh rays by their density (eq. 9)."""
    alpha_warmup: int = 0
    """Training steps over which alpha rises from 0; the paper's 1000 is for chains and their upper bound alike."""


class MultinomialStrategy(MapStrategy):
    """Draws in proportion to Q, as the network had it at the last evaluation of all pixels.

    Takes 4.3 bytes a pixel (16 while it is tabulated), less by side^2. An evaluation costs as much as rendering all
    training images.
    """

    config: MultinomialConfig
    _steps = 0

    def cache(self, pixels: CachedPixels) -> None:
        super().cache(pixels)
        self.map, self._stale = None, True

    def draw(self, count: int):
        if self._stale or self._steps % self.config.refresh == 0:
            self._evaluate()
        self._steps += 1
        return super().draw(count)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Evaluate the importance of all pixels, or of one in each cell."""
        assert self.surroundings.evaluate is not None
        grid, pixels = Grid.of_side(self.pixels, self.config.side), self.pixels
        importance = torch.zeros(grid.num_cells, device=pixels.device)
        starts = range(0, grid.num_cells, CHUNK)
        for start in track(starts, "Evaluating all training pixels", transient=True, disable=len(starts) < 2):
            cells = torch.arange(start, min(start + CHUNK, grid.num_cells), device=pixels.device)
            kept = grid.num_kept(cells)
            cells, kept = cells[kept > 0], kept[kept > 0]
            pool, _ = grid.draw_within(cells)
            indices = indices_of(pool)
            q = self.surroundings.evaluate(indices).to(pixels.device).nan_to_num(0.0, 0.0, 0.0)
            importance[cells] = q * kept * pixels.base(pixels.slot[pool.chart], indices[:, 1:])
        codes = importance / importance.max().clamp_min(torch.finfo(torch.float32).tiny) * LARGEST
        self._set(grid, codes.round().to(torch.int32))
        self._stale = False

    def _set(self, grid: Grid, codes: Tensor) -> None:
        self.map = CellDensity(grid, dens.tabulate(codes))
        if self.map.is_empty():
            self.map = None

    def state_dict(self) -> dict:
        return {"steps": self._steps, "codes": None if self.map is None else self.map.table.codes}

    def load_state_dict(self, state: dict) -> None:
        self._steps, codes = state["steps"], state["codes"]
        grid = Grid.of_side(self.pixels, self.config.side)
        if codes is not None and len(codes) == grid.num_cells:
            self._set(grid, codes.to(self.pixels.device))
            self._stale = False
