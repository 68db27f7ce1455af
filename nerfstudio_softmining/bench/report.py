"""The report of a comparison: tables, plots and pictures made from its results."""

# pandas' own annotations lose track of what is a frame and what a series
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from nerfstudio.utils.rich_utils import CONSOLE
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nerfstudio_softmining import files
from nerfstudio_softmining.bench.preset import Preset

BASELINE = "uniform"
"""Sampler that the others are compared with."""
STOCK = "nerfacto"
"""nerfstudio's own method, which iterations and seconds are compared with where a comparison has it."""
NAMES_IN_PAPER = {"uniform": "uniform", "edge": "edge", "langevin": "soft_mining_lmc"}
"""Samplers of the paper's tables, by their names here."""
NOT_REACHED = "not reached"
REPORT_WIDTH = 200
"""Characters in a line of report.md."""
LARGEST_ERROR = 0.3
"""Absolute error, of colours in [0, 1], at the end of the error pictures' colour scale."""


def to_frame(runs: Sequence[dict]) -> pd.DataFrame:
    """Return a row for each evaluation; scenes and samplers sort in the order of their runs."""
    frame = pd.DataFrame(runs)
    for name in ("scene", "sampler"):
        frame[name] = pd.Categorical(frame[name], frame[name].unique())
    return frame


@contextlib.contextmanager
def markdown_file(path: Path) -> Iterator[Console]:
    """Yield a console that writes a file of Markdown, in which names are text: neither rich's markup nor HTML."""
    with io.StringIO() as text:
        yield Console(file=text, width=REPORT_WIDTH, markup=False, emoji=False, highlight=False)
        files.write(text.getvalue().replace("<", "&lt;"), path)


def write(preset: Preset, results: dict, output: Path) -> None:
    """Write report.md, and the plots and pictures that it shows."""
    runs = to_frame(results["runs"])
    with markdown_file(output / "report.md") as console:
        console.print(f"# {preset.title}\n")
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        console.print(f"{results['device']}; {versions}. Mean ± standard deviation over the seeds.\n", soft_wrap=True)
        for scene, scene_runs in runs.groupby("scene", observed=True):
            console.print(f"\n## {scene}\n")
            for table in tables(preset.targets, scene_runs):
                console.print(table)
            name = files.file_name(str(scene))
            files.save_figure(plot_convergence(scene_runs), output / f"{name}_convergence.png", dpi=150)
            files.save_figure(plot_speed_up(preset.targets, scene_runs), output / f"{name}_speed_up.png", dpi=150)
            console.print(f"\n![PSNR against iterations and seconds]({name}_convergence.png)")
            console.print(f"\n![Iterations to given PSNRs]({name}_speed_up.png)")
            figure = plot_pictures(scene_runs, output / "pictures" / name)
            if figure is not None:
                files.save_figure(figure, output / f"{name}_pictures.jpg", dpi=110, pil_kwargs={"quality": 85})
                console.print(f"\n![Renders and their errors]({name}_pictures.jpg)")
        if runs["scene"].nunique() > 1:
            console.print("\n## All scenes\n")
            console.print(gains(runs, BASELINE, "Gain over uniform of the same seed in dB, mean over the scenes"))
        if preset.paper is not None:
            console.print("\n## Beside the paper\n")
            console.print(with_paper(preset.folder / preset.paper, runs))
        if results["failures"]:
            console.print("\n## Failed\n")
            for name, reason in results["failures"].items():
                console.print(f"- {name}: {reason}", soft_wrap=True)


def print_summary(preset: Preset, results: dict, output: Path) -> None:
    """Print the tables of each scene, and where the report is."""
    for scene, scene_runs in to_frame(results["runs"]).groupby("scene", observed=True):
        CONSOLE.rule(Text(str(scene)))
        for table in tables(preset.targets, scene_runs):
            CONSOLE.print(table)
    CONSOLE.print(f"{output / 'report.md'} has all of it, with plots and pictures.", soft_wrap=True, markup=False)


def tables(targets: Sequence[float], runs: pd.DataFrame) -> list[Table]:
    """Return the tables of one scene: PSNR, gain and SSIM, iterations and seconds to PSNRs, and times."""
    scores = [quality(runs, "psnr", "PSNR in dB")]
    if BASELINE in runs["sampler"].values:
        scores.append(gains(runs, BASELINE, "Gain over uniform of the same seed in dB"))
    if "ssim" in runs:
        scores.append(quality(runs, "ssim", "SSIM", digits=3))
    return [*scores, iterations(targets, runs), seconds(targets, runs), equal_seconds(runs), times(runs)]


