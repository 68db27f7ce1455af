"""What the weak points of the published code cost: `langevin` with them put back, one by one and all together.

python -m nerfstudio_softmining.bench.published configs/lite.yaml --data FOLDER --scenes nerf_synthetic/lego
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.bench import report
from nerfstudio_softmining.bench.bench import run_bench
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining import importance as imp
from nerfstudio_softmining.mining.importance import soft_weights
from nerfstudio_softmining.mining.langevin import Pool, select
from nerfstudio_softmining.sampling.feedback import MiningBatch
from nerfstudio_softmining.sampling.langevin import LangevinConfig, LangevinStrategy
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.sampler import STRATEGIES

STARTS = 1 << 14
"""Starts drawn over all images, to have some in each."""


class FixedImages(LangevinStrategy):
    """Each chain stays in one image, images have equal shares, and uniform rays are in the last of them only."""

    def cache(self, pixels: CachedPixels) -> None:
        super().cache(pixels)
        if len(set(pixels.sizes)) > 1 or not pixels.all_kept or self.starts is None:
            raise UserError("images are of several sizes, masked or without edges. Name --scenes that are not.")

    def draw(self, count: int) -> tuple[Pool, int]:
        rays, num_uniform = super().draw(count)
        assert self.pool is not None
        slot = torch.arange(count, device=self.pixels.device) * self.pixels.num_slots // count
        self.images = self.pixels.image_idx[slot]
        self.pool = self.pool._replace(chart=self.images[: count - num_uniform])
        return rays._replace(chart=self.images), num_uniform

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        super().update(feedback, applied)
        assert self.pool is not None and self.starts is not None
        own, starts = self.images[: len(self.pool.chart)], self.starts.draw(STARTS)
        order = starts.chart.argsort()
        first, end = (torch.searchsorted(starts.chart[order], own, right=right) for right in (False, True))
        chance = torch.rand(len(own), generator=self.pixels.generator, device=own.device)
        chosen = order[(first + (chance * (end - first)).long()).clamp_max(STARTS - 1)]
        density = starts.density[chosen] * STARTS / (self.pixels.num_slots * (end - first).clamp_min(1))
        anew = Pool(own, starts.position[chosen], density)
        self.pool = select(self.pool.chart == own, self.pool, anew)


class RankedByLoss(LangevinStrategy):
    """Chains of the lowest weighted loss, not of the lowest Q, start anew."""

    def update(self, feedback: MiningBatch, applied: Tensor | bool) -> None:
        assert feedback.weighted_error is not None
        super().update(dataclasses.replace(feedback, importance=feedback.weighted_error.detach()), applied)


class AsPublished(FixedImages, RankedByLoss):
    """Both."""


def _height_and_width(pixels: CachedPixels, pool: Pool) -> Tensor:
    """In place of an image's side: steps are then isotropic in [0, 1]^2."""
    slot = pixels.slot[pool.chart]
    return torch.stack((pixels.height[slot], pixels.width[slot]), dim=-1).float()


def _clamped(density: Tensor, alpha: float) -> Tensor:
    """Weights up to their mean and a standard deviation. (The other end of the published clamp, 0.2, is out of reach
    of 1 / Q^alpha, as Q is below 1.)"""
    weights = soft_weights(density, alpha)
    return weights.clamp_max(weights.mean() + weights.std())


def _of_class(kind: type[LangevinStrategy]) -> Callable[[], AbstractContextManager]:
    return lambda: patch.dict(STRATEGIES, langevin=kind)


def _isotropic() -> AbstractContextManager:
    return patch.object(CachedPixels, "side", _height_and_width)


def _clamping() -> AbstractContextManager:
    return patch.object(imp, "soft_weights", _clamped)


BY_Q = "langevin,weight_by=importance"
SMALLER_BATCH = 4096 / 512
"""The paper's batch over that of the lite methods: by so much larger the drift of a mean loss is there."""
MENDED = "none (langevin)"
"""What the others are compared with."""
WEAK_POINTS: dict[str, tuple[str, tuple[Callable[[], AbstractContextManager], ...]]] = {
    MENDED: ("langevin", ()),
    "fixed images": ("langevin", (_of_class(FixedImages),)),
    "started anew by weighted loss": ("langevin", (_of_class(RankedByLoss),)),
    "isotropic in [0, 1]^2": ("langevin", (_isotropic,)),
    "weights by Q for all rays": (BY_Q, ()),
    "the same, clamped": (BY_Q, (_clamping,)),
    "drift of a mean loss": (f"langevin,drift={LangevinConfig.drift * SMALLER_BATCH}", ()),
    "all but the drift": (BY_Q, (_of_class(AsPublished), _isotropic, _clamping)),
}
"""Sampler, and what is put back."""


def compare(
    preset: tyro.conf.Positional[Path],
    data: Path,
    output: Path = Path("outputs/published"),
    scenes: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    weak_points: tuple[str, ...] = tuple(WEAK_POINTS),
) -> bool:
    """Train with each weak point, and print PSNR; returns whether every run went well.

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
    runs, went_well = [], True
    for name in weak_points:
        sampler, put_back = WEAK_POINTS[name]
        folder = output / name.replace(" ", "_")
        with ExitStack() as stack:
            for context in put_back:
                stack.enter_context(context())
            changes = {"samplers": (sampler,), "scenes": scenes, "seeds": seeds}
            went_well &= run_bench(preset, data, folder, changes)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        runs += [run | {"sampler": name} for run in results["runs"]]
    for scene in report.scenes_of(runs):
        mine = [run for run in runs if run["scene"] == scene]
        CONSOLE.print(report.quality(mine, "psnr", f"PSNR in dB, {scene}"))
        if MENDED in weak_points:
            CONSOLE.print(report.same_seed(mine, MENDED, f"Gain over {MENDED} of the same seed in dB, {scene}"))
    return went_well


if __name__ == "__main__":
    sys.exit(not tyro.cli(compare))
