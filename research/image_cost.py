"""Time of a step of image fitting, stage by stage, for several samplers in turn.

    python research/image_cost.py PHOTO --samplers uniform langevin edge

Steps of the samplers alternate, so that whatever else the machine does falls on all of them alike. The backward pass is
cut in two at the features of the hash grid. Means have their share of what is done once for many steps.
In torch only: tiny-cuda-nn's passes cannot be taken apart.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from nerfstudio_softmining.bench.report import make_table
from nerfstudio_softmining.bench.results import device_name
from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings

STAGES = ("draw", "look up", "encode", "network", "loss", "network back", "encode back", "optimizer", "update")
WARM_UP = 10
"""Steps that are not counted."""


@dataclass
class Cost:
    """Measure what the stages of a training step take."""

    photo: tyro.conf.Positional[Path]
    """The photograph."""
    samplers: tuple[str, ...] = ("uniform", "langevin")
    """Ways of choosing points; the others are compared with the first."""
    steps: int = 300
    """Steps of each that are timed, after 10 that are not."""
    config: tyro.conf.OmitArgPrefixes[FitConfig] = field(default_factory=lambda: FitConfig(implementation="torch"))
    """Settings of the fits."""


def timed_step(fit: Fit) -> list[float]:
    """Take one step of a fit, as `Fit.step` does, and return the seconds of its stages."""
    marks = [_now()]
    batch, position = fit.draw()
    marks.append(_now())
    truth = fit.photo.at(batch.indices[:, 1:])
    marks.append(_now())
    features = fit.field.encoding(position / fit.size, batch.num_chains or None)
    marks.append(_now())
    leaf = features.detach().requires_grad_()
    prediction = fit.field.network(leaf)
    marks.append(_now())
    loss = fit.loss(truth, prediction)
    marks.append(_now())
    fit.optimizer.zero_grad()
    loss.backward()
    marks.append(_now())
    features.backward(leaf.grad)
    marks.append(_now())
    fit.optimizer_step()
    marks.append(_now())
    fit.update(batch, position)
    marks.append(_now())
    return np.diff(marks).tolist()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(cost: Cost) -> None:
    """Measure and print."""
    photo = photos.read_for_training(cost.photo)
    total = WARM_UP + cost.steps
    fits = {name: Fit(photo, make_settings(name, 0, total, cost.config)) for name in cost.samplers}
    seconds: dict[str, list[list[float]]] = {name: [] for name in fits}
    for _ in track(range(total), "Steps", transient=True):
        for name, fit in fits.items():
            seconds[name].append(timed_step(fit))
    height, width = photo.size
    # not medians, as some samplers do work for many steps at once
    cells = pd.DataFrame({name: 1000 * np.mean(rows[WARM_UP:], axis=0) for name, rows in seconds.items()}, STAGES).T
    cells["step"] = cells.sum(axis=1)
    over = 100 * (cells["step"] / cells["step"].iloc[0] - 1)
    cells = cells.apply(lambda column: column.map("{:.2f}".format)).rename_axis("sampler")
    cells[f"over {cost.samplers[0]}"] = over.map("{:+.1f} %".format)
    title = f"Mean ms of {cost.steps} steps; {height} x {width} pixels, batch {cost.config.batch:,}; {device_name()}"
    table = make_table(title, cells)
    table.columns[0].min_width = max(map(len, seconds))  # the other columns are cut in a narrow terminal
    CONSOLE.print(table)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(tyro.cli(Cost))