def quality(runs: pd.DataFrame, metric: str, title: str, digits: int = 2) -> Table:
    """Return the table of a metric of one scene at each evaluation."""
    return _over_seeds(title, runs.set_index(["sampler", "seed", "iteration"])[metric].unstack(), digits)


def gains(runs: pd.DataFrame, baseline: str, title: str) -> Table:
    """Return the table of the gain over a baseline with the same seed at each evaluation, as mean over the scenes.

    It has the samplers and seeds that were run to the end on all scenes.
    """
    psnr = runs.set_index(["sampler", "seed", "scene", "iteration"])["psnr"].unstack("iteration").unstack("scene")
    is_baseline = psnr.index.get_level_values("sampler") == baseline
    gain = psnr[~is_baseline].sub(psnr[is_baseline].droplevel("sampler"), level="seed").dropna()
    return _over_seeds(title, gain.T.groupby(level="iteration").mean().T)


def _over_seeds(title: str, values: pd.DataFrame, digits: int = 2) -> Table:
    """Return the table of mean and spread of values whose rows are samplers and seeds, and columns iterations."""
    groups = values.groupby(level="sampler", observed=True)
    cells = groups.agg(lambda column: mean_and_spread(column, digits))
    cells.columns = [f"{iteration:,} it." for iteration in values]
    cells.insert(0, "seeds", groups.size())
    return make_table(title, cells)


