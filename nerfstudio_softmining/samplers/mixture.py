"""Metropolis chains, a map of detail and error, and uniform rays in one batch. This plugin's own.

Each part has a role. The chains find where the error is, at the scale of their steps, and within a tile their rays
follow the predicted error. The map, that of [detail][nerfstudio_softmining.samplers.detail], covers detail more
densely. Its rays also propose new starts to the chains. Uniform rays cover what neither expects. All rays are weighted
by the density of the whole mixture, the balance heuristic of Veach and Guibas (SIGGRAPH 1995).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nerfstudio_softmining.errors import SettingError
from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import metropolis
from nerfstudio_softmining.mining.records import concatenate, flatten, take, unflatten, where
from nerfstudio_softmining.samplers.base import MiningBatch, Sampler, SamplerContext, Samples
from nerfstudio_softmining.samplers.cells import PixelDensity
from nerfstudio_softmining.samplers.detail import ERROR_POWER, Detail, DetailConfig, DetailState
from nerfstudio_softmining.samplers.images import PixelSamples, TrainingImages
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.settings import Fraction, Interval


@dataclass
class MixtureConfig(DetailConfig):
    """Settings of the sampler mixture."""

    chain_fraction: Fraction = 0.4
    """Fraction of each batch that follows the chains, in [0, 1]."""
    uniform_fraction: Fraction = 0.1
    """Fraction of each batch that is drawn uniformly over all images, in [0, 1]; the rest is drawn from the map."""
    error_exponent: Annotated[float, Interval(0, 8)] = 1.0
    """Power of the ratio of observed to predicted error that scales the density of the map; 0 leaves the detail
    alone."""
    pool_size: Annotated[int, Interval(1, 256)] = 8
    """Chains for each ray that follows one. They take turns: rays of successive batches are far apart, and the batches
    of as many steps are drawn together."""
    noise: Annotated[float, Interval(0, 8)] = 0.5
    """Standard deviation of a chain's step along rows and columns, in sides of a tile."""
    restart_fraction: Fraction = 0.3
    """Fraction of the chains to which a ray of the map is proposed as a new start after each step, in [0, 1]."""
    memory: Fraction = 0.95
    """Factor on what a chain has seen after each of its steps, as the model learns."""


class Chains(NamedTuple):
    """Chains on the images, and what they have seen there."""

    image_index: Int64[Tensor, " n"]
    """Image that each chain is on."""
    position: Float[Tensor, "n 2"]
    """Row and column there, in pixels."""
    proposed: Float[Tensor, "n 2"]
    """Row and column of the step that the chain may take, to a tile in which its ray was drawn."""
    ratio: Float[Tensor, " n"]
    """Ratio of observed to predicted error of that place, when it was seen; 0 before."""


class Block(NamedTuple):
    """The batches of the next steps, one for each part of the pool."""

    samples: PixelSamples
    """Rays [times, rays]: those that follow chains, those of the map, and uniform ones."""
    error: Float[Tensor, "times rays"]
    """Observed error of each ray; NaN where there is none."""
    num_chains: int
    """Rays of a batch that follow chains, which are the first."""
    num_uniform: int
    """Uniform rays of a batch, which are the last."""
    used: int
    """Batches that have been drawn from it."""


class MixtureState(NamedTuple):
    """The state of the map, the chains, and the batches drawn in advance."""

    map: DetailState
    """What is known of the tiles."""
    chains: Chains
    """The pool, those of the block first; more chains than the batch has, after it has shrunk."""
    block: Block | None
    """Batches whose chains have not moved yet."""
    chain_ratio: Float[Tensor, " tiles"]
    """Ratio of the chains' density to the predicted error, in each tile."""
    total_error: Float[Tensor, ""]
    """Sum of the predicted errors of all cells, times the ratio of observed to predicted error."""
    restarted: Float[Tensor, ""]
    """Fraction of the chains that started anew when they last moved."""


class _Map(Detail):
    """The map, in a grid that leaves room for what the chains need."""

    tile_bytes = Detail.tile_bytes + 6


