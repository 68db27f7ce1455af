"""Cells of the cached images, gathered in square tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import tiles
from nerfstudio_softmining.mining.langevin import Pool
from nerfstudio_softmining.sampling.grid import Grid
from nerfstudio_softmining.sampling.pixels import pixel


class Tiling:
    """Square tiles of the cells of a grid. Those at the lower and right rims of an image may be partly empty.

    An entry is a cell's place among all tiles: tile * side^2 + row within * side + column within.

    Args:
        grid: the cells.
        side: cells along the side of a tile.
        levels: number of sizes of larger tiles, each twice the one before, that [above][] is asked for.
    """

    def __init__(self, grid: Grid, side: int, levels: int = 0) -> None:
        self.grid, self.side = grid, side
        self.shapes = [(-(-rows // side), -(-columns // side)) for rows, columns in grid.shapes]
        """Rows and columns of tiles of each image."""
        # made once, as a correction must not copy anything to the device
        shapes, self._layouts = self.shapes, []
        for _ in range(levels + 1):
            self._layouts.append((sum(rows * columns for rows, columns in shapes), *self._laid_out(shapes)))
            shapes = [((rows + 1) // 2, (columns + 1) // 2) for rows, columns in shapes]
        _, self.columns, self.start, self.ends = self._layouts[0]
        self.starts = [0, *accumulate(rows * columns for rows, columns in self.shapes)]
        """Where the tiles of each image begin in the row of all tiles, on the host."""
        self.num_tiles = self.starts[-1]

    def part(self, slot: int) -> slice:
        """Where the tiles of an image are in the row of all tiles."""
        return slice(self.starts[slot], self.starts[slot + 1])

    def entry(self, pool: Pool) -> Int64[Tensor, " n"]:
        """The entry of the cell that each chain is in."""
        return self.entry_of(self.grid.pixels.slot[pool.chart], pixel(pool))

    def entry_of(self, slot: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"]) -> Int64[Tensor, " n"]:
        """The entry of the cell that each pixel is in."""
        row, column = self.grid.place_of(slot, pixels)
        tile = self.start[slot] + row // self.side * self.columns[slot] + column // self.side
        return tile * self.side**2 + row % self.side * self.side + column % self.side

    def cell(self, entry: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """The number in the grid of the cell of each entry, which has to be on its image."""
        tile, place = entry // self.side**2, entry % self.side**2
        slot = torch.searchsorted(self.ends, tile, right=True)
        local = tile - self.start[slot]
        row = local // self.columns[slot] * self.side + place // self.side
        column = local % self.columns[slot] * self.side + place % self.side
        return self.grid.start[slot] + row * self.grid.columns[slot] + column

    def gathered(self, slot: int, cells: Tensor) -> Tensor:
        """Values of an image's cells [rows, columns] by tile [tiles, side^2], with zeros where a tile is empty."""
        (rows, columns), side = self.shapes[slot], self.side
        height, width = cells.shape
        padded = F.pad(cells, (0, columns * side - width, 0, rows * side - height))
        return padded.view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, side**2)

    def above(self) -> Iterator[Tensor]:
        """For each size of tiles but the largest, the number of the next larger tile that each tile of it is in."""
        for (count, columns, start, ends), (_, larger_columns, larger_start, _) in pairwise(self._layouts):
            number = torch.arange(count, device=ends.device)
            slot = torch.searchsorted(ends, number, right=True)
            local = number - start[slot]
            row, column = local // columns[slot] // 2, local % columns[slot] // 2
            yield larger_start[slot] + row * larger_columns[slot] + column

    def _laid_out(self, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of each image's tiles, and where the tiles of each image begin and end in the row of all."""
        rows, columns = torch.tensor(shapes, device=self.grid.pixels.device).unbind(-1)
        ends = (rows * columns).cumsum(0)
        return columns, ends - rows * columns, ends


class TiledCellDensity:
    """A density over the kept pixels of all cached images: fixed from cell to cell, with a factor for each tile."""

    def __init__(self, tiling: Tiling, table: tiles.TiledDensity) -> None:
        self.tiling, self.grid, self.pixels, self.table = tiling, tiling.grid, tiling.grid.pixels, table

    @classmethod
    def of_weights(
        cls, tiling: Tiling, weights: Callable[[int], Float[Tensor, "h w"]], description: str
    ) -> TiledCellDensity:
        """Made from weights in [0, 1] of the pixels of each slot, relative to a uniform draw; all factors are 1."""
        grid, pixels = tiling.grid, tiling.grid.pixels
        codes = torch.empty(tiling.num_tiles, tiling.side**2, dtype=torch.uint8, device=pixels.device)
        for slot in pixels.each_slot(description):
            sums = grid.sums(slot, weights(slot) * pixels.mass(slot)).view(grid.shapes[slot])
            codes[tiling.part(slot)] = tiling.gathered(slot, dens.encode(sums / grid.side**2))
        return cls(tiling, tiles.tabulate(codes))

    def is_empty(self) -> bool:
        """Whether there is nothing to draw. Waits for the device."""
        return float(self.table.ends[-1]) == 0

    def corrected(self, factors: Float[Tensor, " tiles"]) -> TiledCellDensity:
        """The same with other factors."""
        return TiledCellDensity(self.tiling, tiles.corrected(self.table, factors))

    def draw(self, count: int) -> Pool:
        """Draw pixels, with their densities p / u."""
        entry, probability = tiles.draw(self.table, count, self.pixels.generator)
        pool, kept = self.grid.draw_within(self.tiling.cell(entry))
        return pool._replace(density=self.pixels.relative(probability / kept, pool))

    def density(self, pool: Pool) -> Float[Tensor, " n"]:
        """Density p / u of kept pixels, wherever they come from."""
        probability = tiles.probability(self.table, self.tiling.entry(pool))
        return self.pixels.relative(probability / self.grid.num_kept(self.grid.cell(pool)), pool)
