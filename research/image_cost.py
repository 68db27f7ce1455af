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
import torch
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from rich import box
from rich.progress import track
from rich.table import Table

from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings
from nerfstudio_softmining.plugin import compat

STAGES = ("draw", "look up", "encode", "network", "loss", "network back", "encode back", "optimizer", "update")
WARM_UP = 10
"""Steps that are not counted."""


@dataclass
class Cost:
    """Measure what the stages of a training step take."""

    photo: tyro.conf.Positional[Path]
    """The photograph."""
    samplers: tuple[str, ...] = ("uniform", "langevin")
    """Ways of choosing points; the first is what the others are compared with."""
    steps: int = 300
    """Steps of each that are timed, after 10 that are not."""
    config: tyro.conf.OmitArgPrefixes[FitConfig] = field(default_factory=lambda: FitConfig(implementation="torch"))
    """The rest."""


def timed_step(fit: Fit) -> list[float]:
    """One step of a fit, as `Fit.step`, and the seconds of its stages."""
    marks = [_now()]
    batch, position = fit.draw()
    marks.append(_now())
    truth = fit.truth(position)
    marks.append(_now())
    features = fit.field.encoding(position / fit.size)
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
    fit.optimise()
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
    if not torch.cuda.is_available():
        compat.prepare_cpu()
    photo = photos.read(cost.photo).to("cuda" if torch.cuda.is_available() else "cpu")
    total = WARM_UP + cost.steps
    fits = {name: Fit(photo, make_settings(name, 0, total, cost.config)) for name in cost.samplers}
    seconds: dict[str, list[list[float]]] = {name: [] for name in fits}
    for _ in track(range(total), "Steps", transient=True):
        for name, fit in fits.items():
            seconds[name].append(timed_step(fit))
    height, width = photo.size
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        title=f"Mean ms of {cost.steps} steps; {height} x {width} pixels, batch {cost.config.batch:,}; {device}",
        box=box.MARKDOWN,
        title_justify="left",
    )
    table.add_column("sampler", no_wrap=True, min_width=max(map(len, seconds)))
    for heading in (*STAGES, "step", "over " + cost.samplers[0]):
        table.add_column(heading, justify="right")
    base = None
    for name, rows in seconds.items():
        stages = 1000 * np.mean(rows[WARM_UP:], axis=0)  # not medians, as some samplers do work for many steps at once
        step = stages.sum()
        base = step if base is None else base
        table.add_row(name, *(f"{value:.2f}" for value in (*stages, step)), f"{100 * (step / base - 1):+.1f} %")
    CONSOLE.print(table)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(tyro.cli(Cost))
