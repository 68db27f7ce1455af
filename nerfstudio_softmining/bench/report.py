"""What a comparison shows: tables and plots from its results."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from nerfstudio_softmining.bench.preset import Preset

BASELINE = "uniform"
"""What others are compared with."""
IN_PAPER = {"uniform": "uniform", "edge": "edge", "langevin": "soft_mining_lmc"}
"""Names of samplers in the paper's tables."""
NOT_REACHED = "not reached"
WIDTH = 200
"""Columns of the report's tables."""
ERROR_SCALE = 0.3
"""Absolute error, of colours in [0, 1], that the end of the error pictures' colour scale stands for."""

Runs = Sequence[dict]


def write(preset: Preset, results: dict, output: Path) -> None:
    """Write report.md, and the plots and pictures that it shows."""
    runs = results["runs"]
    with (output / "report.md").open("w", encoding="utf-8") as file:
        console = Console(file=file, width=WIDTH)
        console.print(f"# {preset.title}\n")
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        console.print(f"{results['device']}; {versions}. Mean ± standard deviation over the seeds.\n", soft_wrap=True)
        for scene in scenes_of(runs):
            mine = [run for run in runs if run["scene"] == scene]
            console.print(f"\n## {scene}\n")
            for table in tables(preset.targets, mine):
                console.print(table)
            name = scene.replace("/", "_")
            convergence(mine).savefig(output / f"{name}_convergence.png", dpi=150)
            speed_up(preset.targets, mine).savefig(output / f"{name}_speed_up.png", dpi=150)
            console.print(f"\n![PSNR against iterations and seconds]({name}_convergence.png)")
            console.print(f"\n![Iterations to given PSNRs]({name}_speed_up.png)")
            figure = pictures(mine, output / "pictures" / name)
            if figure is not None:
                figure.savefig(output / f"{name}_pictures.jpg", dpi=110, pil_kwargs={"quality": 85})
                console.print(f"\n![Renders and their errors]({name}_pictures.jpg)")
        overall = gains(runs)
        if overall is not None:
            console.print("\n## All scenes\n")
            console.print(overall)
        comparison = with_paper(preset, runs)
        if comparison is not None:
            console.print("\n## Beside the paper\n")
            console.print(comparison)
        if results["failures"]:
            console.print("\n## Failed\n")
            for name, reason in results["failures"].items():
                console.print(f"- {name}: {reason}", soft_wrap=True)


def tables(wanted: Sequence[float], runs: Runs) -> list[Table]:
    """PSNR, its gain and SSIM at each evaluation, iterations and seconds to PSNRs, and times; of one scene."""
    scores = [quality(runs, "psnr", "PSNR in dB")]
    if BASELINE in samplers_of(runs):
        scores.append(same_seed(runs, BASELINE, "Gain over uniform of the same seed in dB"))
    if any("ssim" in run for run in runs):
        scores.append(quality(runs, "ssim", "SSIM"))
    return [*scores, iterations(wanted, runs), equal_seconds(runs), times(runs)]


def quality(runs: Runs, key: str, title: str) -> Table:
    """A metric at each evaluation."""
    out = _table(title, "sampler", "seeds", *(f"{at:,} it." for at in iterations_of(runs)))
    for sampler in samplers_of(runs):
        mine = [run for run in runs if run["sampler"] == sampler]
        cells = [
            mean_and_spread([run[key] for run in mine if run["iteration"] == at], 2 if key == "psnr" else 3)
            for at in iterations_of(runs)
        ]
        out.add_row(sampler, str(len(seeds_of(mine))), *cells)
    return out


def targets(wanted: Sequence[float], runs: Runs) -> list[float]:
    """PSNRs to tell the iterations to: those that are wanted, or uniform's own mean at each evaluation."""
    if wanted:
        return list(wanted)
    own = [[r["psnr"] for r in runs if (r["sampler"], r["iteration"]) == (BASELINE, at)] for at in iterations_of(runs)]
    # rounded down, so that uniform itself reaches them
    return sorted({math.floor(100 * float(np.mean(values))) / 100 for values in own if values})


def iterations(wanted: Sequence[float], runs: Runs) -> Table:
    """Iterations needed to reach given PSNRs, and how many times fewer than uniform (figure 2)."""
    wanted, first = targets(wanted, runs), iterations_of(runs)[0]
    out = _table(
        "Iterations to a PSNR of the mean over the seeds, and uniform's over these",
        "sampler",
        *(f"{psnr:.2f} dB" for psnr in wanted),
    )
    for sampler in samplers_of(runs):
        cells = []
        for psnr in wanted:
            mine, base = reached(runs, sampler, psnr), reached(runs, BASELINE, psnr)
            if mine is None:
                cells.append(NOT_REACHED)
            elif mine == first:
                cells.append(f"at most {first:,}")
            else:
                cells.append(f"{mine:,.0f}" + (f" ({base / mine:.2f}x)" if base is not None else ""))
        out.add_row(sampler, *cells)
    return out


