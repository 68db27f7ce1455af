"""What every way of choosing pixels shares: two verbs, draw and update, and maps of the cached images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining.langevin import Pool
from nerfstudio_softmining.sampling.feedback import MiningBatch
from nerfstudio_softmining.sampling.grid import Grid
from nerfstudio_softmining.sampling.pixels import CachedPixels, pixel

FLAG = "--pipeline.datamanager.pixel-sampler"


@dataclass(frozen=True)
class Flags:
    """How messages name settings."""

    setting: str = FLAG + ".{kind}.{name}"
    """A setting of one kind of sampler."""
    batch: str = "--pipeline.datamanager.train-num-rays-per-batch"
    """Rays of a batch."""
    map_memory: str = FLAG + ".map-memory"
    """Memory of a map."""

    def of(self, kind: str, name: str) -> str:
        """The flag of a field of a kind's settings."""
        return self.setting.format(kind=kind, name=name.replace("_", "-"))


@dataclass
class StrategyConfig:
    """Settings of one way of choosing pixels."""

    positive: ClassVar[tuple[str, ...]] = ()
    """Whole numbers that can not be 0."""
    needed: ClassVar[tuple[str, ...]] = ()
    """Shares that can not be 0."""
    alpha_warmup: ClassVar[int] = 0
    """Training steps over which alpha rises from 0."""

    def check(self, kind: str, flags: Flags = Flags()) -> None:  # noqa: B008
        """Refuse what makes no sense: shares out of [0, 1], anything else below 0.

        Raises:
            UserError: naming the flag, its value and what it may be.
        """
        for field in fields(self):
            value, flag = getattr(self, field.name), flags.of(kind, field.name)
            if field.name.endswith("share") and not 0 <= value <= 1:
                raise UserError(f"{flag} is {value}: a share lies in [0, 1], such as 0.1.")
            if field.name in self.needed and value == 0:
                raise UserError(f"{flag} is {value}: it lies above 0, such as 0.2.")
            if field.name in self.positive and value < 1:
                raise UserError(f"{flag} is {value}: it is a whole number of 1 or more.")
            if isinstance(value, int | float) and not value >= 0:
                raise UserError(f"{flag} is {value}: it is 0 or more. Set 0 to switch it off.")


@dataclass
class Surroundings:
    """What a strategy may ask of the training it is part of."""

    num_images: int
    """Number of images of the data set."""
    generator: torch.Generator
    """Source of randomness on the images' device."""
    cell_side: int
    """Side in pixels of the cells of maps."""
    map_memory: float
    """Memory in gigabytes that a map may take."""
    evaluate: Callable[[Int64[Tensor, "n 3"]], Float[Tensor, " n"]] | None = None
    """Gives Q of any pixels (image, row, column) with the network as it is."""
    flags: Flags = Flags()
    """How messages name settings."""


class Strategy:
    """A way of choosing pixels. Draws rays, and is told how they fared.

    Args:
        config: its settings.
        kind: its name on the command line.
        surroundings: what it may ask of the training it is part of.
    """

    wants_gradient = False
    """Whether it needs the gradient with respect to the pixel coordinates."""
    _told_of_coarsening = False

    def __init__(self, config: Any, kind: str, surroundings: Surroundings) -> None:
        self.config, self.kind, self.surroundings = config, kind, surroundings

    def cache(self, pixels: CachedPixels) -> None:
        """Take up the images that nerfstudio has cached, at first and whenever they change."""
        self.pixels = pixels

    def draw(self, count: int) -> tuple[Pool, int]:
        """Draw the rays of a batch with their densities; and how many of them, the last, are uniform."""
        raise NotImplementedError

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        """Hear how a batch fared, as the backward pass has left it; and whether the optimizers took the step."""

    def state_dict(self) -> dict:
        """What a checkpoint has to keep."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint; the images are cached already."""

    def num_of_share(self, name: str, rays: int) -> int:
        """How many rays of a batch a share of the settings stands for.

        Raises:
            UserError: if it rounds to none or all of them when it is neither 0 nor 1.
        """
        share = getattr(self.config, name)
        number = round(share * rays)
        if (share > 0 and number == 0) or (share < 1 and number == rays):
            raise UserError(
                f"a batch of {rays} rays is too small for its strata: {self.surroundings.flags.of(self.kind, name)} "
                f"{share} makes {number} of them uniform. Set {self.surroundings.flags.batch} to "
                f"{math.ceil(0.5 / min(share, 1 - share)) + 1} or more."
            )
        return number

    def make_grid(self, what: str, bytes_per_cell: float) -> Grid:
        """The grid of a map over the cached images, coarser than asked for where it would take too much memory."""
        asked = side = self.surroundings.cell_side
        budget = self.surroundings.map_memory * 1e9
        while side < 1024 and self.pixels.num_pixels / side**2 * bytes_per_cell > budget:
            side += 1
        if side > asked and not self._told_of_coarsening:
            self._told_of_coarsening = True
            CONSOLE.print(
                f"[yellow]{self.pixels.num_pixels / 1e6:,.0f} million pixels: {what} are kept in cells of {side} x "
                f"{side} pixels instead of {asked} x {asked} to fit {self.surroundings.map_memory} GB "
                f"({self.surroundings.flags.map_memory}).[/yellow]"
            )
        return Grid.of_side(self.pixels, side)


