"""The report of fits of a photograph: tables, plots, crops, maps of error and of draws."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from nerfstudio.utils.rich_utils import CONSOLE
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from nerfstudio_softmining.bench import report as bench
from nerfstudio_softmining.files import replacing, save_figure
from nerfstudio_softmining.images.photo import Photo, fit_within, to_rgb

CROPS = 3
"""Windows that are shown at full size."""
CROP_SHARE = 10
"""The shorter side of the photograph over the side of a crop."""
SMALLEST_CROP = 48
"""Side of a crop in pixels, at least."""
MAP_SIDE = 700
"""Longer side in pixels of maps of error."""
DRAWS_RANGE = 3
"""Powers of two, both ways, of the colour scale of draws."""


@dataclass
class Picture:
    """The reconstruction of one fit."""

    sampler: str
    iteration: int
    values: Tensor
    """The reconstruction [h, w, c] in [0, 1]."""
    psnr: float
    """Over all pixels, in dB."""
    path: Path
    """File of the reconstruction."""
    draws: NDArray[np.float32] | None
    """How often each part was drawn lately over how often a uniform draw does, as a power of two."""

    def __str__(self) -> str:
        return f"{self.sampler}: {self.psnr:.2f} dB over all pixels after {self.iteration:,} iterations"


def write(photo: Photo, pictures: Sequence[Picture], results: dict, output: Path, name: str) -> None:
    """Write report.md, and the plots and pictures that it shows."""
    for file_name, figure in (("crops.jpg", crops(photo, pictures)), ("maps.jpg", maps(photo, pictures))):
        save_figure(figure, output / file_name, dpi=120, pil_kwargs={"quality": 90})
    with replacing(output / "report.md") as part, part.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=bench.REPORT_WIDTH, markup=False, emoji=False, highlight=False)
        height, width = photo.size
        console.print(f"# {html.escape(name)}\n\n{height} x {width} pixels; {results['device']}.\n", soft_wrap=True)
        if results["runs"]:
            runs = bench.to_frame(results["runs"])
            for table in bench.tables((), runs):
                console.print(table)
            save_figure(bench.plot_convergence(runs, "the photograph"), output / "convergence.png", dpi=150)
            console.print("\n![PSNR against iterations and seconds](convergence.png)")
        console.print("\n## Pictures\n")
        for picture in pictures:
            path = picture.path.relative_to(output)
            console.print(f"- {html.escape(str(picture))}, [{path}](<{path}>)", soft_wrap=True)
        console.print("\n![Where reconstructions differ most](crops.jpg)\n\n![Errors and draws](maps.jpg)")


def print_summary(pictures: Sequence[Picture], results: dict, output: Path) -> None:
    """Print the tables of PSNR, the PSNR of each picture, and where all files are."""
    if results["runs"]:
        for table in bench.tables((), bench.to_frame(results["runs"]))[:2]:
            CONSOLE.print(table)
    for picture in pictures:
        CONSOLE.print(f"{picture}, {picture.path}", soft_wrap=True, markup=False, highlight=False)
    CONSOLE.print(f"{output / 'report.md'} has crops, maps of error and plots.", soft_wrap=True, markup=False)


def crops(photo: Photo, pictures: Sequence[Picture]) -> Figure:
    """Plot the photograph and its reconstructions in the windows where their errors differ most."""
    side = min(max(SMALLEST_CROP, min(photo.size) // CROP_SHARE), *photo.size)
    windows = largest_differences(photo, pictures, side)
    columns = 2 + len(pictures)
    figure = Figure(figsize=(2.6 * columns, 2.7 * len(windows)), layout="constrained")
    grid = figure.subplots(len(windows), columns, squeeze=False)
    small = _reduced(to_rgb(photo.values), MAP_SIDE)
    for axes, (row, column) in zip(grid, windows, strict=True):
        inside = (slice(row, row + side), slice(column, column + side))
        scale = len(small) / photo.size[0]
        axes[0].imshow(small)
        axes[0].add_patch(
            Rectangle((column * scale, row * scale), side * scale, side * scale, fill=False, color="red", lw=1.5)
        )
        axes[1].imshow(to_rgb(photo.values[inside]), interpolation="nearest")
        for axis, picture in zip(axes[2:], pictures, strict=True):
            axis.imshow(to_rgb(picture.values[inside]), interpolation="nearest")
            error = float((picture.values[inside] - photo.values[inside].cpu()).square().mean())
            axis.set_xlabel(f"{-10 * np.log10(max(error, 1e-12)):.1f} dB", fontsize="small")
    for axis, title in zip(grid[0], ("", "photograph", *(p.sampler for p in pictures)), strict=True):
        axis.set_title(title, fontsize="small")
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def largest_differences(photo: Photo, pictures: Sequence[Picture], side: int) -> list[tuple[int, int]]:
    """Return the square windows in which the squared errors of the first and the last picture differ most.

    No two of them overlap. Of a single picture, they are those of the largest error.

    Returns:
        First row and column of each window.
    """
    first, last = (_squared_error(photo, picture) for picture in (pictures[0], pictures[-1]))
    difference = np.abs(first - last) if len(pictures) > 1 else first
    blurred = cv2.boxFilter(difference, -1, (side, side), anchor=(0, 0), borderType=cv2.BORDER_REPLICATE)
    score = blurred[: difference.shape[0] - side + 1, : difference.shape[1] - side + 1].copy()
    found = []
    while len(found) < CROPS and score.max() > -1:
        row, column = (int(index) for index in np.unravel_index(score.argmax(), score.shape))
        found.append((row, column))
        score[max(0, row - side + 1) : row + side, max(0, column - side + 1) : column + side] = -1
    return found


def maps(photo: Photo, pictures: Sequence[Picture]) -> Figure:
    """Plot absolute errors of the reconstructions, and how often each part was drawn lately."""
    errors = [_reduced(np.sqrt(_squared_error(photo, picture)), MAP_SIDE) for picture in pictures]
    largest = max(float(np.quantile(error, 0.99)) for error in errors) or 1.0
    height, width = photo.size
    figure = Figure(figsize=(1.5 + 3.6 * len(pictures), 1 + 2 * 3.4 * min(height / width, 3)), layout="constrained")
    grid = figure.subplots(2, len(pictures), squeeze=False)
    shown_error = shown_draws = None
    for (above, below), picture, error in zip(grid.T, pictures, errors, strict=True):
        shown_error = above.imshow(error, cmap="magma", vmin=0, vmax=largest)
        above.set_title(f"{picture.sampler}, {picture.psnr:.2f} dB", fontsize="small")
        if picture.draws is not None:
            extent = (0, width, height, 0)
            shown_draws = below.imshow(
                picture.draws, cmap="coolwarm", vmin=-DRAWS_RANGE, vmax=DRAWS_RANGE, extent=extent
            )
        for axis in (above, below):
            axis.set(xticks=[], yticks=[])
    if shown_error is not None:
        figure.colorbar(shown_error, ax=list(grid[0]), extend="max", label="error (root mean square of the channels)")
    if shown_draws is not None:
        bar = figure.colorbar(shown_draws, ax=list(grid[1]), extend="both", label="draws, relative to uniform")
        ticks = range(-DRAWS_RANGE, DRAWS_RANGE + 1)
        bar.set_ticks(list(ticks), labels=[f"{2.0**octave:g}" for octave in ticks])
    return figure


def _squared_error(photo: Photo, picture: Picture) -> NDArray[np.float32]:
    """Return the mean squared error over the channels, of each pixel [h, w]."""
    difference = picture.values - photo.values.cpu()
    return difference.square_().mean(dim=-1).numpy()


def _reduced(picture: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return a picture whose longer side is at most `side`, of means over areas."""
    height, width = fit_within(picture.shape[:2], side)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
