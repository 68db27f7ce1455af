"""Ways of choosing points that look at the error of the whole photograph now and then: greedy selection and EVOS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from nerfstudio_softmining.mining.langevin import Pool
from nerfstudio_softmining.sampling.grid import Grid
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.strategy import Strategy, StrategyConfig, Surroundings

SMALLEST = 1e-30
"""Keeps errors of zero from being divided by."""


@dataclass
class FitSurroundings(Surroundings):
    """What a strategy may ask of the fit that it is part of."""

    residual: Callable[[Int64[Tensor, "n 2"]], Float[Tensor, "n c"]] | None = None
    """Gives prediction minus truth of any pixels (row, column) with the field as it is."""
    iterations: int = 1
    """Training steps of the whole fit."""


class EvaluatingStrategy(Strategy):
    """Keeps a number for each cell of the photograph, that comes from the residual of its first pixel."""

    surroundings: FitSurroundings
    _steps = 0
    _next = 0
    values: Tensor | None = None

    def cache(self, pixels: CachedPixels) -> None:
        super().cache(pixels)
        self.grid = Grid.of_side(pixels, self.config.side)

    def draw(self, count: int) -> tuple[Pool, int]:
        if self._steps == self._next:
            cells = torch.arange(self.grid.num_cells, device=self.pixels.device)
            _, first = self.grid.first(cells)
            assert self.surroundings.residual is not None
            residual = self.surroundings.residual(first)
            self.values = self.judge(residual.view(*self.grid.shapes[0], -1)).flatten()
            self._next = self._steps + self.interval()
        self._steps += 1
        return self.choose(count), 0

    def interval(self) -> int:
        """Steps until the next evaluation."""
        return self.config.interval

    def judge(self, residual: Float[Tensor, "h w c"]) -> Float[Tensor, "h w"]:
        """What is kept of the residuals."""
        raise NotImplementedError

    def choose(self, count: int) -> Pool:
        """Draw points by what is kept."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        return {"steps": self._steps, "next": self._next, "values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self._steps, self._next, values = state["steps"], state["next"], state["values"]
        self.values = None if values is None else values.to(self.pixels.device)


@dataclass
class GreedyConfig(StrategyConfig):
    """The pixels of the largest error alone (INT)."""

    positive: ClassVar[tuple[str, ...]] = ("interval", "side")
    needed: ClassVar[tuple[str, ...]] = ("share",)
    reweighted: ClassVar[bool] = False
    share: float = 0.2
    """Share of all pixels that is selected, in (0, 1]."""
    interval: int = 100
    """Steps between two selections."""
    side: int = 1
    """Side in pixels of the cells of which one pixel each is evaluated; 1 evaluates all."""


class GreedyStrategy(EvaluatingStrategy):
    """Selects the pixels of the largest error and draws from these alone, until the next selection.

    Zhang et al., "Nonparametric Teaching of Implicit Neural Representations", ICML 2024, whose batches are whole
    selections; here a batch is drawn from the selection.
    """

    config: GreedyConfig

    def judge(self, residual: Tensor) -> Tensor:
        error = residual.square().sum(dim=-1).flatten()
        return error.topk(max(1, round(self.config.share * len(error))), sorted=False).indices

    def choose(self, count: int) -> Pool:
        assert self.values is not None
        chosen = torch.randint(
            len(self.values), (count,), generator=self.surroundings.generator, device=self.values.device
        )
        pool, _ = self.grid.draw_within(self.values[chosen])
        share = len(self.values) / self.grid.num_cells
        return pool._replace(density=torch.full_like(pool.density, 1 / share))


@dataclass
class EvosConfig(StrategyConfig):
    """Evolution of the selected pixels (EVOS)."""

    positive: ClassVar[tuple[str, ...]] = ("first_interval", "last_interval", "side")
    needed: ClassVar[tuple[str, ...]] = ("selected_share",)
    reweighted: ClassVar[bool] = False
    first_interval: int = 100
    """Steps between two evaluations of the fitness at the start."""
    last_interval: int = 50
    """Steps between two evaluations of the fitness at the end; linear in between."""
    selected_share: float = 0.5
    """Share of the candidates that make up a batch, in (0, 1]."""
    mutated_share: float = 0.5
    """Share of a batch that is drawn from the candidates that are not the fittest, in [0, 1]."""
    side: int = 1
    """Side in pixels of the cells of which one pixel each is evaluated; 1 evaluates all."""


class EvosStrategy(EvaluatingStrategy):
    """Of uniform candidates, the fittest survive, and others are drawn at random among the rest.

    Zhang et al., "EVOS: Efficient Implicit Neural Training via EVOlutionary Selector", CVPR 2025. Sparse fitness
    evaluation: the fitness of all pixels is found anew at intervals that shrink linearly. Frequency-guided crossover:
    fitness is the squared error plus that of the Laplacian, here each over its mean. Unbiased mutation: a share of the
    batch is random. Its candidates are all pixels and its batches half of them; here both are smaller by the same
    factor. Its additional loss on the Laplacian of early steps is no matter of sampling, and left out.
    """

    config: EvosConfig

    def interval(self) -> int:
        first, last = self.config.first_interval, self.config.last_interval
        return max(1, int(first + (last - first) * min(1.0, self._steps / self.surroundings.iterations)))

    def judge(self, residual: Tensor) -> Tensor:
        around = F.pad(residual.permute(2, 0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
        kernel = residual.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        laplacian = F.conv2d(around, kernel[None, None])[:, 0].permute(1, 2, 0)
        errors = (part.square().mean(dim=-1) for part in (residual, laplacian))
        return sum((error / error.mean().clamp_min(SMALLEST) for error in errors), torch.zeros(()))

    def choose(self, count: int) -> Pool:
        assert self.values is not None
        candidates = self.pixels.uniform(round(count / self.config.selected_share))
        order = self.values[self.grid.cell(candidates)].argsort(descending=True)
        mutated = min(round(self.config.mutated_share * count), len(order) - 1)
        fittest, rest = order[: count - mutated], order[count - mutated :]
        chance = torch.rand(len(rest), generator=self.surroundings.generator, device=rest.device)
        chosen = torch.cat((fittest, rest[chance.argsort()[:mutated]]))
        return Pool(*(part[chosen] for part in candidates))


@dataclass
class UniformConfig(StrategyConfig):
    """Uniform draws."""

    reweighted: bool = True
    """Weigh points by their density, which is 1 for all, or by their Q (`uniform-weighted`)."""


class UniformStrategy(Strategy):
    """Draws uniformly over the photograph."""

    def draw(self, count: int) -> tuple[Pool, int]:
        return self.pixels.uniform(count), count
