"""Soft mining with Langevin chains: Kheradmand et al., "Accelerating Neural Field Training via Soft Mining", CVPR 2024.

Each batch is made of chains, which walk towards the error (eq. 10), and of a fraction of uniform rays, which explore.
The chains of the lowest importance start anew after each step, by default on edges (section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import langevin, priors
from nerfstudio_softmining.mining.langevin import ChainState
from nerfstudio_softmining.mining.records import concatenate, take, where
from nerfstudio_softmining.samplers.base import MiningBatch, Sampler, SamplerConfig, SamplerContext, Samples
from nerfstudio_softmining.samplers.cells import PixelDensity
from nerfstudio_softmining.samplers.images import PixelSamples, TrainingImages
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.settings import Count, Fraction, NonNegative

DETAIL_FLOOR = 0.003
"""Detail of flat places where chains start in proportion to detail, in units of the colour."""
RESERVE = 1 << 12
"""Starts that are drawn at a time, as a draw of many costs little more than one of few."""


@dataclass
class LangevinConfig(SamplerConfig):
    """Settings of the sampler langevin."""

    alpha_warmup: Count = 1000
    """Training steps over which alpha rises from 0 (section 3.3)."""
    drift: NonNegative = 2e-6
    """Step size a of eq. 10 along the gradient of log Q, in squared image sides; 2e-6 is the 2e1 of the paper's
    NeRFs."""
    noise: NonNegative = 2e-2
    """Step size b of eq. 10: standard deviation of a random step, in image sides (geometric mean of height and
    width)."""
    uniform_fraction: Fraction = 0.1
    """Fraction of each batch that is drawn uniformly over all images, in [0, 1] (section 4.1)."""
    reinit_fraction: Fraction = 0.1
    """Fraction of the chains, those of the lowest Q, that start anew after each step, in [0, 1] (section 4.1)."""
    reinit_from: Literal["edges", "uniform", "detail"] = "edges"
    """Where chains start anew: in proportion to Sobel's edges (section 4.1), uniformly (section 3.3), or in proportion
    to the local detail that the sampler detail starts from."""


class LangevinState(NamedTuple):
    """The chains, and the starts drawn for them in advance."""

    chains: ChainState
    """One chain for each ray that is not uniform; more, after the batch has shrunk."""
    reserve: ChainState
    """Starts that are drawn and not used yet."""
    restarted: Float[Tensor, ""]
    """Fraction of the chains that started anew when they last moved."""


@register
class Langevin(Sampler[LangevinConfig, LangevinState]):
    """Walk Langevin chains towards the error: soft mining, as in the paper.

    Chains are kept when the batch shrinks, and drawn uniformly when it grows. The density of starts takes 0.33 bytes a
    training pixel, in cells of 2 x 2. A step costs O(batch).
    """

    config_class = LangevinConfig
    state_class = LangevinState
    live_settings = ("uniform_fraction", "drift", "noise")
    # with the paper's (section 4.1) chains fall behind uniform points once all pixels have been drawn: docs/results.md
    photo_settings = {"noise": 1.5e-3, "uniform_fraction": 0.5, "reinit_fraction": 0.3, "alpha": 0.0}

    def __init__(self, config: LangevinConfig, context: SamplerContext, images: TrainingImages) -> None:
        super().__init__(config, context, images)
        self.start_density = None
        """Density of the starts; None where they are uniform."""
        if config.reinit_from != "uniform":
            grid = self.make_grid(config.reinit_from, dens.bytes_per_entry())
            self.start_density = PixelDensity.from_weights(grid, self._weights, f"Finding {config.reinit_from}")

    def _weights(self, cache_index: int) -> Float[Tensor, "h w"]:
        if self.config.reinit_from == "edges":
            return priors.sobel(self.images.image(cache_index))
        return priors.laplacian(self.images.image_or_bytes(cache_index)) + DETAIL_FLOOR

    @property
    def needs_gradient(self) -> bool:
        """Return whether chains drift; without drift no gradient is needed."""
        return self.config.drift > 0

    def init(self, previous: LangevinState | None = None) -> LangevinState:
        nobody = _chains(self.images.uniform(0))
        if previous is None:
            return LangevinState(nobody, nobody, torch.zeros((), device=self.images.device))
        domain, chains = _Images(self, nobody), previous.chains
        chains = where(domain.contains(chains), chains, domain.propose(len(chains.image_index)))
        return LangevinState(chains, domain.reserve, previous.restarted)

    def draw(self, state: LangevinState, count: int) -> tuple[Samples, LangevinState]:
        num_uniform = self.num_of_fraction("uniform_fraction", count)
        num_chains = count - num_uniform
        missing = num_chains - len(state.chains.image_index)
        if missing > 0:
            state = state._replace(chains=concatenate(state.chains, _chains(self.images.uniform(missing))))
        chains = PixelSamples(*take(state.chains, slice(num_chains)))
        samples = concatenate(chains, self.images.uniform(num_uniform))
        return Samples(samples, num_uniform, num_chains, state.restarted), state

    def step_scale(self, samples: PixelSamples) -> Float[Tensor, "n k"]:
        """Return the unit of drift and noise in pixels: the side of each chain's image, so that steps are isotropic."""
        return self.images.side(samples)

    def _wrap(self, chains: ChainState) -> ChainState:
        return _chains(self.images.wrap(PixelSamples(*chains)))

    def update(self, state: LangevinState, batch: MiningBatch, applied: Tensor | bool) -> LangevinState:
        count = len(batch.indices) - batch.num_uniform
        if count == 0:
            return state
        assert batch.importance is not None
        device = self.images.device
        chains, others = take(state.chains, slice(count)), take(state.chains, slice(count, None))
        samples = PixelSamples(*chains)
        # on a panorama the chains follow Q by solid angle
        solid_angle, gradient = self.images.solid_angle(samples)
        if batch.coords is None:
            gradient = torch.zeros_like(gradient)
        else:
            assert batch.coords.grad is not None
            assert batch.weighted_error is not None and batch.weighted_error.grad is not None
            gradient = gradient + langevin.grad_log_importance(
                batch.coords.grad[:count],
                batch.weighted_error.grad[:count],
                batch.weighted_error.detach()[:count],
                batch.error_power,
            ).to(device)
        scale, domain = self.step_scale(samples), _Images(self, state.reserve)
        moved, info = langevin.step(
            chains,
            gradient,
            batch.importance[:count].to(device) * solid_angle,
            domain,
            drift=self.config.drift * scale.square(),
            noise=self.config.noise * scale,
            reinit_fraction=self.config.reinit_fraction,
            generator=self.context.generator,
            wrap=self._wrap,
        )
        restarted = (info.is_outside | info.is_lowest).float().mean()
        if isinstance(applied, Tensor):
            moved = where(applied.to(device), moved, chains)
            restarted = torch.where(applied.to(device), restarted, state.restarted)
        elif not applied:
            moved, restarted = chains, state.restarted
        return LangevinState(concatenate(moved, others), domain.reserve, restarted)


class _Images:
    """The training images as the domain of the chains.

    Args:
        sampler: the sampler.
        reserve: starts drawn in advance; what is left of them after proposals.
    """

    def __init__(self, sampler: Langevin, reserve: ChainState) -> None:
        self.images, self.density, self.reserve = sampler.images, sampler.start_density, reserve

    def contains(self, chains: ChainState) -> Bool[Tensor, " n"]:
        """Return whether each chain is on a cached image, within its frame and not masked."""
        return self.images.contains(PixelSamples(*chains))

    def propose(self, count: int) -> ChainState:
        """Draw starts from their density; uniformly where nothing stands out."""
        if self.density is None:
            return _chains(self.images.uniform(count))
        starts = self.reserve
        if len(starts.image_index) < count:
            starts = _chains(self.density.draw(max(count, RESERVE)))
        self.reserve = take(starts, slice(count, None))
        return take(starts, slice(count))


def _chains(samples: PixelSamples) -> ChainState:
    """Return chains that start at the given samples."""
    return ChainState(*samples)
