"""Figures 2 and 4 of the paper on photographs: PSNR against the batch size, and iterations to uniform's PSNR.

    python research/figure4.py PHOTO [PHOTO ...] --batches 256 1024 4096 16384 65536

The paper's own table, of photographs that are not here, stands beside the measured one. After Ctrl-C, or with more
seeds, samplers or batches, the same command goes on.
"""

# pandas' own annotations lose track of what is a frame and what a series
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import dataclasses
import sys
import warnings
from itertools import product
from pathlib import Path

import pandas as pd
import tyro
from matplotlib.figure import Figure
from nerfstudio.utils.rich_utils import CONSOLE
from rich.console import Console

from nerfstudio_softmining.bench import report
from nerfstudio_softmining.bench.meter import Meter
from nerfstudio_softmining.bench.results import Results, check_flags, make_progress
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, fingerprint, make_settings

PAPERS_SETTINGS = "langevin,alpha=0.6,drift=1e-5,noise=1e-3,uniform_fraction=0.1,reinit_fraction=0.1"
PAPER = Path(__file__).parent.parent / "configs" / "paper" / "figure4.csv"


def compare(
    photo: tyro.conf.Positional[tuple[Path, ...]],
    output: Path = Path("outputs/figure4"),
    batches: tuple[int, ...] = (256, 1024, 4096, 16384, 65536),
    samplers: tuple[str, ...] = ("uniform", "edge", "langevin", PAPERS_SETTINGS),
    seeds: tuple[int, ...] = (0, 1, 2),
    at: tuple[int, ...] = (250, 500, 1000),
) -> bool:
    """Fit photographs with every sampler and batch size; return whether every fit went well.

    Args:
        photo: photographs.
        output: folder for results.json, report.md and the plots.
        batches: points of a training step.
        samplers: what to compare.
        seeds: seeds of the fits.
        at: iterations of evaluations; the last ends a fit.
    """
    check_flags(at, batches=batches, samplers=samplers, seeds=seeds)
    for path, batch in product(photo, batches):
        pixels = photos.read_for_training(path)
        config = FitConfig(batch=batch)
        scene = {"size": pixels.size, "fingerprint": fingerprint(pixels), **dataclasses.asdict(config)}
        name = f"{path.stem}, batch {batch}"
        results = Results(output, at, {name: scene})
        with make_progress() as progress:
            for seed, sampler in product(seeds, samplers):
                if len(results.entries(name, sampler, seed)) == len(at):
                    continue
                with results.recording_failure(f"{name}, {sampler}, seed {seed}"):
                    task = progress.add_task(f"{name}, {sampler}, seed {seed}", total=at[-1])
                    fit, meter = Fit(pixels, make_settings(sampler, seed, at[-1], config)), Meter(0.0)
                    entries = []
                    while fit.iteration < at[-1]:
                        with meter:
                            fit.step()
                        progress.update(task, completed=fit.iteration)
                        if fit.iteration in at:
                            entries.append({"iteration": fit.iteration, "psnr": fit.psnr(), **meter.read(batch)})
                    for entry in entries:
                        results.add(name, sampler, seed, {"batch": batch, "photo": path.stem, **entry})
    if results.content["runs"]:
        write(results.content, output)
    return not results.content["failures"]


def write(results: dict, output: Path) -> None:
    """Write report.md and the plots, and print the tables."""
    runs = report.to_frame(results["runs"])
    last = runs["iteration"].max()
    paper = pd.read_csv(PAPER).set_index(["image", "sampler", "batch"])["psnr"].unstack()
    paper.index = [f"{image}, {sampler.replace('soft_mining_lmc', 'langevin')}" for image, sampler in paper.index]
    tables = [report.make_table("The paper's PSNR in dB (its figure 4)", paper.rename_axis("image, sampler"))]
    for name, group in runs.groupby("photo"):
        title = f"{name}: PSNR in dB after {last:,} iterations (gain over uniform); iterations to uniform's PSNR there"
        tables.append(report.make_table(title, pd.DataFrame({f"{b:,}": _cells(g) for b, g in group.groupby("batch")})))
        _plot(group[group["iteration"] == last]).savefig(output / f"{name}.png", dpi=150)
    with (output / "report.md").open("w", encoding="utf-8") as file:
        for console in (CONSOLE, Console(file=file, width=report.REPORT_WIDTH)):
            console.print(*tables, sep="\n\n")
    CONSOLE.print(f"{output} has report.md and the plots.", soft_wrap=True)


def _cells(runs: pd.DataFrame) -> pd.Series:
    """Return the cells of the table for one photograph and batch size: one for each sampler."""
    last = runs[runs["iteration"] == runs["iteration"].max()].groupby("sampler", observed=True)["psnr"]
    cells = last.agg(report.mean_and_spread)
    baseline = last.mean().get(report.BASELINE)
    if baseline is not None:
        reached = report.reached([baseline], runs)[baseline].map("{:,.0f}".format).replace("nan", report.NOT_REACHED)
        others = cells.index != report.BASELINE
        cells[others] += (last.mean() - baseline).map(" ({:+.2f}); ".format)[others] + reached[others]
    return cells


def _plot(runs: pd.DataFrame) -> Figure:
    """Plot PSNR against the batch size, a line for each sampler: the mean over the seeds."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for sampler, row in runs.groupby(["sampler", "batch"], observed=True)["psnr"].mean().unstack().iterrows():
        axes.plot(row.index, row, marker=".", label=sampler)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="batch size", ylabel="PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    try:
        sys.exit(not tyro.cli(compare))
    except UserError as error:
        sys.exit(str(error))