class CellDensity:
    """A density over the kept pixels of all cached images that is the same all over a cell."""

    def __init__(self, grid: Grid, table: dens.DiscreteDensity) -> None:
        self.pixels, self.grid, self.table = grid.pixels, grid, table

    @classmethod
    def of_weights(cls, grid: Grid, weights: Callable[[int], Float[Tensor, "h w"]], description: str) -> CellDensity:
        """Made from weights in [0, 1] of the pixels of each slot, relative to a uniform draw."""
        pixels = grid.pixels
        codes = torch.empty(grid.num_cells, dtype=torch.uint8, device=pixels.device)
        for slot in pixels.each_slot(description):
            sums = grid.sums(slot, weights(slot) * pixels.mass(slot))
            codes[grid.part(slot)] = dens.encode(sums / grid.side**2)
        return cls(grid, dens.tabulate(codes))

    def is_empty(self) -> bool:
        """Whether there is nothing to draw. Waits for the device."""
        return int(dens.total(self.table)) == 0

    def draw(self, count: int) -> Pool:
        """Draw pixels, with their densities p / u."""
        cell, probability = dens.draw(self.table, count, self.pixels.generator)
        pool, kept = self.grid.draw_within(cell)
        return pool._replace(density=self.pixels.relative(probability / kept, pool))

    def density(self, pool: Pool) -> Float[Tensor, " n"]:
        """Density p / u of kept pixels, wherever they come from."""
        cell = self.grid.cell(pool)
        return self.pixels.relative(dens.probability(self.table, cell) / self.grid.num_kept(cell), pool)


class MapStrategy(Strategy):
    """Draws from a density that it knows, beside a share of uniform rays.

    Every ray's density is that of the mixture of both, so that weights are exact and bounded by 1 / uniform share.
    """

    map: CellDensity | None = None
    """The density; None while all rays are uniform."""

    def draw(self, count: int) -> tuple[Pool, int]:
        batches, num_uniform = self.batches(1, count)
        return Pool(*(part[0] for part in batches)), num_uniform

    def batches(self, times: int, count: int) -> tuple[Pool, int]:
        """Draw several batches at once, as a draw of many costs little more than one of few.

        Returns:
            A pool whose tensors begin with [times, count], and how many of each batch, the last, are uniform.
        """
        num_uniform = self.num_of_share("uniform_share", count) if getattr(self.config, "uniform_share", 0.0) else 0
        if self.map is None or num_uniform == count:
            uniform = self.pixels.uniform(times * count)
            return Pool(*(part.unflatten(0, (times, count)) for part in uniform)), count
        # draws may be in order: each batch has its share of all of them
        drawn = self.map.draw(times * (count - num_uniform))
        if num_uniform == 0:
            return Pool(*(part.unflatten(0, (-1, times)).transpose(0, 1) for part in drawn)), 0
        uniform = self.pixels.uniform(times * num_uniform)
        uniform = uniform._replace(density=self.map.density(uniform))
        rays = Pool(
            *(
                torch.cat((part.unflatten(0, (-1, times)).transpose(0, 1), rest.unflatten(0, (times, -1))), dim=1)
                for part, rest in zip(drawn, uniform, strict=True)
            )
        )
        share = num_uniform / count
        return rays._replace(density=share + (1 - share) * rays.density), num_uniform


def rays_of(feedback: MiningBatch, device: torch.device) -> Pool:
    """The rays of a batch as a pool at the centres of their pixels."""
    indices = feedback.indices.to(device)
    return Pool(indices[:, 0], indices[:, 1:] + 0.5, feedback.density.to(device))


def indices_of(pool: Pool) -> Int64[Tensor, "n 3"]:
    """Image, row and column of each ray."""
    return torch.cat((pool.chart[:, None], pixel(pool)), dim=-1)


def concatenate(first: Pool, second: Pool) -> Pool:
    """One pool after the other."""
    return Pool(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
