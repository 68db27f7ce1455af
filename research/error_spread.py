"""Where is the error, and does it go where it is largest? What a sampler can gain depends on both.

    python research/error_spread.py configs/captures.yaml --data FOLDER

Trains each scene once. The tiles of some training images are sorted by their squared error at the first iteration and
cut into tenths. For each tenth the table has its share of the squared error, what fraction of that is left at the last
iteration, and how densely the sampler draws there then, over a uniform draw.

A second table parts the squared error of a tile into that of its mean residual, the coherent part, and the scatter
around it. It has the share of each, what is left of it, and how well it predicts which tiles lose most error.

Above both is the mean square over the squared mean of single pixels' errors: the gain of rays that know each error and
are weighted by 1/p, by the variance of the gradient alone, if gradients were as long as errors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.base_model import Model
from nerfstudio.models.nerfacto import NerfactoModel
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.bench.bench import run_bench
from nerfstudio_softmining.bench.report import make_table
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.trainer import SoftMiningTrainer

NUM_IMAGES = 5
TILE = 8
"""Side of a tile in pixels."""
CHUNK = 1 << 12
"""Pixels that are evaluated at a time."""


class Measure(NamedTuple):
    """Errors of some training images, by tile, and their densities."""

    squared_error: Float[Tensor, " tiles"]
    """Mean over pixels and channels."""
    coherent: Float[Tensor, " tiles"]
    """Square of the mean residual, as the mean over channels."""
    density_ratio: Float[Tensor, " tiles"]
    """Density p / u of the sampler, as the mean over pixels."""
    pixel_ratio: float
    """Mean square over squared mean of single pixels' L1 errors."""


seen: dict[str, list[Measure]] = {}
"""Measures of each run, one for each iteration."""


class MeasuringTrainer(SoftMiningTrainer):
    """Evaluates whole training images at some iterations."""

    at: tuple[int, ...] = ()
    """Finished iterations after which it does."""

    def train_iteration(self, step: int) -> Any:
        """Train one step."""
        result = super().train_iteration(step)
        if step + 1 in self.at:
            model = self.pipeline.model
            with torch.no_grad(), compat.fork_random_state(self.device):
                model.eval()
                seen.setdefault("/".join(self.base_dir.parts[-4:]), []).append(self.measure(model))
                model.train()
        return result

    def measure(self, model: Model) -> Measure:
        """Evaluate some training images."""
        manager: Any = self.pipeline.datamanager
        run = manager.train_pixel_sampler.run
        if run is None:
            raise UserError("--sampler is uniform, whose density is the same everywhere. Name mixture or detail.")
        images = run.sampler.images
        residuals, density_ratios = [], []
        for index in torch.linspace(0, images.num_cached - 1, NUM_IMAGES).long().unique().tolist():
            height, width = images.sizes[index]
            pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(images.device)
            samples = images.as_samples(images.image_index[index].expand(len(pixels)), pixels + 0.5)
            parts = [residual(model, *manager.rays_at(part)) for part in samples.indices.split(CHUNK)]
            density_ratio = run.sampler.expected_density(run.state, samples)
            if density_ratio is None:
                raise UserError("--sampler has no density that is known. Name mixture or detail.")
            residuals.append(torch.cat(parts).view(height, width, -1))
            density_ratios.append(density_ratio.view(height, width, 1))
        error = torch.cat([part.abs().mean(dim=-1).flatten() for part in residuals])
        return Measure(
            squared_error=tile_means([part.square() for part in residuals]).mean(dim=0),
            coherent=tile_means(residuals).square().mean(dim=0),
            density_ratio=tile_means(density_ratios)[0],
            pixel_ratio=float(error.square().mean() / error.mean().square()),
        )


def residual(model: Model, rays: RayBundle, batch: dict) -> Float[Tensor, "rays 3"]:
    """Return what the model shows minus what it should show."""
    outputs, renderer = model(rays), cast(NerfactoModel, model).renderer_rgb
    prediction, truth = renderer.blend_background_for_loss_computation(
        outputs["rgb"], outputs["accumulation"], batch["image"].to(model.device)
    )
    return prediction - truth


def tile_means(images: list[Float[Tensor, "h w c"]]) -> Float[Tensor, "c tiles"]:
    """Return the mean of each tile of all images."""
    means = [F.avg_pool2d(image.permute(2, 0, 1), TILE, ceil_mode=True, count_include_pad=False) for image in images]
    return torch.cat([mean.flatten(1) for mean in means], dim=1).cpu()


def make_columns(first: Measure, last: Measure) -> dict[str, Tensor]:
    """Return share of the error, what is left of it, and density of each tenth of the tiles, the best first."""
    before, after = first.squared_error, last.squared_error
    tenths = before.argsort().tensor_split(10)
    return {
        "share of the squared error": torch.stack([before[part].sum() for part in tenths]) / before.sum(),
        "left later": torch.stack([after[part].sum() / before[part].sum() for part in tenths]),
        "density": torch.stack([last.density_ratio[part].mean() for part in tenths]),
    }


def make_parts(first: Measure, last: Measure) -> pd.DataFrame:
    """Return share of the error, what is left of it, and correlation with the drop of its parts."""
    total, drop = first.squared_error, first.squared_error - last.squared_error
    parts = {
        "coherent": (first.coherent, last.coherent),
        "scatter": (total - first.coherent, last.squared_error - last.coherent),
        "both": (total, last.squared_error),
    }
    rows = {
        name: {
            "share of the squared error": before.sum() / total.sum(),
            "left later": after.sum() / before.sum(),
            "correlation with the drop": torch.corrcoef(torch.stack((before, drop)))[0, 1],
        }
        for name, (before, after) in parts.items()
    }
    return pd.DataFrame(rows).T


def main(
    preset: tyro.conf.Positional[Path],
    data: Path,
    output: Path = Path("outputs/error_spread"),
    scenes: tuple[str, ...] = (),
    sampler: str = "mixture",
    seeds: tuple[int, ...] = (0,),
    at: tuple[int, int] = (300, 1000),
) -> bool:
    """Train, print a table for each run, and return whether every run went well.

    Args:
        preset: preset that is run.
        data: folder that the scenes' folders are in.
        output: folder for what comes out; runs that are finished there are not measured again.
        scenes: scenes of the preset; all if not given.
        sampler: sampler whose density is shown.
        seeds: seeds.
        at: two iterations.
    """
    if not at[0] < at[1]:
        raise UserError(f"--at is {at[0]} {at[1]}. Set the second iteration to more than the first.")
    MeasuringTrainer.at = at

    def prepare(config: TrainerConfig) -> None:
        config._target = MeasuringTrainer

    changes = dict(scenes=scenes, samplers=(sampler,), seeds=seeds, at=at[-1:])
    success = run_bench(preset, data, output, changes, prepare)
    for run, measures in seen.items():
        if len(measures) < len(at):
            continue  # the run failed, which has been said
        first, last = measures
        tenths, parts = pd.DataFrame(make_columns(first, last)), make_parts(first, last)
        tenths.index = [f"{10 * number} - {10 * number + 10} %" for number in range(10)]
        CONSOLE.print(f"\n{run}\nmean square over squared mean of single pixels:")
        CONSOLE.print(f"{first.pixel_ratio:.2f} at {at[0]}, {last.pixel_ratio:.2f} at {at[1]}")
        for title, cells in {"tiles by error": tenths, "part of a tile's error": parts}.items():
            CONSOLE.print(make_table(title, cells.map("{:.2f}".format).rename_axis(title)))
    return success


if __name__ == "__main__":
    sys.exit(not tyro.cli(main))
