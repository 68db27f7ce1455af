"""How well the error of a pixel can be told beforehand, without evaluating it.

    python research/forecast.py PHOTO --at 300 1000

Fits a field, and at some iterations compares the true Q of all pixels with what a sampler could know: the contrast of
the photograph, the mean Q around the pixel, and what was seen of the pixel itself when it was last drawn. Prints the
share of the variance of log Q that each explains (the squared correlation with its logarithm), which bounds what
drawing by it can win.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor

from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings
from nerfstudio_softmining.mining import priors
from nerfstudio_softmining.plugin import compat

SMALL = 1e-3
"""Added to an error before its logarithm is taken."""
TILES = (2, 4, 8, 16)
"""Sides in pixels of the tiles over which the true error is averaged."""
AGES = (0, 20, 50, 100, 200, 400)
"""Steps since a pixel was drawn, by which pixels are told apart."""


@dataclass
class Forecast:
    """Measure what tells the error of a pixel beforehand."""

    photo: tyro.conf.Positional[Path]
    """The photograph."""
    sampler: str = "uniform"
    """Way of choosing points while training."""
    seed: int = 0
    """Seed of the fit."""
    at: tuple[int, ...] = (300, 1000)
    """Iterations at which forecast and truth are compared."""
    config: tyro.conf.OmitArgPrefixes[FitConfig] = field(default_factory=FitConfig)
    """The rest."""


def explained(forecast: Tensor, truth: Tensor) -> float:
    """Share of the variance of one that the other explains linearly."""
    return float(torch.corrcoef(torch.stack((forecast.flatten(), truth.flatten())))[0, 1] ** 2)


def tile_means(values: Tensor, side: int) -> Tensor:
    """Mean over the tile that each pixel [h, w] is in."""
    height, width = values.shape
    means = F.avg_pool2d(values[None, None], side, ceil_mode=True, count_include_pad=False)[0, 0]
    return means.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]


def main(forecast: Forecast) -> None:
    """Fit, compare and print."""
    if not torch.cuda.is_available():
        compat.prepare_cpu()
    photo = photos.read(forecast.photo).to("cuda" if torch.cuda.is_available() else "cpu")
    fit = Fit(photo, make_settings(forecast.sampler, forecast.seed, forecast.at[-1], forecast.config))
    height, width = photo.size
    device = photo.values.device
    pixels = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
    before = {
        "detail (difference from the 3 x 3 around)": priors.laplacian(photo.values) + 3 * SMALL,
        "Sobel's edges": priors.sobel(photo.values) + 3 * SMALL,
        "deviation in the 3 x 3 around": priors.local_deviation(photo.values) + 3 * SMALL,
    }
    last, when = torch.zeros(height * width, device=device), torch.full((height * width,), -1, device=device)
    columns: dict[str, list[str]] = {}
    for iteration in track(range(1, forecast.at[-1] + 1), "Fitting", transient=True):
        fit.step()
        batch = fit.loss.batch
        assert batch is not None and batch.importance is not None
        place = batch.indices[:, 1] * width + batch.indices[:, 2]
        last[place], when[place] = batch.importance.detach(), iteration
        if iteration not in forecast.at:
            continue
        q = fit.residual(pixels).abs().mean(dim=-1).view(height, width)
        truth = (q + SMALL).log()
        rows = {name: explained(value.log(), truth) for name, value in before.items()}
        for side in TILES:
            rows[f"true mean of {side} x {side} pixels"] = explained((tile_means(q, side) + SMALL).log(), truth)
        age = iteration - when
        for low, high in zip(AGES, (*AGES[1:], forecast.at[-1] + 1), strict=True):
            mine = (when > 0) & (age >= low) & (age < high)
            if mine.sum() > 100:
                name = f"own error, seen {low} - {high - 1} steps ago"
                rows[name] = explained((last[mine] + SMALL).log(), truth.flatten()[mine])
        for name, value in rows.items():
            columns.setdefault(name, [""] * forecast.at.index(iteration)).append(f"{value:.2f}")
    table = Table(
        title=f"Share of the variance of log Q; {forecast.photo.name}, {forecast.sampler}",
        box=box.MARKDOWN,
        title_justify="left",
    )
    for heading in ("known", *(f"{at:,} it." for at in forecast.at)):
        table.add_column(heading)
    for name, values in columns.items():
        table.add_row(name, *values, *[""] * (len(forecast.at) - len(values)))
    CONSOLE.print(table)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(tyro.cli(Forecast))
