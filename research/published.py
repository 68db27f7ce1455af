"""Measure what the weak points of the published code cost: `langevin` with them restored, one by one and all together.

python research/published.py configs/lite.yaml --data FOLDER --scenes nerf_synthetic/lego
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.bench import report
from nerfstudio_softmining.bench.bench import run_bench
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining.langevin import start
from nerfstudio_softmining.mining.records import where
from nerfstudio_softmining.plugin.loss import SoftMinedLoss
from nerfstudio_softmining.plugin.models import SoftMiningNerfactoModel
from nerfstudio_softmining.plugin.pixel_sampler import MiningPixelSampler
from nerfstudio_softmining.samplers.base import MiningBatch, SamplerContext, Samples
from nerfstudio_softmining.samplers.images import PixelSamples, TrainingImages
from nerfstudio_softmining.samplers.langevin import Langevin, LangevinConfig, LangevinState

STARTS = 1 << 14
"""Starts drawn over all images, to have some in each."""


class FixedImages(Langevin):
    """Keep each chain in one image, with equal shares for the images, and uniform rays in the last of them only."""

    def __init__(self, config: LangevinConfig, context: SamplerContext, images: TrainingImages) -> None:
        super().__init__(config, context, images)
        if len(set(images.sizes)) > 1 or not images.all_valid or self.start_density is None:
            raise UserError("images are of several sizes, masked or without edges. Name --scenes that are not.")

    def _image_of_rays(self, count: int) -> Tensor:
        return self.images.image_index[torch.arange(count, device=self.images.device) * self.images.num_cached // count]

    def draw(self, state: LangevinState, count: int) -> tuple[Samples, LangevinState]:
        samples, state = super().draw(state, count)
        image_index = self._image_of_rays(count)
        chains = state.chains._replace(image_index=image_index[: count - samples.num_uniform])
        pixels = samples.pixels._replace(image_index=image_index)
        return Samples(pixels, samples.num_uniform), state._replace(chains=chains)

    def update(self, state: LangevinState, batch: MiningBatch, applied: Tensor | bool) -> LangevinState:
        state = super().update(state, batch, applied)
        assert self.start_density is not None
        own = self._image_of_rays(len(batch.indices))[: len(state.chains.image_index)]
        starts = self.start_density.draw(STARTS)
        order = starts.image_index.argsort()
        first, end = (torch.searchsorted(starts.image_index[order], own, right=right) for right in (False, True))
        chance = torch.rand(len(own), generator=self.context.generator, device=own.device)
        chosen = order[(first + (chance * (end - first)).long()).clamp_max(STARTS - 1)]
        ratio = starts.density_ratio[chosen] * STARTS / (self.images.num_cached * (end - first).clamp_min(1))
        restarted = start(own, starts.position[chosen], ratio)
        return state._replace(chains=where(state.chains.image_index == own, state.chains, restarted))


class RankedByLoss(Langevin):
    """Re-initialise the chains of the lowest weighted loss, not of the lowest Q."""

    def update(self, state: LangevinState, batch: MiningBatch, applied: Tensor | bool) -> LangevinState:
        assert batch.weighted_error is not None
        batch = dataclasses.replace(batch, importance=batch.weighted_error.detach())
        return super().update(state, batch, applied)


class UnitSquare(Langevin):
    """Make steps that are isotropic in [0, 1]^2."""

    def step_scale(self, samples: PixelSamples) -> Tensor:
        index = self.images.cache_index[samples.image_index]
        return torch.stack((self.images.height[index], self.images.width[index]), dim=-1).float()


class AsPublished(FixedImages, RankedByLoss, UnitSquare):
    """Restore all three."""


class ClampedLoss(SoftMinedLoss):
    """Clamp weights to their mean and a standard deviation.

    The other end of the published clamp, 0.2, is out of reach of 1 / Q^alpha, as Q is below 1.
    """

    def weights(self, density_ratio: Tensor, alpha: float) -> Tensor:
        weights = super().weights(density_ratio, alpha)
        return weights.clamp_max(weights.mean() + weights.std())


class ClampedModel(SoftMiningNerfactoModel):
    """Nerfacto with clamped weights."""

    def populate_modules(self) -> None:
        super().populate_modules()
        self.rgb_loss = ClampedLoss(self.config.alpha, self.config.weight_by)


@dataclasses.dataclass(frozen=True)
class WeakPoint:
    """A sampler with settings, and the classes that take the place of this plugin's."""

    sampler: str
    sampler_class: type[Langevin] | None = None
    model_class: type[SoftMiningNerfactoModel] | None = None

    def prepare(self, config: TrainerConfig) -> None:
        """Let a run use the classes."""
        pipeline: Any = config.pipeline
        if self.sampler_class is not None:
            variant = type("Variant", (MiningPixelSampler,), {"sampler_class": self.sampler_class})
            pipeline.datamanager.pixel_sampler._target = variant
        if self.model_class is not None:
            pipeline.model._target = self.model_class


WEIGHTED_BY_Q = "langevin,weight_by=importance"
DRIFT_FACTOR = 4096 / 512
"""The paper's batch over that of the lite methods: the drift of a mean loss is larger by this factor."""
REPAIRED = "none (langevin)"
"""Name of the runs that the others are compared with."""
WEAK_POINTS: dict[str, WeakPoint] = {
    REPAIRED: WeakPoint("langevin"),
    "fixed images": WeakPoint("langevin", FixedImages),
    "started anew by weighted loss": WeakPoint("langevin", RankedByLoss),
    "isotropic in [0, 1]^2": WeakPoint("langevin", UnitSquare),
    "weights by Q for all rays": WeakPoint(WEIGHTED_BY_Q),
    "the same, clamped": WeakPoint(WEIGHTED_BY_Q, None, ClampedModel),
    "drift of a mean loss": WeakPoint(f"langevin,drift={LangevinConfig.drift * DRIFT_FACTOR}"),
    "all but the drift": WeakPoint(WEIGHTED_BY_Q, AsPublished, ClampedModel),
}
"""Weak points by name."""


def compare(
    preset: tyro.conf.Positional[Path],
    data: Path,
    output: Path = Path("outputs/published"),
    scenes: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    weak_points: tuple[str, ...] = tuple(WEAK_POINTS),
) -> bool:
    """Train with each weak point and print PSNR; return whether every run went well.

    Args:
        preset: preset whose scenes, seeds and evaluations are taken.
        data: folder that the scenes' folders are in.
        output: folder for what comes out.
        scenes: scenes of the preset; all if not given.
        seeds: seeds; the preset's if not given.
        weak_points: which of them.
    """
    unknown = set(weak_points) - WEAK_POINTS.keys()
    if unknown:
        raise UserError(f"--weak-points has {unknown.pop()!r}. There are {', '.join(map(repr, WEAK_POINTS))}.")
    runs, success = [], True
    for name in weak_points:
        weak_point, folder = WEAK_POINTS[name], output / name.replace(" ", "_")
        changes = {"samplers": (weak_point.sampler,), "scenes": scenes, "seeds": seeds}
        success &= run_bench(preset, data, folder, changes, weak_point.prepare)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        runs += [run | {"sampler": name} for run in results["runs"]]
    for scene, scene_runs in report.to_frame(runs).groupby("scene", observed=True):
        CONSOLE.print(report.quality(scene_runs, "psnr", f"PSNR in dB, {scene}"))
        if REPAIRED in weak_points:
            title = f"Gain over {REPAIRED} of the same seed in dB, {scene}"
            CONSOLE.print(report.gains(scene_runs, REPAIRED, title))
    return success


if __name__ == "__main__":
    sys.exit(not tyro.cli(compare))
