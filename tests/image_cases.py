"""Made-up photographs and small fits for tests of image fitting."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings
from nerfstudio_softmining.images.photo import Encoding, Photo

SMALL = {"levels": 4, "log2_hashmap_size": 10, "width": 16, "batch": 256}
"""Settings of a field and a batch that train in a millisecond or two."""

SAMPLERS = (
    "uniform",
    "uniform-weighted",
    "edge",
    "langevin",
    "multinomial,refresh=3",
    "error-map,interval=2",
    "quadtree,reduction=2",
    "detail,interval=3",
    "greedy,interval=3",
    "evos,first_interval=4,last_interval=2",
)
"""All ways of choosing points, with settings that change maps within a few steps."""


def picture(height: int = 24, width: int = 40, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """A slope, a bright square with hard edges, and noise that grows to the right; in the order RGBA."""
    random = np.random.default_rng(seed)
    row, column = np.mgrid[:height, :width] / max(height, width)
    square = (np.abs(row - 0.3) < 0.15) & (np.abs(column - 0.5) < 0.2)
    noise = random.uniform(-0.5, 0.5, (height, width, channels)) * 0.5 * column[..., None]
    slope = 0.2 + 0.3 * row[..., None] * np.linspace(0.5, 1, channels)
    values = np.clip(slope + 0.5 * square[..., None] + noise, 0, 1)
    if channels == 4:
        values[..., 3] = np.where(column > 0.9, 0, 1 - 0.5 * row)
    return np.round(values * 255).astype(np.uint8)


def photo_of(values: NDArray) -> Photo:
    encoding = Encoding(values.dtype.name, values.shape[2])
    return Photo(encoding.encode(values), encoding)


def make_photo(height: int = 24, width: int = 40, channels: int = 3, seed: int = 0) -> Photo:
    return photo_of(picture(height, width, channels, seed))


def make_fit(sampler: str = "uniform", photo: Photo | None = None, seed: int = 0, iterations: int = 100, **changes):
    settings = make_settings(sampler, seed, iterations, FitConfig(**SMALL | changes))
    return Fit(make_photo() if photo is None else photo, settings)


def centres(height: int, width: int) -> Tensor:
    """Rows and columns of the centres of all pixels, row after row."""
    return torch.tensor([(row + 0.5, column + 0.5) for row in range(height) for column in range(width)])


def predictions(field: nn.Module, size: tuple[int, int]) -> Tensor:
    """Values of a field at all pixels [h, w, c], row by row."""
    with torch.no_grad():
        rows = (centres(*size) / torch.tensor(size)).split(size[1])
        return torch.stack([field(row) for row in rows])


def residuals(fit: Fit) -> Tensor:
    """Prediction of the field as it is minus truth [h, w, c]."""
    return predictions(fit.field, fit.photo.size) - fit.photo.values
