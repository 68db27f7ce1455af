"""Grids of cells over the training images, and the density over pixels that is constant within each cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.samplers.images import PixelSamples, TrainingImages, nth


class Grid:
    """Cells that split each cached image into rows and columns, as evenly as whole pixels allow.

    Cells are numbered image by image. Where `tile_side` is above 1 they are numbered by square tiles, and row by row
    within a tile; tiles at the lower and right rims then have places without a cell. Takes no memory that grows with
    the number of cells.

    Args:
        images: the training images.
        shapes: rows and columns of cells of each image, at most its height and width.
        tile_side: cells along the side of a tile, a power of two.
        levels: levels of larger tiles, each twice the one before, that [tile_parents][] gives.
    """

    def __init__(
        self, images: TrainingImages, shapes: Sequence[tuple[int, int]], tile_side: int = 1, levels: int = 0
    ) -> None:
        self.images, self.shapes, self.tile_side = images, list(shapes), tile_side
        assert tile_side & (tile_side - 1) == 0, f"tile_side is {tile_side}, which is not a power of two"
        self._bits = tile_side.bit_length() - 1  # CPUs shift whole numbers ten times as fast as they divide them
        self.cell_size = max(
            math.ceil(size / count)
            for sizes, counts in zip(images.sizes, shapes, strict=True)
            for size, count in zip(sizes, counts, strict=True)
        )
        """The largest height or width of a cell, in pixels."""
        self.rows, self.columns = torch.tensor(self.shapes, device=images.device).unbind(-1)
        self.tile_shapes = [(math.ceil(rows / tile_side), math.ceil(columns / tile_side)) for rows, columns in shapes]
        """Rows and columns of tiles of each image."""
        # made once, as a correction must not copy anything to the device
        level_shapes, self._layouts = self.tile_shapes, []
        for _ in range(levels + 1):
            self._layouts.append((sum(rows * columns for rows, columns in level_shapes), *self._layout(level_shapes)))
            level_shapes = [((rows + 1) // 2, (columns + 1) // 2) for rows, columns in level_shapes]
        _, self._tile_columns, self._tile_start, self._tile_ends = self._layouts[0]
        self._starts = [0, *itertools.accumulate(rows * columns for rows, columns in self.tile_shapes)]
        self.num_tiles = self._starts[-1]
        self.num_cells = self.num_tiles * tile_side**2

    @classmethod
    def with_cell_size(cls, images: TrainingImages, cell_size: int, tile_side: int = 1, levels: int = 0) -> Grid:
        """Make the grid whose cells are at most `cell_size` pixels high and wide."""
        shapes = [(math.ceil(height / cell_size), math.ceil(width / cell_size)) for height, width in images.sizes]
        return cls(images, shapes, tile_side, levels)

    def _layout(self, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the columns of each image's tiles, and the first and last of all tiles that are its own."""
        rows, columns = torch.tensor(shapes, device=self.images.device).unbind(-1)
        ends = (rows * columns).cumsum(0)
        return columns, ends - rows * columns, ends

    def tile_slice(self, cache_index: int) -> slice:
        """Return which of all tiles are those of an image."""
        return slice(self._starts[cache_index], self._starts[cache_index + 1])

    def cell_slice(self, cache_index: int) -> slice:
        """Return which of all cells are those of an image."""
        start, end = self._starts[cache_index : cache_index + 2]
        return slice(start * self.tile_side**2, end * self.tile_side**2)

    def cells_of(self, cache_index: int) -> Int64[Tensor, " n"]:
        """Return all cells of an image."""
        cells = self.cell_slice(cache_index)
        return torch.arange(cells.start, cells.stop, device=self.images.device)

    def cell(self, samples: PixelSamples) -> Int64[Tensor, " n"]:
        """Return the cell that each sample is in."""
        return self.cell_at(self.images.cache_index[samples.image_index], samples.pixels)

    def tile(self, samples: PixelSamples) -> Int64[Tensor, " n"]:
        """Return the tile that each sample is in."""
        return self.tile_of(self.cell(samples))

    def tile_of(self, cell: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return the tile that each cell is in."""
        return cell >> 2 * self._bits

    def cell_at(self, cache_index: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"]) -> Int64[Tensor, " n"]:
        """Return the cell that each pixel is in."""
        row, column = pixels.unbind(-1)
        if self.cell_size > 1:
            row = row * self.rows[cache_index] // self.images.height[cache_index]
            column = column * self.columns[cache_index] // self.images.width[cache_index]
        bits, within = self._bits, self.tile_side - 1
        tile = self._tile_start[cache_index] + (row >> bits) * self._tile_columns[cache_index] + (column >> bits)
        return (tile << 2 * bits) + ((row & within) << bits) + (column & within)

    def _rectangle(self, cell: Int64[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cache index of cells [n], their first pixels [n, 2] and the ends of rows and columns [n, 2]."""
        bits, within = self._bits, self.tile_side - 1
        tile = self.tile_of(cell)
        cache_index = torch.searchsorted(self._tile_ends, tile, right=True)
        local, tile_columns = tile - self._tile_start[cache_index], self._tile_columns[cache_index]
        tile_row = local // tile_columns
        row = (tile_row << bits) + (cell >> bits & within)
        column = (local - tile_row * tile_columns << bits) + (cell & within)
        number = torch.stack((row, column), dim=-1)
        if self.cell_size == 1:
            return cache_index, number, number + 1
        counts = torch.stack((self.rows[cache_index], self.columns[cache_index]), dim=-1)
        size = torch.stack((self.images.height[cache_index], self.images.width[cache_index]), dim=-1)
        return cache_index, -(-number * size // counts), -(-(number + 1) * size // counts)

    def first_pixels(self, cell: Int64[Tensor, " n"]) -> Int64[Tensor, "n 2"]:
        """Return the first row and column of each cell on its image."""
        return self._rectangle(cell)[1]

    def _valid_pixels(self, cache_index: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Return all pixels of cells [n, size^2, 2], and which of them are within the cell and valid [n, size^2]."""
        within = torch.arange(self.cell_size, device=cache_index.device)
        pixels = first[:, None] + torch.cartesian_prod(within, within)
        is_within = (pixels < end[:, None]).all(dim=-1)
        pixels = pixels.minimum(end[:, None] - 1)
        return pixels, is_within & self.images.valid(cache_index[:, None].expand(pixels.shape[:2]), pixels)

    def num_valid(self, cell: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Count the valid pixels of each cell."""
        if self.images.all_valid and self.cell_size == 1:
            return torch.ones_like(cell)
        cache_index, first, end = self._rectangle(cell)
        if self.images.all_valid:
            return (end - first).prod(dim=-1)
        return self._valid_pixels(cache_index, first, end)[1].sum(dim=1)

    def draw_within(self, cell: Int64[Tensor, " n"]) -> tuple[PixelSamples, Int64[Tensor, " n"]]:
        """Sample one valid pixel uniformly per cell. Each cell must have one.

        Returns:
            The samples, and the number of valid pixels of each cell.
        """
        cache_index, first, end = self._rectangle(cell)
        if self.images.all_valid and self.cell_size == 1:
            return self.images.samples_at(cache_index, first), torch.ones_like(cell)
        chance = torch.rand(len(cell), generator=self.images.generator, device=cell.device)
        if self.images.all_valid:
            size = end - first
            count = size.prod(dim=-1)
            rank = (chance * count).long().minimum(count - 1)
            chosen = first + torch.stack((rank // size[:, 1], rank % size[:, 1]), dim=-1)
        else:
            pixels, is_valid = self._valid_pixels(cache_index, first, end)
            count = is_valid.sum(dim=1)
            rank = (chance * count).long().minimum(count - 1)
            chosen = pixels[torch.arange(len(cell), device=cell.device), nth(is_valid, rank)]
        return self.images.samples_at(cache_index, chosen), count

    def pixel_weights(self, cache_index: int) -> Float[Tensor, " cells"]:
        """Return the weight in [0, 1] of each cell of an image in a uniform draw."""
        if self.images.is_even:
            return self.valid_fraction(cache_index)
        return self.sums(cache_index, self.images.pixel_weight(cache_index)) / self.cell_size**2

    def valid_fraction(self, cache_index: int) -> Float[Tensor, " cells"]:
        """Return the number of valid pixels of each cell of an image, over that of the largest cells."""
        if not self.images.all_valid:
            return self.sums(cache_index, self.images.valid_mask(cache_index).float()) / self.cell_size**2
        down, right = (
            torch.bincount(torch.arange(size, device=self.images.device) * count // size, minlength=count)
            for size, count in zip(self.images.sizes[cache_index], self.shapes[cache_index], strict=True)
        )
        return self._by_tile(cache_index, down[:, None] * right / self.cell_size**2)

    def sums(self, cache_index: int, values: Float[Tensor, "h w"]) -> Float[Tensor, " cells"]:
        """Sum values over the pixels of each cell of an image; 0 for places without a cell."""
        (height, width), (rows, columns) = self.images.sizes[cache_index], self.shapes[cache_index]
        device = values.device
        row = torch.arange(height, device=device) * rows // height
        column = torch.arange(width, device=device) * columns // width
        down = torch.zeros(rows, width, device=device).index_add_(0, row, values)
        cells = torch.zeros(rows, columns, device=device).index_add_(1, column, down)
        return self._by_tile(cache_index, cells)

    def _by_tile(self, cache_index: int, cells: Float[Tensor, "rows columns"]) -> Float[Tensor, " cells"]:
        """Put the cells of an image in the order of its tiles; 0 for places without a cell."""
        (tile_rows, tile_columns), side = self.tile_shapes[cache_index], self.tile_side
        rows, columns = cells.shape
        cells = F.pad(cells, (0, tile_columns * side - columns, 0, tile_rows * side - rows))
        return cells.view(tile_rows, side, tile_columns, side).transpose(1, 2).flatten()

    def blurred(self, values: Float[Tensor, "m tiles"], kernel: Sequence[float]) -> Float[Tensor, "m tiles"]:
        """Convolve values of the smallest tiles along rows and columns.

        They are 0 outside of an image; the left and right sides of a panorama meet.

        Args:
            values: values of each tile.
            kernel: the half of a symmetric kernel from its centre on, in tiles.
        """
        _, columns, start, ends = self._layouts[0]
        tile = torch.arange(self.num_tiles, device=ends.device)
        index = torch.searchsorted(ends, tile, right=True)
        local, width = tile - start[index], columns[index]
        height = (ends[index] - start[index]) // width
        is_round = self.images.is_equirectangular
        for place, size, stride, wraps in (
            (local // width, height, width, False),
            (local % width, width, 1, is_round),
        ):
            result = kernel[0] * values
            for distance, weight in enumerate(kernel[1:], 1):
                for offset in (-distance, distance):
                    moved = (place + offset) % size if wraps else place + offset
                    is_inside = (moved >= 0) & (moved < size)
                    neighbour = torch.where(is_inside, tile + (moved - place) * stride, 0)
                    result += weight * torch.where(is_inside, values[:, neighbour], 0.0)
            values = result
        return values

    def tile_parents(self) -> list[Int64[Tensor, " _"]]:
        """Return the larger tile that each tile is in, level by level from the smallest tiles."""
        parents = []
        for (count, columns, start, ends), (_, larger_columns, larger_start, _) in itertools.pairwise(self._layouts):
            tile = torch.arange(count, device=ends.device)
            index = torch.searchsorted(ends, tile, right=True)
            local = tile - start[index]
            row, column = local // columns[index] // 2, local % columns[index] // 2
            parents.append(larger_start[index] + row * larger_columns[index] + column)
        return parents


class PixelDensity:
    """A density over the valid pixels of all cached images that is constant within each cell of a grid.

    Args:
        grid: the cells.
        table: their weights; the factors are those of the grid's tiles.
    """

    def __init__(self, grid: Grid, table: dens.TiledDensity) -> None:
        self.images, self.grid, self.table = grid.images, grid, table

    @classmethod
    def from_weights(
        cls, grid: Grid, weights: Callable[[int], Float[Tensor, "h w"]], description: str
    ) -> PixelDensity | None:
        """Make a density from weights of pixels, relative to a uniform draw. Synchronizes with the device.

        Args:
            grid: the cells.
            weights: gives the weights in [0, 1] of the pixels of an image, by its cache index.
            description: what the progress bar shows.

        Returns:
            The density, or None where all weights are 0.
        """
        images = grid.images
        log_weights = torch.empty(grid.num_cells, dtype=torch.uint8, device=images.device)
        for index in images.track(description):
            pixels = weights(index)
            sums = grid.sums(index, pixels if images.is_even else pixels * images.pixel_weight(index))
            log_weights[grid.cell_slice(index)] = dens.encode(sums / grid.cell_size**2)
        return cls.from_cells(grid, log_weights)

    @classmethod
    def from_cells(cls, grid: Grid, weights: Tensor) -> PixelDensity | None:
        """Make a density from the table weights of all cells. Synchronizes with the device.

        Returns:
            The density, or None where all weights are 0.
        """
        tiles = weights.view(-1, grid.tile_side**2) if grid.tile_side > 1 else weights
        table = dens.from_weights(tiles)
        return None if float(dens.total(table)) == 0 else cls(grid, table)

    def with_factors(self, factors: Float[Tensor, " tiles"]) -> PixelDensity:
        """Return the same density with other factors of its tiles."""
        return PixelDensity(self.grid, dens.with_factors(self.table, factors))

    def without_factors(self) -> PixelDensity:
        """Return the weights alone, which [with_factors][] makes a density again. Takes 12 bytes a tile less."""
        table = self.table._replace(factors=self.table.factors[:0].clone(), ends=self.table.ends[:0].clone())
        return PixelDensity(self.grid, table)

    def draw(self, count: int, stratified: bool = False) -> PixelSamples:
        """Draw pixels with their densities p / u.

        Args:
            count: number of draws.
            stratified: whether every tile receives its expected number of draws; they are then ordered by tile.
        """
        draw = dens.draw_stratified if stratified else dens.draw
        cell, probability = draw(self.table, count, self.images.generator)
        samples, num_valid = self.grid.draw_within(cell)
        return samples._replace(density_ratio=self.images.density_ratio(probability / num_valid, samples))

    def density_ratio(self, samples: PixelSamples) -> Float[Tensor, " n"]:
        """Return the density p / u at valid pixels, however they were drawn."""
        cell = self.grid.cell(samples)
        probability = dens.probability(self.table, cell)
        return self.images.density_ratio(probability / self.grid.num_valid(cell), samples)
