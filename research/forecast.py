"""How well the error of a pixel can be predicted without evaluating it.

    python research/forecast.py PHOTO --at 300 1000

Fits a field, and at some iterations compares the true Q of all pixels with what a sampler can compute: the contrast of
the photograph, the mean Q around the pixel, and the Q of the pixel itself when it was last drawn. Prints the
share of the variance of log Q that each explains (the squared correlation with its logarithm), which bounds what
drawing by it can win.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track
from torch import Tensor

from nerfstudio_softmining.bench.report import make_table
from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings
from nerfstudio_softmining.mining import priors

SMALL = 1e-3
"""Added to an error before its logarithm is taken."""
TILES = (2, 4, 8, 16)
"""Sides in pixels of the tiles over which the true error is averaged."""
AGES = (0, 20, 50, 100, 200, 400)
"""Steps since a pixel was drawn, by which pixels are grouped."""


@dataclass
class Forecast:
    """Measure what predicts the error of a pixel."""

    photo: tyro.conf.Positional[Path]
    """The photograph."""
    sampler: str = "uniform"
    """Way of choosing points while training."""
    seed: int = 0
    """Seed of the fit."""
    at: tuple[int, ...] = (300, 1000)
    """Iterations at which forecast and truth are compared."""
    config: tyro.conf.OmitArgPrefixes[FitConfig] = field(default_factory=FitConfig)
    """Settings of the fit."""


def explained(forecast: Tensor, truth: Tensor) -> float:
    """Return the share of the variance of one that the other explains linearly, in [0, 1]."""
    return float(torch.corrcoef(torch.stack((forecast.flatten(), truth.flatten())))[0, 1] ** 2)


def tile_means(values: Tensor, side: int) -> Tensor:
    """Return the mean over the tile that each pixel is in, [h, w]."""
    height, width = values.shape
    means = F.avg_pool2d(values[None, None], side, ceil_mode=True, count_include_pad=False)[0, 0]
    return means.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]


def main(forecast: Forecast) -> None:
    """Fit, compare and print."""
    photo = photos.read_for_training(forecast.photo)
    fit = Fit(photo, make_settings(forecast.sampler, forecast.seed, forecast.at[-1], forecast.config))
    height, width = photo.size
    device = photo.values.device
    pixels = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
    priors_of_photo = {
        "detail (difference from the 3 x 3 around)": priors.laplacian(photo.values) + 3 * SMALL,
        "Sobel's edges": priors.sobel(photo.values) + 3 * SMALL,
        "deviation in the 3 x 3 around": priors.local_deviation(photo.values) + 3 * SMALL,
    }
    last, when = torch.zeros(height * width, device=device), torch.full((height * width,), -1, device=device)
    columns = {}
    for iteration in track(range(1, forecast.at[-1] + 1), "Fitting", transient=True):
        fit.step()
        batch = fit.loss.batch
        assert batch is not None and batch.importance is not None
        index = batch.indices[:, 1] * width + batch.indices[:, 2]
        last[index], when[index] = batch.importance.detach(), iteration
        if iteration not in forecast.at:
            continue
        q = fit.residual(pixels).abs().mean(dim=-1).view(height, width)
        truth = (q + SMALL).log()
        rows = {name: explained(value.log(), truth) for name, value in priors_of_photo.items()}
        for side in TILES:
            rows[f"true mean of {side} x {side} pixels"] = explained((tile_means(q, side) + SMALL).log(), truth)
        age = iteration - when
        for low, high in zip(AGES, (*AGES[1:], forecast.at[-1] + 1), strict=True):
            group = (when > 0) & (age >= low) & (age < high)
            if group.sum() > 100:
                name = f"own error, seen {low} - {high - 1} steps ago"
                rows[name] = explained((last[group] + SMALL).log(), truth.flatten()[group])
        columns[f"{iteration:,} it."] = pd.Series(rows).map("{:.2f}".format)
    title = f"Share of the variance of log Q; {forecast.photo.name}, {forecast.sampler}"
    order = list(dict.fromkeys(name for column in columns.values() for name in column.index))
    CONSOLE.print(make_table(title, pd.DataFrame(columns).reindex(order).fillna("").rename_axis("known")))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(tyro.cli(Forecast))
