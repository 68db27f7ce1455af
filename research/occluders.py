"""Does a sampler chase what cannot be learnt? Paint occluders into a tenth of the training images, and compare.

Held-out images stay clean. For each sampler the table has the PSNR with occluders:

    python research/occluders.py configs/captures.yaml --data FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from nerfstudio.engine.trainer import TrainerConfig
from torch import Tensor

from nerfstudio_softmining.bench.bench import run_bench
from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManager
from nerfstudio_softmining.plugin.dataset import NamesBrokenFiles

EVERY = 10
"""One image in this many has an occluder."""
SIDE = 0.35
"""Height and width of an occluder, in heights and widths of the image."""
SQUARES = 6
"""Squares along each side of its pattern."""


def occlude(image: Tensor, seed: int) -> Tensor:
    """Return an image [h, w, c] of bytes, or of floats in [0, 1], with a chessboard of two colours somewhere in it."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(image.shape[:2])
    side = (SIDE * size).long()
    row, column = (torch.rand(2, generator=generator) * (size - side)).long().tolist()
    height, width = side.tolist()
    is_second = (torch.arange(height)[:, None] * SQUARES // height + torch.arange(width) * SQUARES // width) % 2
    colours = torch.rand(2, 3, generator=generator)[is_second]
    image = image.clone()
    part = image[row : row + height, column : column + width]
    largest = 1.0 if image.is_floating_point() else 255
    part[..., :3] = (colours * largest).to(image.dtype)
    part[..., 3:] = largest
    return image


class OccludedDataset(NamesBrokenFiles):
    """The images of a scene, some of them with an occluder."""

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """Load an image and its mask, and paint the occluder."""
        data = super().get_data(image_idx, image_type)
        if image_idx % EVERY == 0:
            data["image"] = occlude(data["image"], image_idx)
        return data


class OccludedDataManager(SoftMiningDataManager):
    """Trains on images with occluders, and evaluates on clean ones."""

    def create_train_dataset(self) -> OccludedDataset:
        """Return the training images."""
        return OccludedDataset(self.train_dataparser_outputs, self.config.camera_res_scale_factor)


def compare(
    preset: tyro.conf.Positional[Path],
    data: Path,
    output: Path = Path("outputs/occluders"),
    scenes: tuple[str, ...] = (),
    samplers: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    at: tuple[int, ...] = (),
    set: tuple[str, ...] = (),
) -> bool:
    """Train with occluders and print PSNR; return whether every run went well.

    Args:
        preset: preset that is run.
        data: folder that the scenes' folders are in.
        output: folder for what comes out.
        scenes: scenes of the preset; all if not given.
        samplers: what to compare; the preset's if not given.
        seeds: seeds; the preset's if not given.
        at: iterations of evaluations; the preset's if not given.
        set: settings as name=value, added to those of the preset.
    """

    def prepare(config: TrainerConfig) -> None:
        manager: Any = config.pipeline.datamanager
        manager._target = OccludedDataManager

    changes = dict(scenes=scenes, samplers=samplers, seeds=seeds, at=at, set=set)
    return run_bench(preset, data, output, changes, prepare)


if __name__ == "__main__":
    sys.exit(not tyro.cli(compare))
