"""Picture where each sampler draws, on one view: the pictures of docs/samplers.md and docs/photographs.md.

    python research/gallery.py nerf_synthetic/lego/train/r_0.png

Fits the photograph with every sampler, from the same start, and writes docs/pictures/SAMPLER.jpg: how often each part
was drawn in the last steps, as colours over the darkened photograph. All samplers share one scale. Also writes
equal_iterations.jpg: reconstruction, error and draws of some samplers after few iterations. Seed 0; two minutes on two
CPU cores.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings
from nerfstudio_softmining.images.photo import Photo
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.samplers import registry

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
BATCH = 1024
"""Points of a step: a 150th of the photograph's pixels, so that choosing them matters."""
RECENT_BATCHES = 200
"""Batches whose draws are shown."""
OCTAVES = 3
"""Powers of two, both ways, of the colour scale."""
COMPARED = ("uniform", "langevin", "detail")
"""Samplers whose reconstructions are shown side by side."""
COMPARED_ITERATIONS = 100
"""Iterations of these."""
SETTINGS = {"multinomial": "multinomial,refresh=50"}
"""Samplers with settings of their own here: multinomial evaluates too rarely for a short fit."""


def fit(photo: Photo, sampler: str, iterations: int) -> Fit:
    """Return a field trained on the photograph, with its last draws."""
    settings = make_settings(SETTINGS.get(sampler, sampler), 0, iterations, FitConfig(batch=BATCH))
    fitted = Fit(photo, settings)
    fitted.drawn = deque(maxlen=RECENT_BATCHES)
    while fitted.iteration < iterations:
        fitted.step()
    return fitted


def reduce(photo: Photo, side: int) -> Photo:
    """Return the photograph with at most the given number of pixels along its longer side."""
    height, width = photos.fit_within(photo.size, side)
    values = cv2.resize(photo.values.numpy(), (width, height), interpolation=cv2.INTER_AREA)
    return Photo(torch.from_numpy(values), photo.encoding)


def density(position: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return the density of draws relative to uniform ones at every pixel, [h, w]."""
    height, width = size
    row, column = position.long().unbind(-1)
    count = torch.bincount(row * width + column, minlength=height * width).view(height, width)
    smooth = cv2.GaussianBlur(count.float().numpy(), (0, 0), max(size) / 250)
    return smooth / smooth.mean()


def heat(density: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Return the colours of a density over the darkened picture, [h, w, 3] in [0, 1]."""
    octaves = np.log2(np.maximum(density, 2.0**-OCTAVES)).clip(-OCTAVES, OCTAVES)
    colours = colormaps["inferno"]((octaves + OCTAVES) / (2 * OCTAVES))[..., :3]
    grey = picture.mean(axis=-1, keepdims=True)
    return 0.3 * grey + 0.7 * colours


def write(picture: np.ndarray, name: str) -> None:
    """Write a picture of under 60 kB."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    pixels = np.ascontiguousarray((picture[..., ::-1] * 255).round().astype(np.uint8))
    for quality in range(90, 20, -5):
        cv2.imwrite(str(PICTURES / f"{name}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if (PICTURES / f"{name}.jpg").stat().st_size < 60_000:
            return


def compare(photo: Photo, name: str) -> None:
    """Write reconstructions and errors of some samplers after equal and few iterations, and where they drew."""
    truth = photos.to_rgb(photo.values)
    figure = Figure(figsize=(8.0, 8.3), layout="constrained")
    axes = figure.subplots(3, len(COMPARED))
    for column, sampler in zip(axes.T, COMPARED, strict=True):
        fitted = fit(photo, sampler, COMPARED_ITERATIONS)
        picture = photos.to_rgb(torch.cat(list(fitted.render(photo.size))))
        column[0].set_title(f"{sampler}: {fitted.psnr():.1f} dB", fontsize=11)
        column[0].imshow(picture)
        column[1].imshow(np.abs(picture - truth).mean(axis=-1), cmap="magma", vmin=0, vmax=0.2)
        column[2].imshow(heat(density(torch.cat(list(fitted.drawn)), photo.size), truth))
    for axis, text in zip(axes[:, 0], (f"{COMPARED_ITERATIONS} iterations", "error", "draws"), strict=True):
        axis.set_ylabel(text, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(PICTURES / f"{name}.jpg", dpi=80, pil_kwargs={"quality": 65})


def scale(name: str) -> None:
    """Write the scale of the colours of draws."""
    figure = Figure(figsize=(4.0, 0.55), layout="constrained")
    ramp = np.linspace(0, 1, 256)[None].repeat(2, axis=0)
    axes = figure.subplots()
    axes.imshow(ramp, cmap="inferno", aspect="auto", extent=(-OCTAVES, OCTAVES, 0, 1))
    axes.set_xticks([-OCTAVES, 0, OCTAVES], [f"1/{2**OCTAVES} or less", "as often as uniform", f"{2**OCTAVES} or more"])
    axes.set_yticks([])
    figure.savefig(PICTURES / f"{name}.png", dpi=100)


def main(
    photo: tyro.conf.Positional[Path],
    side: int = 400,
    iterations: int = 600,
    samplers: tuple[str, ...] = tuple(registry.samplers()),
) -> None:
    """Make all pictures.

    Args:
        photo: the photograph.
        side: pixels along its longer side, after it has been reduced.
        iterations: training steps of each sampler.
        samplers: samplers with a picture of their own.
    """
    compat.prepare_cpu()
    reduced = reduce(photos.read(photo), side)
    for sampler in samplers:
        fitted = fit(reduced, sampler, iterations)
        print(f"{sampler}: {fitted.psnr():.2f} dB")
        write(heat(density(torch.cat(list(fitted.drawn)), reduced.size), photos.to_rgb(reduced.values)), sampler)
    compare(reduced, "equal_iterations")
    scale("scale")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
