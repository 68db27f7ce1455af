"""Parser for scenes in the LLFF layout: `poses_bounds.npy` beside `images/`, `images_4/`, `images_8/`, ...

Each row of `poses_bounds.npy` holds a 3x5 matrix, row by row, and the scene's near and far bound. The matrix's columns
are the camera's axes [down, right, backwards] and its place in the world, then (height, width, focal length) of the
images that the poses were computed from. nerfstudio's cameras have OpenGL's axes [right, up, backwards].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nerfstudio.cameras import camera_utils
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.data.utils.dataparsers_utils import get_train_eval_split_interval
from nerfstudio.utils.rich_utils import CONSOLE
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nerfstudio_softmining.errors import UserError

MAX_AUTO_RESOLUTION = 1600
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class LLFFDataParserConfig(DataParserConfig):
    """A scene in the LLFF layout: poses_bounds.npy beside images/, images_4/, images_8/, ..."""

    _target: type = field(default_factory=lambda: LLFFDataParser)
    """Target class to instantiate."""
    data: Path = Path()
    """Folder of one scene, with poses_bounds.npy and at least one of images/, images_2/, images_4/, ... in it."""
    downscale_factor: int | None = None
    """Take the images of images_N/ (1: images/). If not set, the largest there are with both sides <= 1600 px."""
    eval_interval: int = 8
    """Hold out views 0, N, 2N, ... for evaluation and train on the others; at least 2."""
    orientation_method: Literal["pca", "up", "vertical", "none"] = "up"
    """How to turn the world: "up" and "vertical" make the cameras' common up direction +z."""
    center_method: Literal["poses", "focus", "none"] = "poses"
    """What to move to the origin: the cameras' mean place, or the point that they look at."""
    auto_scale_poses: bool = True
    """Whether to scale the world so that the cameras fit in a box of +/- 1."""
    scale_factor: float = 1.0
    """How much to scale the world by, on top of auto_scale_poses."""
    scene_scale: float = 1.0
    """Half the side of the scene box that models get."""


class Views(NamedTuple):
    """All views of a scene, in the order of their file names."""

    images: list[Path]
    sizes: NDArray[np.int64]
    """[views, 2]: actual (width, height) of each image"""
    focals: NDArray[np.float64]
    """[views, 2]: focal lengths along width and height, in pixels of the actual image"""
    poses: Tensor
    """[views, 4, 4]: camera to world in OpenGL axes, in the poses file's world"""


class LLFFDataParser(DataParser):
    """Parser for scenes in the LLFF layout."""

    config: LLFFDataParserConfig  # pyright: ignore[reportIncompatibleVariableOverride] # as in nerfstudio
    # nerfstudio's data managers set this to 1 when they only render and do not need the images, so it is no setting
    # of which folder to read (that is config.downscale_factor): it tells that the images may be missing.
    downscale_factor: int | None = None

    @cached_property
    def _views(self) -> Views:
        data, factor = self.config.data, self.config.downscale_factor
        if factor is not None and factor < 1:
            raise UserError(f"downscale_factor is {factor}: give 1 for images/, N for images_N/, or leave it unset.")
        if self.config.eval_interval < 2:
            raise UserError(
                f"eval_interval is {self.config.eval_interval}: every view would be held out and none left to train "
                "on; give at least 2 (papers use 8)."
            )
        if not data.is_dir():
            raise UserError(f"The data folder {data} does not exist: give --data the folder of one LLFF scene.")

        poses, pose_sizes, focals = read_poses_bounds(data / "poses_bounds.npy")
        try:
            images, sizes = choose_images(data, factor, len(poses))
        except UserError as error:
            if self.downscale_factor is None:
                raise
            CONSOLE.print(f"Rendering without the scene's images: {error}", markup=False)
            images = [data / f"view_{i:03d}" for i in range(len(poses))]
            sizes = np.rint(pose_sizes / (factor or 1)).astype(np.int64)
        return Views(images, sizes, focals[:, None] * sizes / pose_sizes, poses)

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs: Any) -> DataparserOutputs:
        images, sizes, focals, poses = self._views

        # The returned poses are not used: for "pca" they can differ from what the returned transform does.
        _, transform = camera_utils.auto_orient_and_center_poses(
            poses, method=self.config.orientation_method, center_method=self.config.center_method
        )
        poses = transform @ poses
        scale = self.config.scale_factor
        if self.config.auto_scale_poses:
            scale /= float(poses[:, :, 3].abs().max())
        poses[:, :, 3] *= scale

        train, held_out = get_train_eval_split_interval(images, self.config.eval_interval)
        indices = train if split == "train" else held_out
        width, height = torch.from_numpy(sizes[indices]).unbind(-1)
        fx, fy = torch.from_numpy(focals[indices].astype(np.float32)).unbind(-1)
        cameras = Cameras(
            camera_to_worlds=poses[torch.from_numpy(indices)],
            fx=fx,
            fy=fy,
            cx=width / 2,
            cy=height / 2,
            width=width,
            height=height,
            camera_type=CameraType.PERSPECTIVE,
            metadata={},  # ns-export cameras fails on None
        )
        half_side = self.config.scene_scale
        return DataparserOutputs(
            image_filenames=[images[i] for i in indices],
            cameras=cameras,
            scene_box=SceneBox(aabb=torch.tensor([[-half_side] * 3, [half_side] * 3], dtype=torch.float32)),
            dataparser_transform=transform,
            dataparser_scale=scale,
        )