def reached(runs: Runs, sampler: str, psnr: float) -> float | None:
    """Return the iteration at which the mean over the seeds reaches a PSNR, or None if it does not.

    Iterations are interpolated between evaluations. What the first evaluation has passed counts as reached there.
    """
    mine = [run for run in runs if run["sampler"] == sampler]
    curve = [
        (at, float(np.mean([run["psnr"] for run in mine if run["iteration"] == at]))) for at in iterations_of(mine)
    ]
    return crossing(curve, psnr)


def crossing(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a curve of (iteration, value), linear between its points, first reaches a level; None if it does not.

    >>> crossing([(100, 20.0), (200, 22.0)], 21.0)
    150.0
    """
    if curve and curve[0][1] >= level:
        return float(curve[0][0])
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if y1 >= level:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def equal_seconds(runs: Runs) -> Table:
    """PSNR after as many seconds of training as uniform takes to each evaluation."""
    base = [run for run in runs if run["sampler"] == BASELINE]
    marks = [float(np.mean([run["seconds"] for run in base if run["iteration"] == at])) for at in iterations_of(base)]
    out = _table("PSNR in dB at equal seconds of training", "sampler", *(f"{mark:,.0f} s" for mark in marks))
    for sampler in samplers_of(runs):
        mine = [run for run in runs if run["sampler"] == sampler]
        curve = [
            [float(np.mean([run[key] for run in mine if run["iteration"] == at])) for key in ("seconds", "psnr")]
            for at in iterations_of(mine)
        ]
        seconds, psnr = zip(*curve, strict=True)
        within = [seconds[0] <= mark <= seconds[-1] * (1 + 1e-9) for mark in marks]
        values = np.interp(marks, seconds, psnr)
        out.add_row(sampler, *(f"{value:.2f}" if known else "-" for value, known in zip(values, within, strict=True)))
    return out


def times(runs: Runs) -> Table:
    """Time and memory of training, evaluation not counted."""
    out = _table(
        "Training", "sampler", "median step, ms", "over uniform", "rays per second", "peak memory, GB", "seconds"
    )
    last = [run for run in runs if run["iteration"] == max(iterations_of(runs))]
    base = [run["seconds_per_step"] for run in last if run["sampler"] == BASELINE]
    for sampler in samplers_of(last):
        mine = [run for run in last if run["sampler"] == sampler]
        step = [1000 * run["seconds_per_step"] for run in mine]
        over = f"{np.mean(step) / np.mean(base) / 10 - 100:+.0f} %" if base else ""
        out.add_row(
            sampler,
            f"{np.mean(step):.1f} ({min(step):.1f} - {max(step):.1f})",
            over,
            f"{np.mean([run['rays_per_second'] for run in mine]):,.0f}",
            f"{max(run['peak_memory'] for run in mine) / 1e9:.2f}",
            f"{np.mean([run['seconds'] for run in mine]):.0f}",
        )
    return out


def gains(runs: Runs) -> Table | None:
    """Mean over the scenes of the gain over uniform with the same seed; None for a single scene."""
    if len(scenes_of(runs)) < 2:
        return None
    return same_seed(runs, BASELINE, "Gain over uniform of the same seed in dB, mean over the scenes")


def same_seed(runs: Runs, baseline: str, title: str) -> Table:
    """Mean over the scenes of the gain over a baseline with the same seed, at each evaluation.

    Of the samplers and seeds that all scenes have.
    """
    scenes, known = scenes_of(runs), {(r["scene"], r["sampler"], r["seed"], r["iteration"]): r["psnr"] for r in runs}

    def gain(sampler: str, seed: int, at: int) -> float | None:
        pairs = [(known.get((s, sampler, seed, at)), known.get((s, baseline, seed, at))) for s in scenes]
        gains = [mine - base for mine, base in pairs if mine is not None and base is not None]
        return float(np.mean(gains)) if len(gains) == len(scenes) else None

    out = _table(title, "sampler", "seeds", *(f"{at:,} it." for at in iterations_of(runs)))
    for sampler in samplers_of(runs):
        rows = [[gain(sampler, seed, at) for at in iterations_of(runs)] for seed in seeds_of(runs)]
        whole = [row for row in rows if None not in row]
        if whole and sampler != baseline:
            out.add_row(sampler, str(len(whole)), *map(mean_and_spread, zip(*whole, strict=True)))
    return out


def with_paper(preset: Preset, runs: Runs) -> Table | None:
    """PSNR and gain over uniform, ours and the paper's."""
    if preset.paper is None:
        return None
    with (preset.folder / preset.paper).open(encoding="utf-8") as file:
        rows = {(r["scene"], r["sampler"], int(r["iterations"])): float(r["psnr"]) for r in csv.DictReader(file)}
    out = _table("PSNR in dB, and gain over uniform", "scene", "iterations", "sampler", "ours", "the paper's")
    for scene in scenes_of(runs):
        for at in iterations_of(runs):
            for sampler, theirs in IN_PAPER.items():
                mine = [
                    run["psnr"]
                    for run in runs
                    if (run["scene"], run["sampler"], run["iteration"]) == (scene, sampler, at)
                ]
                name = scene.rsplit("/", 1)[-1]
                if not mine or (name, theirs, at) not in rows:
                    continue
                base = [
                    run["psnr"]
                    for run in runs
                    if (run["scene"], run["sampler"], run["iteration"]) == (scene, BASELINE, at)
                ]
                gain = f" ({np.mean(mine) - np.mean(base):+.2f})" if base else ""
                paper = rows[name, theirs, at]
                their_gain = paper - rows[name, "uniform", at]
                out.add_row(name, f"{at:,}", sampler, mean_and_spread(mine) + gain, f"{paper:.2f} ({their_gain:+.2f})")
    return out


def convergence(runs: Runs, of: str = "held-out views") -> Figure:
    """PSNR against iterations and against seconds of training: mean over the seeds, and their range."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("iteration", "seconds"), strict=True):
        for number, sampler in enumerate(samplers_of(runs)):
            mine = [run for run in runs if run["sampler"] == sampler]
            at = sorted({run["iteration"] for run in mine})
            points = [[run for run in mine if run["iteration"] == step] for step in at]
            x = [np.mean([run[key] for run in point]) for point in points]
            psnr = [[run["psnr"] for run in point] for point in points]
            axes.plot(x, [np.mean(p) for p in psnr], color=f"C{number}", marker=".", label=sampler)
            axes.fill_between(x, [min(p) for p in psnr], [max(p) for p in psnr], color=f"C{number}", alpha=0.15, lw=0)
        axes.set_xlabel("iterations" if key == "iteration" else "seconds of training")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"PSNR of {of} (dB)")
    figure.axes[1].legend(fontsize="small")
    return figure


def speed_up(wanted: Sequence[float], runs: Runs) -> Figure:
    """How many times fewer iterations than uniform each sampler needs to given PSNRs."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    wanted, samplers = targets(wanted, runs), [s for s in samplers_of(runs) if s != BASELINE]
    width, shown = 0.8 / max(1, len(samplers)), set()
    for number, sampler in enumerate(samplers):
        for place, psnr in enumerate(wanted):
            mine, base = reached(runs, sampler, psnr), reached(runs, BASELINE, psnr)
            if mine is None or base is None or mine == iterations_of(runs)[0]:
                continue  # not reached, or no one knows when
            x = place + (number - (len(samplers) - 1) / 2) * width
            axes.bar(x, base / mine, width, color=f"C{number + 1}", label=None if sampler in shown else sampler)
            shown.add(sampler)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(wanted)), [f"{psnr:.2f} dB" for psnr in wanted])
    axes.set(ylabel="uniform's iterations over the sampler's", xlabel="PSNR")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return figure