def _means(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return means over the seeds: a row for each sampler, a column for each iteration."""
    return runs.groupby(["sampler", "iteration"], observed=True)[column].mean().unstack()


def _row(values: pd.DataFrame, sampler: str) -> pd.Series:
    """Return the row of a sampler, of NaN if there is none."""
    return values.loc[sampler] if sampler in values.index else pd.Series(np.nan, values.columns)


def _baseline(table: pd.DataFrame) -> str:
    """Return whose iterations and seconds the others are compared with: uniform, or stock nerfacto if that is there."""
    return STOCK if STOCK in table.index else BASELINE


def reached(targets: Sequence[float], runs: pd.DataFrame) -> pd.DataFrame:
    """Return the iterations at which means over the seeds reach PSNRs: a row for each sampler, a column for each PSNR.

    Args:
        targets: PSNRs in dB; if empty, the baseline's own mean at each evaluation.
        runs: evaluations of one scene.
    """
    means = _means(runs, "psnr")
    # rounded down, so that the baseline itself reaches them
    targets = list(targets) or np.unique(np.floor(100 * _row(means, _baseline(means)).dropna()) / 100).tolist()
    rows = [[crossing(curve.dropna(), target) for target in targets] for _, curve in means.iterrows()]
    return pd.DataFrame(rows, means.index, targets)


def crossing(curve: pd.Series, level: float) -> float:
    """Return the iteration at which a curve, linear between its points, first reaches a level; NaN if it does not.

    What the first point has passed counts as reached there.

    >>> crossing(pd.Series([20.0, 22.0], index=[100, 200]), 21.0)
    150.0
    """
    if curve.max() < level:
        return np.nan
    end = int((curve >= level).argmax())
    segment = slice(max(0, end - 1), end + 1)
    return float(np.interp(level, curve.iloc[segment], curve.index[segment]))


def iterations(targets: Sequence[float], runs: pd.DataFrame) -> Table:
    """Return the table of iterations to PSNRs, and how many times fewer than uniform's they are (figure 2)."""
    first, counts = runs["iteration"].min(), reached(targets, runs)

    def cell(count: float, baseline: float) -> str:
        if np.isnan(count):
            return NOT_REACHED
        if count == first:
            return f"at most {first:,}"
        return f"{count:,.0f}" + ("" if np.isnan(baseline) else f" ({baseline / count:.2f}x)")

    baseline = _baseline(counts)
    rows = [map(cell, row, _row(counts, baseline)) for _, row in counts.iterrows()]
    cells = pd.DataFrame(rows, counts.index, [f"{target:.2f} dB" for target in counts])
    return make_table(f"Iterations to a PSNR of the mean over the seeds, and {baseline}'s over these", cells)


def seconds(targets: Sequence[float], runs: pd.DataFrame) -> Table:
    """Return the table of seconds of training to PSNRs, and how many times fewer than the baseline's they are."""
    first, counts, elapsed = runs["iteration"].min(), reached(targets, runs), _means(runs, "seconds")
    times_reached = pd.DataFrame(
        [np.interp(row, elapsed.columns, elapsed.loc[sampler]) for sampler, row in counts.iterrows()],
        counts.index,
        counts.columns,
    ).where(counts.notna())
    baseline = _baseline(counts)

    def cell(count: float, value: float, reference: float) -> str:
        if np.isnan(value):
            return NOT_REACHED
        prefix = "at most " if count == first else ""
        return f"{prefix}{value:,.0f}" + ("" if np.isnan(reference) else f" ({reference / value:.2f}x)")

    rows = [
        map(cell, counts.loc[sampler], row, _row(times_reached, baseline)) for sampler, row in times_reached.iterrows()
    ]
    cells = pd.DataFrame(rows, counts.index, [f"{target:.2f} dB" for target in counts])
    return make_table(f"Seconds of training to a PSNR of the mean over the seeds, and {baseline}'s over these", cells)


def equal_seconds(runs: pd.DataFrame) -> Table:
    """Return the table of PSNR after as many seconds of training as the baseline takes to each evaluation."""
    elapsed, psnr = _means(runs, "seconds"), _means(runs, "psnr")
    marks = _row(elapsed, _baseline(elapsed)).dropna()
    values = [
        np.interp(marks, elapsed.loc[sampler].dropna(), psnr.loc[sampler].dropna(), left=np.nan, right=np.nan)
        for sampler in psnr.index
    ]
    rows = [["-" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values]
    cells = pd.DataFrame(rows, psnr.index, [f"{mark:,.0f} s" for mark in marks])
    return make_table("PSNR in dB at equal seconds of training", cells)


def times(runs: pd.DataFrame) -> Table:
    """Return the table of time and memory of training, without evaluation."""
    groups = runs[runs["iteration"] == runs["iteration"].max()].groupby("sampler", observed=True)
    step = 1000 * groups["seconds_per_step"].agg(["mean", "min", "max"])
    baseline = _baseline(step)
    over = 100 * (step["mean"] / step["mean"].get(baseline, np.nan) - 1)
    cells = {
        "median step, ms": step.apply(lambda row: "{mean:.1f} ({min:.1f} - {max:.1f})".format(**row), axis=1),
        f"over {baseline}": over.map(lambda value: "" if np.isnan(value) else f"{value:+.0f} %"),
        "rays per second": groups["rays_per_second"].mean().map("{:,.0f}".format),
        "peak memory, GB": (groups["peak_memory"].max() / 1e9).map("{:.2f}".format),
        "seconds": groups["seconds"].mean().map("{:.0f}".format),
    }
    return make_table("Training", pd.DataFrame(cells))


def with_paper(path: Path, runs: pd.DataFrame) -> Table:
    """Return the table of PSNR and gain over uniform, measured here and by the paper.

    Args:
        path: CSV file of the paper's PSNRs, by scene, sampler and iterations.
        runs: evaluations of all scenes.
    """
    paper = pd.read_csv(path).set_index(["scene", "iterations", "sampler"])["psnr"]
    groups = runs.groupby(["scene", "iteration", "sampler"], observed=True)["psnr"]
    means, rows = groups.mean(), []
    for (scene, iteration, sampler), psnr in groups:
        name = scene.rsplit("/", 1)[-1]
        theirs = paper.get((name, iteration, NAMES_IN_PAPER.get(sampler)))
        if theirs is not None:
            baseline = means.get((scene, iteration, BASELINE))
            gain = "" if baseline is None else f" ({psnr.mean() - baseline:+.2f})"
            their_gain = theirs - paper[name, iteration, "uniform"]
            cells = (mean_and_spread(psnr) + gain, f"{theirs:.2f} ({their_gain:+.2f})")
            rows.append((name, f"{iteration:,}", sampler, *cells))
    cells = pd.DataFrame(rows, columns=["scene", "iterations", "sampler", "ours", "the paper's"])
    return make_table("PSNR in dB, and gain over uniform", cells.set_index("scene"))


def plot_convergence(runs: pd.DataFrame, subject: str = "held-out views") -> Figure:
    """Plot PSNR against iterations and against seconds of training: mean over the seeds, and their range."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    both_axes = figure.subplots(1, 2, sharey=True)
    for number, (sampler, sampler_runs) in enumerate(runs.groupby("sampler", observed=True)):
        points, color = sampler_runs.groupby("iteration"), f"C{number}"
        psnr = points["psnr"].agg(["mean", "min", "max"])
        for axes, x in zip(both_axes, (psnr.index, points["seconds"].mean()), strict=True):
            axes.plot(x, psnr["mean"], color=color, marker=".", label=sampler)
            axes.fill_between(x, psnr["min"], psnr["max"], color=color, alpha=0.15, lw=0)
    for axes, label in zip(both_axes, ("iterations", "seconds of training"), strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    both_axes[0].set_ylabel(f"PSNR of {subject} (dB)")
    both_axes[1].legend(fontsize="small")
    return figure


def plot_speed_up(targets: Sequence[float], runs: pd.DataFrame) -> Figure:
    """Plot how many times fewer iterations than the baseline each sampler needs to reach PSNRs."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    counts = reached(targets, runs)
    # what the first evaluation has passed may have been reached at any time before
    baseline = _baseline(counts)
    speed_ups = (_row(counts, baseline) / counts).mask(counts == runs["iteration"].min())
    speed_ups = speed_ups.drop(index=baseline, errors="ignore")
    width, places = 0.8 / max(1, len(speed_ups)), np.arange(len(counts.columns))
    for number, (sampler, row) in enumerate(speed_ups.iterrows()):
        x, known = places + (number - (len(speed_ups) - 1) / 2) * width, row.notna()
        if known.any():
            axes.bar(x[known], row[known], width, color=f"C{number + 1}", label=sampler)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(places, [f"{target:.2f} dB" for target in counts])
    axes.set(ylabel=f"{baseline}'s iterations over the sampler's", xlabel="PSNR")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return figure


def plot_pictures(runs: pd.DataFrame, folder: Path) -> Figure | None:
    """Plot renders of one held-out view and their errors, a row for each sampler (figures 1 and 5)."""
    samplers = [sampler for sampler in runs["sampler"].unique() if (folder / files.file_name(sampler)).is_dir()]
    steps = sorted(runs["iteration"].unique())
    if not samplers:
        return None
    figure = Figure(figsize=(1 + 4.4 * len(steps), 2.2 * len(samplers)), layout="constrained")
    grid = figure.subplots(len(samplers), 2 * len(steps), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for column, step in enumerate(steps):
        grid[0, 2 * column].set_title(f"{step:,} iterations", fontsize="small")
        grid[0, 2 * column + 1].set_title(f"absolute error, 0 - {LARGEST_ERROR}", fontsize="small")
    for row, sampler in zip(grid, samplers, strict=True):
        row[0].set_ylabel(sampler, fontsize="small")
        for axes, error_axes, step in zip(row[::2], row[1::2], steps, strict=True):
            picture = cv2.imread(str(folder / files.file_name(sampler) / f"{step}.png"))
            if picture is not None:
                truth, render = np.split(picture[..., ::-1] / 255.0, 2, axis=1)
                axes.imshow(render)
                error_axes.imshow(np.abs(truth - render).mean(axis=-1), vmin=0, vmax=LARGEST_ERROR, cmap="magma")
    return figure


def mean_and_spread(values: Iterable[float | None], digits: int = 2) -> str:
    """Return mean ± standard deviation of the values that are not missing; the mean alone of a single value.

    >>> mean_and_spread([20.0, 22.0, 24.0])
    '22.00 ± 2.00'
    """
    known = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return "-"
    return f"{known.mean():.{digits}f}" + (f" ± {known.std():.{digits}f}" if len(known) > 1 else "")


def make_table(title: str, cells: pd.DataFrame) -> Table:
    """Return a table in Markdown whose first column is the index of the cells."""
    # texts, as names may have brackets, which rich would take for markup
    table = Table(title=Text(title), box=box.MARKDOWN, title_justify="left")
    table.add_column(Text(str(cells.index.name)))
    for heading in cells:
        table.add_column(Text(str(heading)), justify="right")
    for row in cells.itertuples():
        table.add_row(*(Text(str(cell)) for cell in row))
    return table