def read_poses_bounds(path: Path) -> tuple[Tensor, NDArray[np.float64], NDArray[np.float64]]:
    """Read camera-to-world matrices [views, 4, 4] in OpenGL axes, image sizes [views, 2] and focal lengths [views]."""
    if not path.is_file():
        raise UserError(f"There is no {path}: give --data the folder of one LLFF scene, which holds poses_bounds.npy.")
    try:
        table = np.load(path, allow_pickle=False).astype(np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable array of numbers ({error}): copy or compute it anew.") from error
    if table.ndim != 2 or table.shape[1] != 17:
        raise UserError(f"{path} has shape {table.shape}, not LLFF's [images, 17]: copy or compute it anew.")
    if len(table) < 2:
        raise UserError(f"{path} holds {len(table)} poses: at least 2 are needed, one to train on and one to evaluate.")

    matrices = table[:, :15].reshape(-1, 3, 5)
    height, width, focal = matrices[:, :, 4].T
    if not np.isfinite(matrices).all() or min(height.min(), width.min(), focal.min()) <= 0:
        raise UserError(f"{path} holds values that are not finite, or a size or focal length <= 0: compute it anew.")
    down, right, back, place = np.moveaxis(matrices[:, :, :4], 2, 0)
    poses = np.tile(np.eye(4), (len(table), 1, 1))
    poses[:, :3] = np.stack([right, -down, back, place], axis=2)
    return torch.from_numpy(poses.astype(np.float32)), np.stack([width, height], axis=1), focal


def choose_images(data: Path, factor: int | None, num_poses: int) -> tuple[list[Path], NDArray[np.int64]]:
    """Choose the images of one folder and read their actual sizes [views, 2] (width, height)."""
    folders = dict(image_folders(data))
    if not folders:
        raise UserError(
            f"{data} has no images: it needs a folder images/ or images_N/ (such as images_4/) with {num_poses} "
            f"{', '.join(IMAGE_SUFFIXES)} files in it."
        )
    if factor is None:
        factor = largest_fitting_factor(folders)
    elif factor not in folders:
        raise UserError(missing_folder_message(data, factor, folders))

    images = folders[factor]
    if len(images) != num_poses:
        raise UserError(
            f"{data / 'poses_bounds.npy'} holds {num_poses} poses, but {images[0].parent} holds {len(images)} images; "
            "each image needs its pose, in the order of the file names. Remove the images that got no pose, or compute "
            "the poses anew."
        )
    return images, image_sizes(images)


def image_folders(data: Path) -> Iterator[tuple[int, list[Path]]]:
    """Yield (downscale factor, images in the order of their names) of each folder with images, largest images first."""
    matches = (re.fullmatch(r"images(?:_([2-9]|[1-9]\d+))?", path.name) for path in data.iterdir() if path.is_dir())
    for factor, name in sorted((int(match[1] or 1), match[0]) for match in matches if match):
        images = [path for path in (data / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        if images:
            yield factor, sorted(images, key=lambda path: path.name)


def image_sizes(images: list[Path]) -> NDArray[np.int64]:
    """Read (width, height) of each image from the files' headers."""
    sizes = []
    for path in images:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except OSError as error:
            raise UserError(f"{path} is not a readable image ({error}): replace it.") from error
    return np.array(sizes, dtype=np.int64)


def longest_side(images: list[Path]) -> int:
    """Return the longer side of the largest image, in pixels."""
    return int(image_sizes(images).max())


def largest_fitting_factor(folders: dict[int, list[Path]]) -> int:
    """Return the smallest factor whose images are at most MAX_AUTO_RESOLUTION on each side, and say so."""
    factor = next((f for f, images in folders.items() if longest_side(images) <= MAX_AUTO_RESOLUTION), max(folders))
    longest = longest_side(folders[factor])
    reason = "" if longest <= MAX_AUTO_RESOLUTION else f", the smallest there are, though over {MAX_AUTO_RESOLUTION} px"
    CONSOLE.print(f"Using the images in {folders[factor][0].parent.name}/ (longer side {longest} px{reason}).")
    return factor


def missing_folder_message(data: Path, factor: int, folders: dict[int, list[Path]]) -> str:
    """Say which image folders there are and how to use the nearest one."""
    present = []
    for images in folders.values():
        width, height = image_sizes(images[:1])[0]
        present.append(f"{images[0].parent.name}/ ({width}x{height})")
    wanted = "images" if factor == 1 else f"images_{factor}"
    larger = [other for other in folders if other < factor]
    nearest = max(larger) if larger else min(folders)
    fix = f"use `--downscale-factor {nearest}`"
    if larger:
        fix += (
            f", and for images of the size asked for also `--pipeline.datamanager.camera-res-scale-factor "
            f"{nearest / factor:.4g}` (before the data parser's name)"
        )
    return f"downscale_factor is {factor}, but {data} has no images in {wanted}/. It has {', '.join(present)}: {fix}."
