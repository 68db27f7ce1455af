"""The paper's sampler: a pool of Langevin chains, and a share of uniform rays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import edges, langevin
from nerfstudio_softmining.mining.langevin import Pool
from nerfstudio_softmining.sampling.detail import FLOOR
from nerfstudio_softmining.sampling.feedback import MiningBatch
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.strategy import CellDensity, Strategy, StrategyConfig, concatenate

WEIGHTS = {"edges": edges.sobel, "detail": lambda image: edges.laplacian(image) + FLOOR}
"""What the starts of chains are in proportion to, in an image."""
RESERVOIR = 1 << 12
"""Starts that are drawn at a time, as a draw of many costs little more than one of few."""


@dataclass
class LangevinConfig(StrategyConfig):
    """Chains that walk towards the error (section 3.3)."""

    drift: float = 2e-6
    """Step size a of eq. 10 along the gradient of log Q, in squared image sides; 2e-6 is the 2e1 of the paper's
    NeRFs."""
    noise: float = 2e-2
    """Step size b of eq. 10: standard deviation of a random step, in image sides (geometric mean of height and
    width)."""
    uniform_share: float = 0.1
    """Share of each batch that is drawn uniformly over all images, in [0, 1] (section 4.1)."""
    reinit_share: float = 0.1
    """Share of the chains, those of the lowest Q, that start anew after each step, in [0, 1] (section 4.1)."""
    reinit_from: Literal["edges", "uniform", "detail"] = "edges"
    """Where chains start anew: in proportion to Sobel's edges (section 4.1), uniformly (section 3.3), or in proportion
    to the local detail that the kind detail starts from."""
    reweighted: bool = True
    """Weigh rays by their density (eq. 9)."""
    alpha_warmup: int = 1000
    """Training steps over which alpha rises from 0 (section 3.3)."""


class LangevinStrategy(Strategy):
    """A pool with a chain for every ray that is not drawn uniformly.

    It keeps its chains when the batch shrinks, and grows by uniform draws. Takes 0.32 bytes a training pixel for the
    edges, in cells of 2 x 2; a step costs O(batch).
    """

    config: LangevinConfig
    pool: Pool | None = None
    _drawn: Pool | None = None
    """Starts that are drawn and not used yet."""

    @property
    def wants_gradient(self) -> bool:  # type: ignore[override]
        """Without drift no gradient is needed."""
        return self.config.drift > 0

    def cache(self, pixels: CachedPixels) -> None:
        super().cache(pixels)
        self.starts = self._drawn = None
        if self.config.reinit_from != "uniform":
            what, weights = self.config.reinit_from, WEIGHTS[self.config.reinit_from]
            grid = self.make_grid(what, dens.bytes_per_entry())
            self.starts = CellDensity.of_weights(grid, lambda slot: weights(pixels.image(slot)), f"Finding {what}")
            if self.starts.is_empty():
                self.starts = None
        if self.pool is not None:
            self.pool = self._on_cached_images(self.pool)

    def draw(self, count: int) -> tuple[Pool, int]:
        num_uniform = self.num_of_share("uniform_share", count)
        chains = self._grown_pool(count - num_uniform)
        return concatenate(chains, self.pixels.uniform(num_uniform)), num_uniform

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        count = len(feedback.indices) - feedback.num_uniform
        if count == 0:
            return
        assert self.pool is not None and feedback.importance is not None
        device = self.pool.position.device
        chains = Pool(*(part[:count] for part in self.pool))
        # on a panorama the chains follow Q by solid angle
        solid_angle, gradient = self.pixels.solid_angle(chains)
        if feedback.coords is None:
            gradient = torch.zeros_like(gradient)
        else:
            assert feedback.coords.grad is not None
            assert feedback.weighted_error is not None and feedback.weighted_error.grad is not None
            gradient = gradient + langevin.grad_log_importance(
                feedback.coords.grad[:count],
                feedback.weighted_error.grad[:count],
                feedback.weighted_error.detach()[:count],
            ).to(device)
        side = self.pixels.side(chains)
        moved, _ = langevin.step(
            chains,
            gradient,
            feedback.importance[:count].to(device) * solid_angle,
            self,
            drift=self.config.drift * side.square(),
            noise=self.config.noise * side,
            reinit_share=self.config.reinit_share,
            generator=self.surroundings.generator,
        )
        if isinstance(applied, Tensor):
            moved = langevin.select(applied.to(device), moved, chains)
        elif not applied:
            moved = chains
        self.pool = concatenate(moved, Pool(*(part[count:] for part in self.pool)))

    def contains(self, pool: Pool):
        """Whether each chain is on a cached image, within its frame and not masked."""
        return self.pixels.contains(pool)

    def propose(self, count: int) -> Pool:
        """Draw the starts of re-initialised chains; uniformly where nothing stands out."""
        if self.starts is None:
            return self.pixels.uniform(count)
        starts = self._drawn
        if starts is None or len(starts.chart) < count:
            starts = self.starts.draw(max(count, RESERVOIR))
        self._drawn = Pool(*(part[count:] for part in starts))
        return Pool(*(part[:count] for part in starts))

    def state_dict(self) -> dict:
        if self.pool is None:
            return {}
        starts = None if self._drawn is None else {name: part.clone() for name, part in self._drawn._asdict().items()}
        return {"pool": self.pool._asdict(), "starts": starts}

    def load_state_dict(self, state: dict) -> None:
        if state:
            pool = Pool(**{name: part.to(self.pixels.device) for name, part in state["pool"].items()})
            self.pool = self._on_cached_images(pool)
            if state["starts"] is not None:
                self._drawn = Pool(**{name: part.to(self.pixels.device) for name, part in state["starts"].items()})

    def _on_cached_images(self, pool: Pool) -> Pool:
        """The pool, with chains on images that are not cached started anew."""
        return langevin.select(self.contains(pool), pool, self.propose(len(pool.chart)))

    def _grown_pool(self, count: int) -> Pool:
        """The first `count` chains, after the pool has grown to at least as many."""
        if self.pool is None:
            self.pool = self.pixels.uniform(count)
        missing = count - len(self.pool.chart)
        if missing > 0:
            self.pool = concatenate(self.pool, self.pixels.uniform(missing))
        return Pool(*(part[:count] for part in self.pool))
