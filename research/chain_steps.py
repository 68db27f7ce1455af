"""How far does the drift move chains on a photograph, and how much larger is the error where they are?

    python research/chain_steps.py PHOTO

The table has the median drift in pixels, of the last 50 steps before an iteration, for the third of the chains with the
lowest error, the middle third and the highest; how many chains a step starts anew because they left the photograph; and
the mean error of the chains over that of the uniform points of the same batches.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd
import torch
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from nerfstudio_softmining.bench.report import make_table
from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings
from nerfstudio_softmining.mining import langevin

LAST = 50
"""Steps that are counted before each iteration of the table."""


def main(photo: tyro.conf.Positional[Path], sampler: str = "langevin", at: tuple[int, ...] = (50, 200, 1000)) -> None:
    """Measure and print.

    Args:
        photo: the photograph.
        sampler: langevin, with settings after commas.
        at: iterations that the table has rows for.
    """
    fit = Fit(photos.read_for_training(photo), make_settings(sampler, 0, at[-1], FitConfig()))
    original, recorded = langevin.step, []

    def step(chains, grad_log_q, importance, domain, *, drift, **settings):
        moved, info = original(chains, grad_log_q, importance, domain, drift=drift, **settings)
        length = (drift * grad_log_q).norm(dim=-1)[importance.argsort()]
        recorded.append(
            [*(third.nanmedian() for third in length.tensor_split(3)), 100 * info.is_outside.float().mean()]
        )
        return moved, info

    langevin.step = step
    rows = {}
    for iteration in track(range(1, at[-1] + 1), "Steps", transient=True):
        fit.step()
        batch = fit.loss.batch
        assert batch is not None and batch.importance is not None
        chains, uniform = batch.importance.tensor_split([len(batch.importance) - batch.num_uniform])
        recorded[-1].append(chains.mean() / uniform.mean())
        if iteration in at:
            rows[f"{iteration:,}"] = torch.tensor(recorded[-LAST:]).mean(dim=0).tolist()
    headings = ["lowest third", "middle third", "highest third", "left, %", "error of chains / uniform"]
    cells = pd.DataFrame.from_dict(rows, orient="index", columns=headings).map("{:.1f}".format)
    cells[headings[-1]] = [f"{row[-1]:.2f}" for row in rows.values()]
    CONSOLE.print(make_table(f"{sampler}: drift in pixels, by error", cells.rename_axis("iteration")))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    tyro.cli(main)