def pictures(runs: Runs, folder: Path) -> Figure | None:
    """Renders of one held-out view and their errors, a row for each sampler (figures 1 and 5)."""
    samplers = [sampler for sampler in samplers_of(runs) if (folder / sampler).is_dir()]
    at = iterations_of(runs)
    if not samplers:
        return None
    figure = Figure(figsize=(1 + 4.4 * len(at), 2.2 * len(samplers)), layout="constrained")
    grid = figure.subplots(len(samplers), 2 * len(at), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for row, sampler in zip(grid, samplers, strict=True):
        row[0].set_ylabel(sampler, fontsize="small")
        for place, step in enumerate(at):
            picture = cv2.imread(str(folder / sampler / f"{step}.png"))
            if picture is None:
                continue
            truth, render = np.split(picture[..., ::-1] / 255.0, 2, axis=1)
            error = np.abs(truth - render).mean(axis=-1)
            row[2 * place].imshow(render)
            row[2 * place + 1].imshow(error, vmin=0, vmax=ERROR_SCALE, cmap="magma")
    for place, step in enumerate(at):
        grid[0, 2 * place].set_title(f"{step:,} iterations", fontsize="small")
        grid[0, 2 * place + 1].set_title(f"absolute error, 0 - {ERROR_SCALE}", fontsize="small")
    return figure


def mean_and_spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and standard deviation; the mean alone of a single value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.{digits}f}"


def scenes_of(runs: Runs) -> list[str]:
    """Scenes, in the order of their runs."""
    return list(dict.fromkeys(run["scene"] for run in runs))


def samplers_of(runs: Runs) -> list[str]:
    """Samplers, in the order of their runs."""
    return list(dict.fromkeys(run["sampler"] for run in runs))


def seeds_of(runs: Runs) -> list[int]:
    """Seeds, in order."""
    return sorted({run["seed"] for run in runs})


def iterations_of(runs: Runs) -> list[int]:
    """Iterations of evaluations, in order."""
    return sorted({run["iteration"] for run in runs})


def _table(title: str, *headings: str) -> Table:
    out = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for place, heading in enumerate(headings):
        out.add_column(heading, justify="left" if place == 0 else "right")
    return out
