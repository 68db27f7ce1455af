"""Draws by local detail, corrected by the error of tiles as it becomes known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nerfstudio_softmining.mining import edges, tiles
from nerfstudio_softmining.mining.langevin import Pool
from nerfstudio_softmining.sampling.feedback import MiningBatch
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.strategy import MapStrategy, StrategyConfig
from nerfstudio_softmining.sampling.tiles import TiledCellDensity, Tiling

FLOOR = 0.003
"""Detail that flat places have, in units of the colour."""
GROWTH = 1.25
"""Factor from one interval to the next."""
KEPT = 0.5
"""Share of the weight of all errors seen so far that is kept after a correction."""
LARGEST_RATIO = 64.0
"""Factor between the error of a tile and what is expected of it, at most; what one error beyond measure can do."""
LARGER = 3
"""Sizes of tiles, each twice the one before, that the smallest ones borrow from."""
SMALLEST = 4
"""Side in cells of a tile, at least."""
TILE_BYTES = 28
"""Memory of a tile beside its cells."""
AHEAD = 1 << 15
"""Rays that are drawn at a time: a draw of many costs little more than one of few, as long as it fits the caches."""


@dataclass
class DetailConfig(StrategyConfig):
    """Local detail, corrected by the error of tiles."""

    positive: ClassVar[tuple[str, ...]] = ("interval", "tile")
    uniform_share: float = 0.1
    """Share of each batch that is drawn uniformly over all images, in [0, 1]."""
    floor: float = FLOOR
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

    Takes 0.69 bytes a training pixel, in cells of 2 x 2. The batches of some steps are drawn together, one ray from
    each of as many parts of the same probability, and their errors are taken in together: O(batch) a step. Corrections
    cost O(tiles), at growing intervals.
    """

    config: DetailConfig
    map: TiledCellDensity | None = None

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.interval, self.steps = self.config.interval, 0
        self._ahead: Pool | None = None
        """Batches that are drawn and not used yet."""
        self._num_uniform = 0
        self._heard: list[tuple[Tensor, Tensor]] = []
        """Rays and errors that are not taken in yet."""
        self._kept: dict[int, Tensor] = {}
        """What is known of the tiles of images that have been cached before."""

    def cache(self, pixels: CachedPixels) -> None:
        self._take_in()
        self._kept = self._snapshot()
        super().cache(pixels)
        grid = self.make_grid("details", 1 + TILE_BYTES / SMALLEST**2)
        tiling = Tiling(grid, max(SMALLEST, -(-self.config.tile // grid.side)), LARGER)
        self.map = TiledCellDensity.of_weights(
            tiling, lambda slot: edges.laplacian(pixels.image(slot)) + self.config.floor, "Finding details"
        )
        if self.map.is_empty():
            self.map = None
        self.seen = torch.zeros(3, tiling.num_tiles, device=pixels.device)
        """Sums of the errors of rays in each tile and of what was expected of them, and how many these are."""
        self._ahead = None
        self._restore(self._kept)

    def draw(self, count: int) -> tuple[Pool, int]:
        if self._ahead is None or self._ahead.chart.shape[1] != count:
            times = max(1, min(AHEAD // count, self.interval - self.steps))
            self._ahead, self._num_uniform = self.batches(times, count)
        batch, rest = (Pool(*(part[cut] for part in self._ahead)) for cut in (0, slice(1, None)))
        self._ahead = rest if len(rest.chart) else None
        return batch, self._num_uniform

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        if self.config.correction == 0 or self.map is None:
            return
        assert feedback.importance is not None
        error = feedback.importance.detach()
        if isinstance(applied, Tensor):
            error = torch.where(applied.to(error.device), error, torch.nan)
        if applied is not False:
            self._heard.append((feedback.indices, error))
        self.steps += 1
        if self.steps == self.interval or len(self._heard) * len(error) >= AHEAD:
            self._take_in()
        if self.steps == self.interval:
            self.map = self.map.corrected(self._factors(self.map.tiling))
            self.seen *= KEPT
            self.interval, self.steps, self._ahead = max(int(self.interval * GROWTH), self.interval + 1), 0, None

    def _take_in(self) -> None:
        """Add what has been heard of rays to what was seen of tiles."""
        if not self._heard:
            return
        assert self.map is not None
        indices, error = (torch.cat(parts).to(self.pixels.device) for parts in zip(*self._heard, strict=True))
        self._heard = []
        table, tiling = self.map.table, self.map.tiling
        entry = tiling.entry_of(self.pixels.slot[indices[:, 0]], indices[:, 1:])
        expected = tiles.weight(table, entry).sqrt()
        useful = error.isfinite()
        error, expected = torch.where(useful, torch.stack((error, expected)), 0.0)
        # on the scale of the errors of now: they fall while training, and tiles are seen at different times
        expected = expected * (error.sum() / expected.sum()).nan_to_num(0.0)
        self.seen.index_add_(1, entry // tiling.side**2, torch.stack((error, expected, useful.float())))

    def _factors(self, tiling: Tiling) -> Tensor:
        """What each tile's density is to be multiplied by, after what has been seen."""
        error, expected, rays = self.seen
        ratio = tiles.borrowed(error, expected, tiling.above(), self.config.trust * error.sum() / rays.sum())
        return ratio.nan_to_num(1.0).clamp(1 / LARGEST_RATIO, LARGEST_RATIO).pow(self.config.correction)

    def _snapshot(self) -> dict[int, Tensor]:
        """What was seen of the tiles of each image, and their factors [4, tiles]."""
        kept = dict(self._kept)
        if self.map is not None:
            known = torch.cat((self.seen, self.map.table.factors[None])).cpu()
            for slot, image in enumerate(self.pixels.image_idx.tolist()):
                kept[image] = known[:, self.map.tiling.part(slot)].clone()
        return kept

    def _restore(self, kept: dict[int, Tensor]) -> None:
        """Take up what is known of the cached images, as far as they are of the same size."""
        if self.map is None:
            return
        tiling, factors = self.map.tiling, self.map.table.factors.clone()
        for slot, image in enumerate(self.pixels.image_idx.tolist()):
            part = tiling.part(slot)
            if image in kept and kept[image].shape[1] == part.stop - part.start:
                known = kept[image].to(factors.device)
                self.seen[:, part], factors[part] = known[:3], known[3]
        self.map = self.map.corrected(factors)

    def state_dict(self) -> dict:
        state = {"interval": self.interval, "steps": self.steps, "kept": self._snapshot(), "heard": list(self._heard)}
        ahead = None if self._ahead is None else self._ahead._asdict()
        return state | {"images": self.pixels.image_idx, "ahead": ahead, "num_uniform": self._num_uniform}

    def load_state_dict(self, state: dict) -> None:
        device = self.pixels.device
        self.interval, self.steps, self._kept = state["interval"], state["steps"], state["kept"]
        self._restore(self._kept)
        if not torch.equal(state["images"].to(device), self.pixels.image_idx):
            return
        self._heard = [(indices.to(device), error.to(device)) for indices, error in state["heard"]]
        self._num_uniform = state["num_uniform"]
        if state["ahead"] is not None:
            self._ahead = Pool(**{name: part.to(device) for name, part in state["ahead"].items()})
