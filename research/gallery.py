"""Picture where each sampler draws, on one view: the pictures of docs/samplers.md and docs/photographs.md.

    python research/gallery.py nerf_synthetic/lego/train/r_0.png

Fits the photograph with every sampler, from the same start, and writes docs/pictures/SAMPLER.jpg: how often each part
was drawn in the last steps, as colours over the darkened photograph. All samplers share one scale. Also writes
equal_iterations.jpg: reconstruction, error and draws of some samplers after few iterations. Seed 0; two minutes on two
CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from pathlib import Path

import cv2
import numpy as np
import torch
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
LAST = 200
"""Batches that a picture of draws is made of."""
OCTAVES = 3
"""Powers of two, both ways, that the colours stand for."""
COMPARED = ("uniform", "langevin", "detail")
"""Samplers whose reconstructions are shown side by side."""
EARLY = 100
"""Iterations of these."""
SETTINGS = {"multinomial": "multinomial,refresh=50"}
"""Samplers with settings of their own here: multinomial evaluates too rarely for a short fit."""


def fit(photo: Photo, sampler: str, iterations: int) -> Fit:
    """Train a field on the photograph, and keep its last draws."""
    settings = make_settings(SETTINGS.get(sampler, sampler), 0, iterations, FitConfig(batch=BATCH))
    fitted = Fit(photo, settings)
    fitted.drawn = deque(maxlen=LAST)
    while fitted.iteration < iterations:
        fitted.step()
    return fitted


def smaller(photo: Photo, side: int) -> Photo:
    """Return the photograph with the given number of pixels along its longer side."""
    scale = side / max(photo.size)
    size = (round(photo.size[1] * scale), round(photo.size[0] * scale))
    values = cv2.resize(photo.values.numpy(), size, interpolation=cv2.INTER_AREA)
    return Photo(torch.from_numpy(values), photo.encoding)


def density(position: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Estimate the density of draws relative to uniform ones, at every pixel."""
    height, width = size
    row, column = position.long().unbind(-1)
    count = torch.bincount(row * width + column, minlength=height * width).view(height, width)
    smooth = cv2.GaussianBlur(count.float().numpy(), (0, 0), max(size) / 250)
    return smooth / smooth.mean()


def heat(density: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Colour a density over the darkened picture."""
    octaves = np.log2(np.maximum(density, 2.0**-OCTAVES)).clip(-OCTAVES, OCTAVES)
    colours = colormaps["inferno"]((octaves + OCTAVES) / (2 * OCTAVES))[..., :3]
    grey = picture.mean(axis=-1, keepdims=True)
    return 0.3 * grey + 0.7 * colours


def shown(values: Tensor) -> np.ndarray:
    """Return values as RGB in [0, 1]; transparent parts are white."""
    colours = photos.to_rgb(values)
    return np.asarray(colours[..., :3]).clip(0, 1)


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
    truth = shown(photo.values)
    figure = Figure(figsize=(8.0, 8.3), layout="constrained")
    axes = figure.subplots(3, len(COMPARED))
    for column, sampler in zip(axes.T, COMPARED, strict=True):
        fitted = fit(photo, sampler, EARLY)
        picture = shown(torch.cat(list(fitted.render(photo.size))))
        column[0].set_title(f"{sampler}: {fitted.psnr():.1f} dB", fontsize=11)
        column[0].imshow(picture)
        column[1].imshow(np.abs(picture - truth).mean(axis=-1), cmap="magma", vmin=0, vmax=0.2)
        column[2].imshow(heat(density(torch.cat(list(fitted.drawn)), photo.size), truth))
    for axis, text in zip(axes[:, 0], (f"{EARLY} iterations", "error", "draws"), strict=True):
        axis.set_ylabel(text, fontsize=11)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
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


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--side", type=int, default=400, help="pixels along the longer side")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--samplers", nargs="*", default=list(registry.samplers()))
    arguments = parser.parse_args()
    compat.prepare_cpu()
    photo = smaller(photos.read(arguments.photo), arguments.side)
    for sampler in arguments.samplers:
        fitted = fit(photo, sampler, arguments.iterations)
        print(f"{sampler}: {fitted.psnr():.2f} dB")
        write(heat(density(torch.cat(list(fitted.drawn)), photo.size), shown(photo.values)), sampler)
    compare(photo, "equal_iterations")
    scale("scale")


if __name__ == "__main__":
    sys.exit(main())
