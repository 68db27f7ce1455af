"""Photographs: reading any file that OpenCV reads, and writing as the file was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from nerfstudio_softmining import files
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat

os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")  # OpenCV reads this at its first .exr
import cv2  # noqa: E402

INTEGER_LIMITS = {"uint8": 255, "uint16": 65535}
CHANNEL_ORDER = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}
"""Order of OpenCV's channels, BGRA, as RGBA, and the other way round."""


@dataclass(frozen=True)
class Encoding:
    """Conversion of the values in a file to values in [0, 1], in which errors are measured, and back.

    Integers are divided by their limit. High dynamic range is compressed, as an error in a lamp would outweigh all
    others: x becomes sign(x) log(1 + |x| / unit), with the median of |x| as the unit, stretched from `low` - `high` to
    [0, 1]. Colours are multiplied by alpha, so that what cannot be seen is not fitted.
    """

    dtype: str
    """uint8, uint16 or float32."""
    channels: int
    """1 grey, 3 RGB, 4 RGBA."""
    unit: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def encode(self, values: NDArray) -> Tensor:
        """Return values of a file [h, w, c], in the order RGBA, as float32 in [0, 1]."""
        encoded = torch.from_numpy(values.astype(np.float32))  # torch before 2.3 has no uint16
        if self.dtype in INTEGER_LIMITS:
            encoded.div_(INTEGER_LIMITS[self.dtype])
        else:
            colours = encoded[..., :3]
            colours.copy_((_compress(colours, self.unit) - self.low) / (self.high - self.low))
        if self.channels == 4:
            encoded[..., :3] *= encoded[..., 3:].clamp_(0, 1)
        return encoded

    def decode(self, encoded: Tensor) -> NDArray:
        """Return the values of a file from those of `encode`: rounded for integers, and black where transparent."""
        encoded = encoded.float().cpu()
        if self.channels == 4:
            alpha = encoded[..., 3:].clamp(0, 1)
            colours = torch.where(alpha > 0, encoded[..., :3] / alpha.clamp_min(1e-6), 0)
            encoded = torch.cat((colours, alpha), dim=-1)
        if self.dtype in INTEGER_LIMITS:
            scaled = encoded.clamp(0, 1) * INTEGER_LIMITS[self.dtype]
            return scaled.round().numpy().astype(self.dtype)
        stretched = encoded[..., :3] * (self.high - self.low) + self.low
        colours = stretched.sign() * self.unit * torch.expm1(stretched.abs())
        return torch.cat((colours, encoded[..., 3:]), dim=-1).numpy()


def _compress(values: Tensor, unit: float) -> Tensor:
    return values.sign() * torch.log1p(values.abs() / unit)


@dataclass(frozen=True)
class Photo:
    """A photograph in memory."""

    values: Float[Tensor, "h w c"]
    """Values in [0, 1]."""
    encoding: Encoding
    """Conversion of the values of the file."""

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.values.shape[0], self.values.shape[1]

    def at(self, pixels: Int64[Tensor, "n 2"]) -> Float[Tensor, "n c"]:
        """Return values of whole pixels (row, column)."""
        return self.values[pixels[:, 0], pixels[:, 1]]

    def to(self, device: torch.device | str) -> Photo:
        """Return the photograph on another device."""
        return Photo(self.values.to(device), self.encoding)


def read(path: Path) -> Photo:
    """Read a photograph of 8 or 16 bit, or of high dynamic range; grey, RGB or RGBA; turned by its EXIF.

    Raises:
        UserError: if it cannot be used, with the reason.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file. Name a photograph, such as photo.jpg.")
    try:
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if image is not None and (image.ndim == 2 or image.shape[2] in (1, 3)):
            # turned by EXIF, without alpha
            image = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)
    except cv2.error as error:
        raise UserError(f"OpenCV cannot read {path}: {error}. Convert it to PNG or JPEG.") from error
    if image is None:
        raise UserError(f"{path} is not an image that OpenCV reads. Convert it to PNG, JPEG, TIFF, .hdr or .exr.")
    values = image[..., None] if image.ndim == 2 else image
    channels = values.shape[2]
    if channels not in CHANNEL_ORDER:
        raise UserError(f"{path} has {channels} channels: grey, RGB and RGBA can be fitted. Convert it to one of them.")
    values = values[..., CHANNEL_ORDER[channels]]
    if values.dtype.name in INTEGER_LIMITS:
        encoding = Encoding(values.dtype.name, channels)
    elif values.dtype in (np.float16, np.float32, np.float64):
        encoding = _high_range_encoding(values, path)
    else:
        raise UserError(
            f"{path} holds values of type {values.dtype}: 8 and 16 bit, and floating point, can be fitted. Convert it."
        )
    return Photo(encoding.encode(values).contiguous(), encoding)


def read_for_training(path: Path) -> Photo:
    """Read a photograph to the GPU, or to the CPU where there is none, and prepare that for training."""
    if torch.cuda.is_available():
        return read(path).to("cuda")
    compat.prepare_cpu()
    return read(path)


def _high_range_encoding(values: NDArray, path: Path) -> Encoding:
    """Return the encoding of values of high dynamic range."""
    bad = ~np.isfinite(values).all(axis=2)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(
            f"{path} has {bad.sum():,} pixels that are NaN or infinite, the first in row {row}, column {column}. "
            "Repair them, by an image editor or OpenCV's inpaint."
        )
    colours = torch.from_numpy(values[..., :3].astype(np.float32))
    sample = colours.flatten()[:: max(1, colours.numel() // (1 << 22))].abs()
    unit = float(sample[sample > 0].median()) if (sample > 0).any() else 1.0
    low, high = (float(_compress(end, unit)) for end in colours.aminmax())
    return Encoding("float32", values.shape[2], unit, low, high if high > low else low + 1)


def write(values: NDArray, path: Path) -> Path:
    """Write values [h, w, c] in the order RGBA, integers as PNG and floating point as OpenEXR.

    Returns:
        The file, with the suffix that suits it.

    Raises:
        UserError: if there can be no such file.
    """
    if not path.name:
        raise UserError(f"--output is {path}, which is a folder. Name a file.")
    path = path.with_suffix(".exr" if values.dtype == np.float32 else ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _, encoded = cv2.imencode(path.suffix, np.ascontiguousarray(values[..., CHANNEL_ORDER[values.shape[2]]]))
    except cv2.error as error:
        # OpenEXR goes through a temporary file: where a full disk has no place for that, this fails with the reason
        with files.replacing(path) as part:
            part.write_bytes(bytes(values.nbytes))
            # some builds of OpenCV have no OpenEXR
            raise UserError(f"OpenCV cannot write {path}: {error}. Install opencv-python-headless 4.") from error
    files.write(encoded.tobytes(), path)
    return path


def to_rgb(values: Tensor) -> NDArray[np.float32]:
    """Return values [h, w, c] as RGB in [0, 1] for pictures, with transparency on black."""
    colours = values[..., :3].float().clamp(0, 1).cpu().numpy()
    return np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours


def fit_within(size: Sequence[int], side: int) -> tuple[int, int]:
    """Return the height and width of the same shape whose longer side is at most `side`.

    >>> fit_within((100, 200), 50)
    (25, 50)
    """
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
