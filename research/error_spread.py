"""Where is the error, and does it go where it is largest? What a sampler can gain depends on both.

    python research/error_spread.py configs/captures.yaml --data FOLDER

Trains each scene once. The tiles of some training images are sorted by their squared error at the first iteration and
cut into tenths. For each tenth the table has its share of the squared error, what fraction of that is left at the last
iteration, and how densely the sampler draws there then, over a uniform draw. Then the mean square over the squared mean
of single pixels' errors: the gain of rays that know each error and are weighted by 1/p, by the variance of the
gradient alone, if gradients were as long as errors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float
from nerfstudio.engine.trainer import TrainerConfig
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
seen: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
"""What each run has shown at each iteration, as `MeasuringTrainer.measure` returns it."""


class MeasuringTrainer(SoftMiningTrainer):
    """Evaluates whole training images at some iterations."""

    at: tuple[int, ...] = ()
    """Finished iterations after which it does."""

    def train_iteration(self, step: int) -> Any:
        """Train one step."""
        result = super().train_iteration(step)
        if step + 1 in self.at:
            with torch.no_grad(), compat.fork_random_state(self.device):
                seen.setdefault("/".join(self.base_dir.parts[-4:]), []).append(self.measure())
        return result

    def measure(self) -> tuple[Tensor, Tensor, float]:
        """Return the squared error and the density ratio of each tile, and the ratio of single pixels."""
        manager: Any = self.pipeline.datamanager
        run = manager.train_pixel_sampler.run
        if run is None:
            raise UserError("--sampler is uniform, whose density is the same everywhere. Name mixture or detail.")
        images = run.sampler.images
        errors, density_ratios = [], []
        for index in torch.linspace(0, images.num_cached - 1, NUM_IMAGES).long().unique().tolist():
            height, width = images.sizes[index]
            pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(images.device)
            samples = images.as_samples(images.image_index[index].expand(len(pixels)), pixels + 0.5)
            error = torch.cat([run.context.importance(part) for part in samples.indices.split(CHUNK)])
            density_ratio = run.sampler.expected_density(run.state, samples)
            if density_ratio is None:
                raise UserError("--sampler has no density that is known. Name mixture or detail.")
            errors.append(error.float().view(height, width))
            density_ratios.append(density_ratio.view(height, width))
        error = torch.cat([part.flatten() for part in errors])
        ratio = float(error.square().mean() / error.mean().square())
        return tile_means([part.square() for part in errors]), tile_means(density_ratios), ratio


def tile_means(images: list[Float[Tensor, "h w"]]) -> Float[Tensor, " tiles"]:
    """Return the mean of each tile of all images."""
    means = [F.avg_pool2d(image[None], TILE, ceil_mode=True, count_include_pad=False).flatten() for image in images]
    return torch.cat(means).cpu()


def make_columns(first: tuple[Tensor, Tensor, float], last: tuple[Tensor, Tensor, float]) -> dict[str, Tensor]:
    """Return share of the error, what is left of it, and density of each tenth of the tiles, the best first."""
    before, after, density_ratio = first[0], last[0], last[1]
    tenths = before.argsort().tensor_split(10)
    return {
        "share of the squared error": torch.stack([before[part].sum() for part in tenths]) / before.sum(),
        "left later": torch.stack([after[part].sum() / before[part].sum() for part in tenths]),
        "density": torch.stack([density_ratio[part].mean() for part in tenths]),
    }


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
        cells = pd.DataFrame(make_columns(first, last)).map("{:.2f}".format)
        cells.index = [f"{10 * number} - {10 * number + 10} %" for number in range(10)]
        ratios = f"mean square over squared mean of single pixels: {first[2]:.2f}, {last[2]:.2f}"
        CONSOLE.print(make_table(f"{run}; {ratios}", cells.rename_axis("tiles by error")))
    return success


if __name__ == "__main__":
    sys.exit(not tyro.cli(main))
