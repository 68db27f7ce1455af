"""Active ray sampling after the idea of ActRay (Wu et al., SIGGRAPH Asia 2023), from its published description."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining.langevin import Pool
from nerfstudio_softmining.sampling.feedback import MiningBatch
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.projection import project, supported
from nerfstudio_softmining.sampling.strategy import CellDensity, MapStrategy, StrategyConfig, rays_of

PER_FOLD = 254 / dens.OCTAVES / math.log(2)
"""Steps of a byte's scale for a factor of e."""
ROOM = 64
"""Steps by which the weights of cells just visited sink before all weights are raised again."""
SCALE = math.exp(-ROOM / PER_FOLD)
"""Factor from an error to its weight, so that a byte has room for staleness."""


@dataclass
class ActiveConfig(StrategyConfig):
    """Loss times exp(staleness), the loss carried over to other views (after ActRay)."""

    staleness: float = 1.0
    """Rise of the exponent of a cell that is not visited, while as many rays are drawn as there are cells."""
    spread: int = 4
    """Other views, drawn for each ray, to which its loss is carried over by projecting the surface point that it
    sees."""
    reweighted: bool = False
    """Weigh rays by their density (eq. 9); the original does not."""


class ActiveStrategy(MapStrategy):
    """Draws cells by the Q last seen or estimated there times exp(staleness).

    The first batch is uniform, and its mean Q is what is assumed of cells not visited yet. All that is not visited
    rises by the same factor; instead of raising it, what is visited is sunk, and all weights are raised now and then,
    which is amortised to less than a cell for each ray. Takes 0.57 bytes a training pixel in cells of 2 x 2.
    """

    config: ActiveConfig

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._sunk = 0.0
        self._guess: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, float]] = {}
        """Bytes of error and weight of each cell [2, cells] and how far others had sunk, for images seen before."""
        self._told = False

    def cache(self, pixels: CachedPixels) -> None:
        self._kept = self._snapshot()
        super().cache(pixels)
        self.grid = self.make_grid("errors", dens.bytes_per_entry(2))
        cameras = self.surroundings.cameras
        can_spread = cameras is not None and supported(cameras)
        self._cameras = cameras.to(pixels.device) if cameras is not None and can_spread and self.config.spread else None
        if self.config.spread and not can_spread and not self._told:
            CONSOLE.print("[yellow]Errors are not carried over to other views: their type of camera is not known.")
            self._told = True
        if self._guess is not None:
            self._build(self._guess)

    def _build(self, guess: Tensor) -> None:
        """Make the map of the cached images; those not seen before have the guessed error all over."""
        pixels, grid = self.pixels, self.grid
        self._guess = guess
        self.error = torch.empty(grid.num_cells, dtype=torch.uint8, device=pixels.device)
        codes = torch.empty_like(self.error)
        for slot, image in enumerate(pixels.image_idx.tolist()):
            part = grid.part(slot)
            kept, sunk = self._kept.get(image, (None, 0.0))
            if kept is not None and kept.shape[1] == part.stop - part.start:
                self.error[part], code = kept.to(pixels.device)
                # as stale as it was when it was left
                moved = (code.int() + round(sunk) - round(self._sunk)).clamp(1, 255).to(torch.uint8)
                codes[part] = torch.where(code > 0, moved, 0)
            else:
                self.error[part] = dens.encode(guess * SCALE).clamp_min(1)
                codes[part] = self._code(grid.masses(slot), self.error[part], round(self._sunk))
        self.map = CellDensity(grid, dens.tabulate(codes))
        cached = set(pixels.image_idx.tolist())
        self._kept = {image: kept for image, kept in self._kept.items() if image not in cached}

    def _code(self, mass: Float[Tensor, " n"], error: UInt8[Tensor, " n"], sunk: int) -> UInt8[Tensor, " n"]:
        """Byte of the weight of cells: their error times their mass, sunk by some steps."""
        code = error.int() + (mass.log2() * (254 / dens.OCTAVES)).round() - sunk
        return torch.where(mass > 0, code.clamp(1, 255), 0).to(torch.uint8)

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        assert feedback.importance is not None
        rays = rays_of(feedback, self.pixels.device)
        importance = feedback.importance.to(self.pixels.device)
        if self.map is None:
            self._build(importance.nan_to_num(1.0, 1.0).mean())
        assert self.map is not None
        table, cell = self.map.table, self.grid.cell(rays)
        told = importance.isfinite() & applied
        error = torch.where(told, dens.encode(importance * SCALE).clamp_min(1), self.error[cell])
        code = torch.where(told, self._code(self.grid.mass(cell), error, round(self._sunk)), table.codes[cell])
        changed = cell
        if self._cameras is not None:
            changed = torch.cat((cell, self._spread(feedback, cell, error, told)))
        # what is seen counts more than what is carried over
        self.error[cell], table.codes[cell] = error, code
        dens.replace(table, changed, table.codes[changed])

        self._sunk += self.config.staleness * PER_FOLD * len(rays.chart) / self.grid.num_cells
        if self._sunk >= ROOM:
            times, self._sunk = divmod(self._sunk, ROOM)
            for part in table.codes.split(dens.CHUNK):
                part.copy_(dens.scale(part, SCALE**-times))
            self.map = CellDensity(self.grid, dens.tabulate(table.codes))

    def _spread(
        self, feedback: MiningBatch, cell: Int64[Tensor, " n"], error: UInt8[Tensor, " n"], told: Tensor
    ) -> Int64[Tensor, " m"]:
        """Carry errors over to other views, whose cells stay as stale as they are; returns the cells changed."""
        assert self.map is not None and self._cameras is not None
        assert feedback.origins is not None and feedback.directions is not None and feedback.depth is not None
        pixels, codes, times = self.pixels, self.map.table.codes, self.config.spread
        points = (feedback.origins + feedback.directions * feedback.depth[:, None]).to(pixels.device)
        points, cell, error, told = (part.repeat_interleave(times, dim=0) for part in (points, cell, error, told))
        slot = torch.randint(pixels.num_slots, cell.shape, generator=self.surroundings.generator, device=pixels.device)
        view = pixels.image_idx[slot]
        position, visible = project(self._cameras, view, points)
        seen = Pool(view, position, torch.ones_like(points[:, 0]))
        visible = visible & told & pixels.contains(seen)
        on_image = torch.where(visible[:, None], position, 0.0)
        there = torch.where(visible, self.grid.cell(seen._replace(position=on_image)), cell)
        moved = (codes[there].int() + error - self.error[there].int()).clamp(1, 255)
        codes[there] = torch.where(visible, moved, codes[there].int()).to(torch.uint8)
        self.error[there] = torch.where(visible, error, self.error[there])
        return there

    def _snapshot(self) -> dict[int, tuple[Tensor, float]]:
        """The map, by image."""
        kept = dict(self._kept)
        if self.map is not None:
            both = torch.stack((self.error, self.map.table.codes)).cpu()
            for slot, image in enumerate(self.pixels.image_idx.tolist()):
                kept[image] = both[:, self.grid.part(slot)].clone(), self._sunk
        return kept

    def state_dict(self) -> dict:
        return {"sunk": self._sunk, "guess": self._guess, "kept": self._snapshot()}

    def load_state_dict(self, state: dict) -> None:
        self._sunk, self._kept, self.map, guess = state["sunk"], state["kept"], None, state["guess"]
        if guess is not None:
            self._build(guess.to(self.pixels.device))