@register
class Mixture(Sampler[MixtureConfig, MixtureState]):
    """Mix Metropolis chains, detail corrected by the error of tiles, and uniform rays.

    Takes 0.85 bytes a training pixel, in cells of 2 x 2. The batches of eight steps are drawn together, and their
    chains move together: O(batch) a step. Corrections of the map cost O(tiles), at growing intervals.
    """

    config_class = MixtureConfig
    state_class = MixtureState
    image_fields = ("map.seen", "map.ratio")
    derived_fields = ("map.density", "chain_ratio", "total_error")
    live_settings = ("chain_fraction", "uniform_fraction", "restart_fraction")
    photo_settings = {"alpha": 0.3, "noise": 0.1}

    def __init__(self, config: MixtureConfig, context: SamplerContext, images: TrainingImages) -> None:
        super().__init__(config, context, images)
        self._check_sum()
        self.map = _Map(config, context, images)
        grid, prior = self.map.grid, self.map.prior
        self.area = torch.zeros(grid.num_tiles, dtype=torch.float16, device=images.device)
        """Valid pixels of each tile, in cells."""
        self.predicted = torch.zeros_like(self.area)
        """Sum of the predicted errors of the cells of each tile."""
        for index in range(images.num_cached):
            tiles, valid = grid.tile_slice(index), grid.valid_fraction(index)
            self.area[tiles] = valid.view(-1, grid.tile_side**2).sum(dim=1)
            if prior is not None:
                predicted = dens.relative_weight(prior.table, grid.cells_of(index), ERROR_POWER)
                self.predicted[tiles] = predicted.view(-1, grid.tile_side**2).sum(dim=1)

    def _check_sum(self) -> None:
        config = self.config
        if config.chain_fraction + config.uniform_fraction > 1:
            raise SettingError(
                "chain_fraction",
                config.chain_fraction,
                f"more than is left beside a uniform_fraction of {config.uniform_fraction}. Their sum is at most 1.",
            )

    def check_settings(self, count: int) -> None:
        self._check_sum()
        for name in ("chain_fraction", "uniform_fraction"):
            self.num_of_fraction(name, count)

    def expected_density(self, state: MixtureState, samples: PixelSamples) -> Float[Tensor, " n"] | None:
        density, config = state.map.density, self.config
        if density is None:
            return torch.ones_like(samples.density_ratio)
        by_map = 1 - config.chain_fraction - config.uniform_fraction
        by_chains = config.chain_fraction * self._chain_density(state, density, samples)
        return by_chains + by_map * density.density_ratio(samples) + config.uniform_fraction

    def image_slice(self, cache_index: int) -> slice:
        return self.map.image_slice(cache_index)

    def init(self, previous: MixtureState | None = None) -> MixtureState:
        state = self.map.init(None if previous is None else previous.map)
        density = self.map.rebuild(state).density
        chains = self._start(density, 0) if previous is None else previous.chains
        if previous is not None:
            restarted = self._start(density, len(chains.ratio))
            chains = where(self.images.contains(_samples(chains)), chains, restarted)
        zero = torch.zeros((), device=self.images.device)
        return MixtureState(state, chains, None, torch.zeros_like(self.predicted), zero, zero)

    def _start(self, density: PixelDensity | None, count: int) -> Chains:
        """Return chains at places that the map draws, which they leave for the first ones that they see."""
        start = self.images.uniform(count) if density is None else density.draw(count)
        return Chains(start.image_index, start.position, start.position, torch.zeros_like(start.density_ratio))

    def rebuild(self, state: MixtureState) -> MixtureState:
        grid, error = self.map.grid, self.predicted * state.map.ratio
        # rays are drawn where the chains step to; a step to where nothing can be drawn is not taken
        can_step = torch.where(self.predicted > 0, self.area.float() / grid.tile_side**2, 0.0)
        stepped, taken = grid.blurred(torch.stack((error, can_step)), step_kernel(self.config.noise))
        chain_error = can_step * stepped + (1 - taken) * error
        chain_ratio = torch.where(self.predicted > 0, chain_error / self.predicted, 0.0)
        chain_ratio = chain_ratio.clamp_max(torch.finfo(torch.float16).max).half()
        return state._replace(map=self.map.rebuild(state.map), chain_ratio=chain_ratio, total_error=error.sum())

    def flush(self, state: MixtureState) -> MixtureState:
        state = self._settle(state)
        return state._replace(map=self.map.flush(state.map))

    def draw(self, state: MixtureState, count: int) -> tuple[Samples, MixtureState]:
        density = state.map.density
        if density is None:
            return Samples(self.images.uniform(count), count), state
        num_chains = self.num_of_fraction("chain_fraction", count)
        num_uniform = self.num_of_fraction("uniform_fraction", count)
        block = state.block
        # a resumed training may have another batch size, or other fractions
        is_same = block is not None and (block.num_chains, block.num_uniform) == (num_chains, num_uniform)
        if block is None or not is_same or block.error.shape[1] != count or block.used == len(block.error):
            # where batches change in size, as with instant-ngp, those of later steps would be drawn in vain
            is_steady = block is None or is_same and block.error.shape[1] == count
            times = self.config.pool_size if is_steady else 1
            state, block = self._draw_block(self._settle(state), density, num_chains, count, num_uniform, times)
        samples = take(block.samples, block.used)
        state = state._replace(block=block._replace(used=block.used + 1))
        return Samples(samples, num_uniform, num_chains, state.restarted), state

    def _draw_block(
        self,
        state: MixtureState,
        density: PixelDensity,
        num_chains: int,
        count: int,
        num_uniform: int,
        most: int,
    ) -> tuple[MixtureState, Block]:
        """Draw the batches up to the next correction of the map, or as many as the pool has chains for."""
        pool_size, num_drawn = self.config.pool_size, count - num_chains - num_uniform
        missing = pool_size * num_chains - len(state.chains.ratio)
        if missing > 0:
            state = state._replace(chains=concatenate(state.chains, self._start(density, missing)))
        times = max(1, min(most, state.map.interval - state.map.steps))
        chains, others = _split(state.chains, times * num_chains)
        chains, samples = self._propose(chains, density)
        if num_chains < count:
            rest = self.map.draw_batches(state.map, times, num_drawn, num_uniform)
            samples = flatten(concatenate(unflatten(samples, (times, num_chains)), rest, dim=1))
        by_chains, by_map = self._chain_density(state, density, samples), density.density_ratio(samples)
        ratio = (num_chains * by_chains + num_drawn * by_map + num_uniform) / count
        samples = samples._replace(density_ratio=ratio, follows_importance=torch.zeros_like(samples.follows_importance))
        samples = unflatten(samples, (times, count))
        block = Block(samples, torch.full_like(samples.density_ratio, torch.nan), num_chains, num_uniform, 0)
        return state._replace(chains=concatenate(chains, others)), block

    def _propose(self, chains: Chains, density: PixelDensity) -> tuple[Chains, PixelSamples]:
        """Propose a step to each chain. Draw a ray in the tile there, in proportion to the predicted error."""
        place, grid = _samples(chains), self.map.grid
        eta = torch.empty_like(place.position).normal_(generator=self.context.generator)
        side = self.config.noise * grid.tile_side * grid.cell_size
        stepped = place._replace(position=place.position + side * eta)
        stepped = self.images.wrap(stepped)
        stepped = where(self.images.contains(stepped), stepped, place)
        stepped = where(self.predicted[grid.tile(stepped)] > 0, stepped, place)
        cell = dens.draw_within(density.table, grid.tile(stepped), ERROR_POWER, self.context.generator)
        return chains._replace(proposed=stepped.position), grid.draw_within(cell)[0]

    def _chain_density(self, state: MixtureState, density: PixelDensity, samples: PixelSamples) -> Float[Tensor, " n"]:
        """Return the density p / u of rays that follow chains: that of the expected error, one step further."""
        grid, table = self.map.grid, density.table
        cell = grid.cell(samples)
        error = dens.relative_weight(table, cell, ERROR_POWER) * state.chain_ratio[grid.tile_of(cell)]
        return self.images.density_ratio(error / state.total_error / grid.num_valid(cell), samples)

    def update(self, state: MixtureState, batch: MiningBatch, applied: Tensor | bool) -> MixtureState:
        if state.block is None:
            return state
        assert batch.importance is not None
        if applied is not False:
            error = batch.importance.detach().to(self.images.device).nan_to_num(0.0, 0.0, 0.0)
            if isinstance(applied, Tensor):
                error = torch.where(applied.to(error.device), error, torch.nan)
            state.block.error[state.block.used - 1] = error
        updated = self.map.update(state.map, batch, applied)
        if updated.density is state.map.density:
            return state._replace(map=updated)
        return self.rebuild(self._settle(state)._replace(map=updated))

    def _settle(self, state: MixtureState) -> MixtureState:
        """Let the chains of all batches drawn from the block move, and drop the rest of it.

        Each chain chooses between its place, the ray that it stepped to, and for some a ray of the map.
        """
        block, density = state.block, state.map.density
        if block is None or density is None:
            return state
        times, num_chains = block.used, block.num_chains
        chains, others = _split(state.chains, times * num_chains)
        chains = unflatten(chains, (times, num_chains))
        places, error = take(block.samples, slice(times)), block.error[:times]
        predicted = dens.relative_weight(density.table, self.map.grid.cell(flatten(places)), ERROR_POWER)
        rays = Chains(places.image_index, places.position, places.position, error / predicted.view_as(error))
        seen = take(rays, (slice(None), slice(num_chains)))
        aged = chains._replace(ratio=torch.where(seen.ratio.isnan(), 1.0, self.config.memory) * chains.ratio)
        chains, _ = self._choose(aged, seen._replace(position=chains.proposed), density, is_step=True)
        drawn = take(rays, (slice(None), slice(num_chains, error.shape[1] - block.num_uniform)))
        chains, restarted = self._propose_starts(chains, drawn, density)
        return state._replace(chains=concatenate(others, flatten(chains)), block=None, restarted=restarted)

    def _propose_starts(self, chains: Chains, drawn: Chains, density: PixelDensity) -> tuple[Chains, Tensor]:
        """Propose rays [times, drawn] of the map to some of the chains [times, chains] of the same batch.

        Returns:
            The chains, and the fraction of them that accepted.
        """
        (times, num_chains), num_drawn = chains.ratio.shape, drawn.ratio.shape[1]
        num_asked = min(round(self.config.restart_fraction * num_chains), num_drawn)
        if num_asked == 0:
            return chains, chains.ratio.new_zeros(())
        # rays of the map are in the order of its tiles: the same place in that order is the same part of the images
        device = drawn.ratio.device
        first = torch.randint(num_drawn, (times, 1), generator=self.context.generator, device=device)
        turn = (first + torch.arange(num_asked, device=device) * num_drawn // num_asked) % num_drawn
        proposed = take(drawn, (torch.arange(times, device=device)[:, None], turn))
        asked, spared = (take(chains, (slice(None), part)) for part in (slice(num_asked), slice(num_asked, None)))
        # in turn: those to which a ray of the map was proposed are the last to be asked again
        asked, is_accepted = self._choose(asked, proposed, density, is_step=False)
        return concatenate(spared, asked, dim=1), is_accepted.sum() / (times * num_chains)

    def _choose(
        self, chains: Chains, proposed: Chains, density: PixelDensity, is_step: bool
    ) -> tuple[Chains, Bool[Tensor, "times n"]]:
        """Return the chains, moved to the places proposed to them where they accept these; and where they do."""

        def weight(place: Chains) -> Tensor:
            tile, table = self.map.grid.tile(_samples(flatten(place))).view_as(place.ratio), density.table
            # a step finds a tile in proportion to its area, the map by its own density
            found = self.area[tile] if is_step else (table.sums[tile] * table.factors[tile]).float()
            return place.ratio * self.predicted[tile] / found

        is_accepted = metropolis.accepts(weight(chains), weight(proposed), self.context.generator)
        return where(is_accepted, proposed, chains), is_accepted


def step_kernel(noise: float) -> list[float]:
    """Return how likely a normal step ends 0, 1, 2, ... tiles further along an axis, from anywhere in a tile.

    Args:
        noise: standard deviation of the step, in sides of a tile.

    >>> [round(part, 4) for part in step_kernel(0.5)]
    [0.6096, 0.191, 0.0042]
    """
    if noise == 0:
        return [1.0]

    def integral(place: float) -> float:
        """Integrate the normal distribution function up to a place."""
        z = place / noise
        return place * (1 + math.erf(z / math.sqrt(2))) / 2 + noise * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    tiles = range(math.ceil(3 * noise) + 1)
    kernel = [integral(tile + 1) - 2 * integral(tile) + integral(tile - 1) for tile in tiles]
    total = kernel[0] + 2 * sum(kernel[1:])
    return [part / total for part in kernel]


def _split(chains: Chains, count: int) -> tuple[Chains, Chains]:
    """Return the first chains, and the others."""
    return take(chains, slice(count)), take(chains, slice(count, None))


def _samples(chains: Chains) -> PixelSamples:
    """Return the places of chains as samples."""
    ratio = torch.ones_like(chains.ratio)
    return PixelSamples(chains.image_index, chains.position, ratio, torch.zeros_like(ratio, dtype=torch.bool))
