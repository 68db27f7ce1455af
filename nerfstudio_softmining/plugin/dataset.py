"""The images of a scene: errors that name the file, and a cache of bytes on the device or the host."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.datasets.depth_dataset import DepthDataset
from nerfstudio.data.datasets.sdf_dataset import SDFDataset
from nerfstudio.data.utils.dataloaders import CacheDataloader
from nerfstudio.data.utils.nerfstudio_collate import nerfstudio_collate
from nerfstudio.utils.misc import get_dict_to_torch
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.markup import escape
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.samplers.images import views

UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, AssertionError, EOFError, cv2.error)
"""What nerfstudio raises for a damaged or missing image, mask or depth map."""
LISTINGS = ("*.json", "images.txt", "images.bin", "sparse/0/images.*", "colmap/sparse/0/images.*")
"""Files, beside or above the images, in which dataparsers find the names of images."""
PRIORS = {"depth": "depth map", "normal": "normal map"}
"""Monocular maps that surfaces are trained with, and what messages call them."""
MAX_LISTING_BYTES = 1 << 28
"""Larger files are not searched for a name."""
SIZE_TOLERANCE = 0.02
"""Difference of an image's size from its camera's that may come from rounding."""
COLOUR_MODES = ("L", "RGB", "RGBA")
"""Kinds of pixels, as PIL names them, that nerfstudio reads as they are meant."""
MISREAD = {
    "P": "a palette, whose indices nerfstudio takes for brightness",
    "PA": "a palette with alpha, whose indices nerfstudio takes for brightness",
    "1": "one bit a pixel, whose white nerfstudio takes for almost black",
    "LA": "grey with alpha, which nerfstudio cannot read",
    "CMYK": "four inks, which nerfstudio takes for RGBA",
    "I;16": "16 bit of grey, of which nerfstudio drops the upper 8",
    "I": "more than 8 bit of grey, of which nerfstudio keeps the lower 8",
}
"""What nerfstudio makes of other kinds."""


warned_depths: dict[Path, object] = {}
"""Folders of depth maps whose NaNs have been warned of."""


class NamesBrokenFiles(InputDataset):
    """Put before a data set class: raises errors that name the broken file and the file that lists it."""

    def __init__(self, dataparser_outputs: DataparserOutputs, scale_factor: float = 1.0) -> None:
        files = dataparser_outputs.image_filenames
        if isinstance(self, DepthDataset) and files and dataparser_outputs.metadata.get("depth_filenames") is None:
            # nerfstudio would download a network that guesses depths, for a loss that compares neighbouring rays
            raise UserError(
                f"the scene of {files[0]} has no depth maps (depth_file_path in transforms.json), which depth "
                "supervision needs. Add them, or train softmining-nerfacto."
            )
        super().__init__(dataparser_outputs, scale_factor)
        self.pixel_keys = list(dict.fromkeys(("image", "mask", *self.exclude_batch_keys_from_device)))
        """Keys of what an item has for each pixel."""
        # nerfstudio's datamanager removes entries, and would do so for all data sets of the process
        self.exclude_batch_keys_from_device = list(self.pixel_keys)

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """Load an image and its mask and depth map, where the scene has them.

        Depths that are NaN or infinite become 0, which is nerfstudio's "no depth".

        Raises:
            UserError: if a file is missing, cannot be read, or would be read as something else than it shows.
        """
        files = self._files(image_idx)
        try:
            _check_kinds(files)
            data = super().get_data(image_idx, image_type)
        except UserError:
            raise
        except UNREADABLE as error:
            raise UserError(describe_broken(files, error)) from error
        data = self._cropped(image_idx, data)
        if isinstance(self, DepthDataset):
            data["depth_image"] = self._without_spoilt_depths(data["depth_image"], data["image"], files["depth map"])
        elif any(key in data and not data[key].isfinite().all() for key in PRIORS):
            names = " or ".join(f"the {kind} {file}" for kind, file in files.items() if kind in PRIORS.values())
            raise UserError(f"{names} has pixels that are NaN or infinite. Repair it, or train without these maps.")
        return data

    def _cropped(self, image_idx: int, data: dict[str, Any]) -> dict[str, Any]:
        """Return an item without the last rows and columns that its camera has not, where its size was rounded up."""
        size = data["image"].shape[:2]
        camera = int(self.cameras.height[image_idx]), int(self.cameras.width[image_idx])
        if size == camera:
            return data
        if any(
            not 0 <= ours - theirs <= max(1, SIZE_TOLERANCE * ours) for ours, theirs in zip(size, camera, strict=True)
        ):
            file = self._files(image_idx)["image"]
            raise UserError(
                f"the image {file}, {listed_in(file)}, has {size[0]} x {size[1]} pixels (height x width), and its "
                f"camera {camera[0]} x {camera[1]}. Correct the camera's size, focal lengths and centre there, or the "
                "dataparser's downscale factor, such as `colmap --downscale-rounding-mode`."
            )
        return {
            key: value[: camera[0], : camera[1]] if isinstance(value, Tensor) and value.shape[:2] == size else value
            for key, value in data.items()
        }

    def _without_spoilt_depths(self, depth: Tensor, image: Tensor, file: Path) -> Tensor:
        """Return a depth map with 0 in place of NaN and infinities, and say so at the first one that has some."""
        if depth.shape != (*image.shape[:2], 1):
            raise UserError(
                f"the depth map {file}, {listed_in(file)}, is used in the size {tuple(depth.shape)}, as the camera "
                f"has it, and its image is {tuple(image.shape[:2])}. Correct the camera's w and h, or the map's shape."
            )
        finite = depth.isfinite()
        if finite.all():
            return depth
        token = object()
        if warned_depths.setdefault(file.parent, token) is token:  # atomic, as images are loaded in parallel
            CONSOLE.print(
                f"[yellow]The depth map {escape(str(file))} has {int((~finite).sum())} pixels that are NaN or "
                "infinite. In all maps, such pixels are trained without depth, as those of depth 0 are.[/yellow]"
            )
        return depth.where(finite, 0.0)

    @classmethod
    def mixed_into(cls, kind: type[InputDataset]) -> type[InputDataset]:
        """Return a class of data sets whose errors name broken files, too."""
        return kind if issubclass(kind, cls) else type(kind.__name__, (cls, kind), {})

    def _files(self, image_idx: int) -> dict[str, Path]:
        """Return the files of an image by what they are."""
        outputs = self._dataparser_outputs
        lists = {
            "image": outputs.image_filenames,
            "mask": outputs.mask_filenames,
            "depth map": outputs.metadata.get("depth_filenames"),
            "normal map": outputs.metadata.get("normal_filenames"),
        }
        return {kind: Path(files[image_idx]) for kind, files in lists.items() if files}


class SurfaceDataset(SDFDataset):
    """nerfstudio's data set of images with depth and normals, of scenes without these, too.

    Args:
        dataparser_outputs: the scene, of any dataparser.
        scale_factor: factor on the size of its images.
    """

    def __init__(self, dataparser_outputs: DataparserOutputs, scale_factor: float = 1.0) -> None:
        priors = ("depth_filenames", "normal_filenames", "camera_to_worlds", "transform", "include_mono_prior")
        metadata = dict.fromkeys(priors) | dataparser_outputs.metadata
        super().__init__(dataclasses.replace(dataparser_outputs, metadata=metadata), scale_factor)


class ByteImages(Dataset):
    """A view of a data set whose images are bytes, with their alpha channel if they have one.

    Args:
        dataset: any nerfstudio data set.
    """

    def __init__(self, dataset: InputDataset) -> None:
        self._dataset = copy.copy(dataset)
        self.cameras = dataset.cameras
        # blending with the background is left to the pixels that are drawn, in float32 as nerfstudio does it
        self._dataset._dataparser_outputs = dataclasses.replace(dataset._dataparser_outputs, alpha_color=None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset.get_data(index, image_type="uint8")


class ImageCache(CacheDataloader):
    """nerfstudio's cache, which loads images without a second copy of them.

    Images are decoded in parallel, and each goes straight to its place on the device. Images of different sizes are
    views of one tensor [pixels, channels]. Where some are RGBA, all are. `collate_fn` has no effect.
    """

    def _sizes(self, indices: list[int]) -> list[tuple[int, int]]:
        """Return the height and width of each image that the cameras tell; none without cameras."""
        cameras = getattr(self.dataset, "cameras", None)
        if cameras is None:
            return []
        return list(
            zip(cameras.height[indices].flatten().tolist(), cameras.width[indices].flatten().tolist(), strict=True)
        )

    def _places(self, indices: list[int], devices: Mapping[str, Any]) -> dict[str, Tensor | list[Tensor]]:
        """Allocate memory for all images, as one tensor a key, and return the place in it of each image."""
        first, sizes = cast(Any, self.dataset)[indices[0]], self._sizes(indices)
        tensors = {key: value for key, value in first.items() if isinstance(value, Tensor)}
        if len(set(sizes)) < 2:
            return {
                key: torch.empty(len(indices), *value.shape, dtype=value.dtype, device=devices[key])
                for key, value in tensors.items()
            }
        total, size = sum(height * width for height, width in sizes), first["image"].shape[:2]
        return {
            key: views(torch.empty(total, *value.shape[2:], dtype=value.dtype, device=devices[key]), sizes)
            for key, value in tensors.items()
            if value.shape[:2] == size
        }

    def _get_collated_batch(self) -> dict[str, Any]:
        assert isinstance(self.dataset, Sized)
        indices = random.sample(range(len(self.dataset)), k=self.num_images_to_sample_from)
        on_host = self.exclude_batch_keys_from_device or []
        devices = defaultdict(lambda: self.device, dict.fromkeys(on_host, "cpu"))
        joined = self._places(indices, devices)
        apart: dict[str, list[Tensor]] = {}

        def load(place: int) -> dict[str, Any]:
            """Put what fits of an image in its place, and return the rest."""
            item = self.dataset[indices[place]]
            for key in joined.keys() & item.keys():
                if item[key].shape == joined[key][place].shape:
                    joined[key][place].copy_(item.pop(key))
            return item

        with ThreadPoolExecutor(os.cpu_count()) as executor:
            places = executor.map(load, range(len(indices)))
            rest = list(track(places, "Loading images", total=len(indices), transient=True))
        for key in {key: None for item in rest for key, value in item.items() if isinstance(value, Tensor)}:
            values = joined.pop(key, None)
            apart[key] = [
                item.pop(key).to(devices[key]) if key in item else values[place].clone()  # pyright: ignore[reportOptionalSubscript]
                for place, item in enumerate(rest)
            ]
        if len({image.shape[-1] for image in apart.get("image", ())} & {3, 4}) == 2:
            apart["image"] = [_with_alpha(image) for image in apart["image"]]
        return joined | apart | get_dict_to_torch(nerfstudio_collate(rest), device=self.device, exclude=on_host)


def bytes_per_pixel(item: Mapping[str, Any]) -> int:
    """Return the memory in bytes that an item of a data set takes for each pixel of its image."""
    image = item["image"]
    parts = (part for part in item.values() if isinstance(part, Tensor) and part.shape[:2] == image.shape[:2])
    return sum(part[0, 0].numel() * part.element_size() for part in parts)


def _with_alpha(image: Tensor) -> Tensor:
    """Return an image as RGBA; opaque if it is RGB, which shows the same on any background."""
    opaque = 255 if image.dtype == torch.uint8 else 1
    return torch.nn.functional.pad(image, (0, 4 - image.shape[-1]), value=opaque)


def describe_broken(files: dict[str, Path], error: Exception) -> str:
    """Say which file of an image is broken, which file lists it, and what to do.

    Args:
        files: the files of one image by what they are, such as "mask".
        error: what reading them raised.
    """
    for kind, file in files.items():
        if not file.is_file():
            return f"the {kind} {file}, {listed_in(file)}, does not exist. Restore it, or remove it from the list."
        try:
            _read(file)
        except UNREADABLE as reason:
            return f"the {kind} {file}, {listed_in(file)}, cannot be read ({reason}). Replace it, or remove it there."
    names = " and ".join(f"the {kind} {file}" for kind, file in files.items())
    return f"{names}, {listed_in(files['image'])}, cannot be used ({error}). Convert or replace what does not fit."


def _check_kinds(files: dict[str, Path]) -> None:
    """Check the kinds of pixels of an image and its mask, which nerfstudio may read as something else, silently.

    Raises:
        UserError: if nerfstudio would misread one.
    """
    with Image.open(files["image"]) as image:
        mode = image.mode
    if mode not in COLOUR_MODES:
        meaning = MISREAD.get(mode, f"pixels of the kind {mode}, which nerfstudio may misread")
        raise UserError(
            f"the image {files['image']}, {listed_in(files['image'])}, has {meaning}. Convert it to grey, RGB or RGBA "
            "of 8 bit."
        )
    if "mask" in files:
        with Image.open(files["mask"]) as mask:
            if mask.mode == "P" and ((np.array(mask) > 0) != (np.array(mask.convert("L")) > 0)).any():
                raise UserError(
                    f"the mask {files['mask']}, {listed_in(files['mask'])}, has a palette in which index 0 is not "
                    "the only black, and nerfstudio takes the indices for brightness. Convert it to grey of 8 bit."
                )


def _read(file: Path) -> None:
    """Decode a file, and raise if that fails."""
    if file.suffix == ".npy":
        np.load(file, allow_pickle=False)
        return
    with Image.open(file) as image:
        image.load()


def listed_in(file: Path) -> str:
    """Say which file lists an image."""
    # the folder may be that of smaller copies, and the list may leave out the suffix
    for name in (f"{file.parent.name}/{file.stem}", file.stem):
        pattern = re.compile(rb"(?<![^/\"\s\0])" + re.escape(name.encode()) + rb"[\".]")
        for listing in listings(file):
            if pattern.search(listing.read_bytes()):
                return f"listed in {listing}"
    return f"found in the folder {file.parent}"


def listings(file: Path) -> Iterator[Path]:
    """Yield the files beside or above an image that may list it."""
    for folder in list(file.parents)[:3]:
        for pattern in LISTINGS:
            for listing in sorted(folder.glob(pattern)):
                if listing.is_file() and listing.stat().st_size <= MAX_LISTING_BYTES:
                    yield listing
