"""Images parted into cells, whatever their sizes and masks: where maps keep what they know."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from nerfstudio_softmining.mining.langevin import Pool
from nerfstudio_softmining.sampling.pixels import CachedPixels, nth, pixel


class Grid:
    """Cells that part each cached image into rows and columns, as evenly as whole pixels allow.

    Takes no memory that grows with the number of cells.

    Args:
        pixels: the cached images.
        shapes: rows and columns of cells of each image, at most its height and width.
    """

    def __init__(self, pixels: CachedPixels, shapes: Sequence[tuple[int, int]]) -> None:
        self.pixels, self.shapes = pixels, list(shapes)
        self.side = max(
            math.ceil(size / count)
            for sizes, counts in zip(pixels.sizes, shapes, strict=True)
            for size, count in zip(sizes, counts, strict=True)
        )
        """The largest height or width of a cell."""
        self.rows, self.columns = torch.tensor(self.shapes, device=pixels.device).unbind(-1)
        self.ends = (self.rows * self.columns).cumsum(0)
        self.start = self.ends - self.rows * self.columns
        self.starts = [0, *itertools.accumulate(rows * columns for rows, columns in self.shapes)]
        """Where the cells of each image begin in the row of all cells, on the host."""
        self.num_cells = self.starts[-1]

    @classmethod
    def of_side(cls, pixels: CachedPixels, side: int) -> Grid:
        """The grid whose cells are at most `side` pixels high and wide."""
        return cls(pixels, [(math.ceil(height / side), math.ceil(width / side)) for height, width in pixels.sizes])

    def part(self, slot: int) -> slice:
        """Where the cells of an image are in the row of all cells."""
        return slice(self.starts[slot], self.starts[slot + 1])

    def cell(self, pool: Pool) -> Int64[Tensor, " n"]:
        """The cell that each chain is in."""
        slot = self.pixels.slot[pool.chart]
        return self.cell_of(slot, pixel(pool))

    def cell_of(self, slot: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"]) -> Int64[Tensor, " n"]:
        """The cell that each pixel is in."""
        row, column = self.place_of(slot, pixels)
        return self.start[slot] + row * self.columns[slot] + column

    def place_of(self, slot: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"]) -> tuple[Tensor, Tensor]:
        """Row and column of that cell on its image."""
        row = pixels[:, 0] * self.rows[slot] // self.pixels.height[slot]
        return row, pixels[:, 1] * self.columns[slot] // self.pixels.width[slot]

    def _rectangle(self, cell: Int64[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Slot of some cells [n], their first pixels [n, 2] and the ends of their rows and columns [n, 2]."""
        slot = torch.searchsorted(self.ends, cell, right=True)
        local, columns = cell - self.start[slot], self.columns[slot]
        number = torch.stack((local // columns, local % columns), dim=-1)
        counts = torch.stack((self.rows[slot], columns), dim=-1)
        size = torch.stack((self.pixels.height[slot], self.pixels.width[slot]), dim=-1)
        return slot, -(-number * size // counts), -(-(number + 1) * size // counts)

    def first(self, cell: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, "n 2"]]:
        """Slot of each cell, and its first row and column there."""
        return self._rectangle(cell)[:2]

    def _kept(self, slot: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """All pixels of some cells [n, side^2, 2], and which of these are theirs and kept [n, side^2]."""
        within = torch.arange(self.side, device=slot.device)
        pixels = first[:, None] + torch.cartesian_prod(within, within)
        theirs = (pixels < end[:, None]).all(dim=-1)
        pixels = pixels.minimum(end[:, None] - 1)
        return pixels, theirs & self.pixels.kept(slot[:, None].expand(pixels.shape[:2]), pixels)

    def num_kept(self, cell: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """How many pixels of each cell may be drawn."""
        slot, first, end = self._rectangle(cell)
        if self.pixels.all_kept:
            return (end - first).prod(dim=-1)
        return self._kept(slot, first, end)[1].sum(dim=1)

    def mass(self, cell: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
        """What a uniform draw of each cell is in proportion to, in [0, 1]."""
        slot, first, _ = self._rectangle(cell)
        share = self.num_kept(cell) / self.side**2
        return share * (self.pixels.base(slot, first) / self.pixels.largest_base)

    def draw_within(self, cell: Int64[Tensor, " n"]) -> tuple[Pool, Int64[Tensor, " n"]]:
        """Draw a kept pixel of each cell, which has to have one, all alike.

        Returns:
            The pixels, with a density of NaN, and how many each could have been.
        """
        slot, first, end = self._rectangle(cell)
        chance = torch.rand(len(cell), generator=self.pixels.generator, device=cell.device)
        if self.pixels.all_kept:
            size = end - first
            count = size.prod(dim=-1)
            rank = (chance * count).long().minimum(count - 1)
            chosen = first + torch.stack((rank // size[:, 1], rank % size[:, 1]), dim=-1)
        else:
            pixels, theirs = self._kept(slot, first, end)
            count = theirs.sum(dim=1)
            rank = (chance * count).long().minimum(count - 1)
            chosen = pixels[torch.arange(len(cell), device=cell.device), nth(theirs, rank)]
        return self.pixels.at(slot, chosen, torch.full_like(chance, torch.nan)), count

    def masses(self, slot: int) -> Float[Tensor, " cells"]:
        """The [mass][] of all cells of one image."""
        return self.sums(slot, self.pixels.mass(slot)) / self.side**2

    def sums(self, slot: int, values: Float[Tensor, "h w"]) -> Float[Tensor, " cells"]:
        """Sum over the pixels of each cell of one image."""
        (height, width), (rows, columns) = self.pixels.sizes[slot], self.shapes[slot]
        device = values.device
        row = torch.arange(height, device=device) * rows // height
        column = torch.arange(width, device=device) * columns // width
        down = torch.zeros(rows, width, device=device).index_add_(0, row, values)
        return torch.zeros(rows, columns, device=device).index_add_(1, column, down).flatten()
