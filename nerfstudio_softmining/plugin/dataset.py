"""The images of a scene: errors that name the file, and a cache of bytes on the device or the host."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.datasets.sdf_dataset import SDFDataset
from nerfstudio.data.utils.dataloaders import CacheDataloader
from nerfstudio.data.utils.nerfstudio_collate import nerfstudio_collate
from nerfstudio.utils.misc import get_dict_to_torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from nerfstudio_softmining.errors import UserError

UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, AssertionError, EOFError, cv2.error)
"""What nerfstudio raises for a damaged or missing image, mask or depth map."""
LISTINGS = ("*.json", "images.txt", "images.bin", "sparse/0/images.*", "colmap/sparse/0/images.*")
"""Files, beside or above the images, in which dataparsers find the names of images."""
MAX_LISTING_BYTES = 1 << 28
"""Larger files are not searched for a name."""


class NamesBrokenFiles(InputDataset):
    """Put before a data set class: raises errors that name the broken file and the file that lists it."""

    def __init__(self, dataparser_outputs: DataparserOutputs, scale_factor: float = 1.0) -> None:
        super().__init__(dataparser_outputs, scale_factor)
        # nerfstudio's datamanager removes entries, and would do so for all data sets of the process
        self.exclude_batch_keys_from_device = list(self.exclude_batch_keys_from_device)

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """Load an image and its mask and depth map, where the scene has them.

        Raises:
            UserError: if a file is missing or cannot be read.
        """
        try:
            return super().get_data(image_idx, image_type)
        except UNREADABLE as error:
            raise UserError(describe_broken(self._files(image_idx), error)) from error

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
    """nerfstudio's cache, which needs no more memory than the images it keeps.

    Images are decoded in parallel, and each goes straight to its place on the device. Images of different sizes stay
    apart, on the device as well. `collate_fn` has no effect.
    """

    def _is_one_size(self) -> bool:
        """Return whether all images are of one size, as far as the cameras tell."""
        cameras = getattr(self.dataset, "cameras", None)
        return cameras is None or all(len(size.unique()) == 1 for size in (cameras.height, cameras.width))

    def _get_collated_batch(self) -> dict[str, Any]:
        assert isinstance(self.dataset, Sized)
        indices = random.sample(range(len(self.dataset)), k=self.num_images_to_sample_from)
        on_host = self.exclude_batch_keys_from_device or []
        devices = defaultdict(lambda: self.device, dict.fromkeys(on_host, "cpu"))
        joined: dict[str, Tensor] = {}
        apart: dict[str, list[Tensor]] = {}
        if self._is_one_size():
            first = self.dataset[indices[0]]
            joined = {
                key: torch.empty(len(indices), *value.shape, dtype=value.dtype, device=devices[key])
                for key, value in first.items()
                if isinstance(value, Tensor)
            }

        def load(place: int) -> dict[str, Any]:
            """Put what fits of an image in its place, and return the rest."""
            item = self.dataset[indices[place]]
            for key in joined.keys() & item.keys():
                if item[key].shape == joined[key].shape[1:]:
                    joined[key][place] = item.pop(key)
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
        return joined | apart | get_dict_to_torch(nerfstudio_collate(rest), device=self.device, exclude=on_host)


def describe_broken(files: dict[str, Path], error: Exception) -> str:
    """Say which file of an image is broken, which file lists it, and what to do.

    Args:
        files: the files of one image by what they are, such as "mask".
        error: what reading them raised.
    """
    for kind, file in files.items():
        if not file.is_file():
            return f"the {kind} {file}, {_listed_in(file)}, does not exist. Restore it, or remove it from the list."
        try:
            _read(file)
        except UNREADABLE as reason:
            return f"the {kind} {file}, {_listed_in(file)}, cannot be read ({reason}). Replace it, or remove it there."
    names = " and ".join(f"the {kind} {file}" for kind, file in files.items())
    return f"{names}, {_listed_in(files['image'])}, cannot be used ({error}). Convert or replace what does not fit."


def _read(file: Path) -> None:
    """Decode a file, and raise if that fails."""
    if file.suffix == ".npy":
        np.load(file, allow_pickle=False)
        return
    with Image.open(file) as image:
        image.load()


def _listed_in(file: Path) -> str:
    """Say which file lists an image."""
    # the folder may be that of smaller copies, and the list may leave out the suffix
    for name in (f"{file.parent.name}/{file.stem}", file.stem):
        pattern = re.compile(rb"(?<![^/\"\s\0])" + re.escape(name.encode()) + rb"[\".]")
        for listing in _listings(file):
            if pattern.search(listing.read_bytes()):
                return f"listed in {listing}"
    return f"found in the folder {file.parent}"


def _listings(file: Path) -> Iterator[Path]:
    for folder in list(file.parents)[:3]:
        for pattern in LISTINGS:
            for listing in sorted(folder.glob(pattern)):
                if listing.is_file() and listing.stat().st_size <= MAX_LISTING_BYTES:
                    yield listing
