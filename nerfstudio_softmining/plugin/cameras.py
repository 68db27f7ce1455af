"""Checks of a scene's cameras before training: a single NaN would spread to all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin.dataset import MAX_LISTING_BYTES, listed_in

FILE_KEYS = ("file_path", "rgb_path", "image_name")
"""What names the image of a frame in the JSON lists of dataparsers."""
FOCAL_KEYS = {"fl_x", "fl_y", "camera_angle_x", "camera_angle_y"}
CAMERA_KEYS = FOCAL_KEYS | {
    *("transform_matrix", "camtoworld", "intrinsics", "w", "h", "cx", "cy", "distortion_params"),
    *("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2", "applied_transform", "applied_scale"),
}
"""What these lists say of a camera."""
MOST_NAMED = 5
"""Frames that a message names."""
MOST_ROUNDING = 0.05
"""Error of a camera's place by float32, relative to the size of the scene, from which places are made up."""


def check_cameras(outputs: DataparserOutputs, data: Path) -> None:
    """Check that training is possible with the cameras of a scene.

    Args:
        outputs: the scene.
        data: its folder or list, as --data names it.

    Raises:
        UserError: if a camera's numbers are not finite, or rounding has made up where the cameras are.
    """
    bad = _is_bad(outputs.cameras)
    if bad.any():
        raise UserError(describe_bad_frames(data) or _describe_bad_cameras(outputs, bad))
    distance, scale = float(outputs.dataparser_transform[:, 3].norm()), outputs.dataparser_scale
    if np.finfo(np.float32).eps * distance * scale > MOST_ROUNDING:
        raise UserError(
            f"the cameras of {data} are within {1 / scale:.2g} of their centre, which is {distance:.2g} from the "
            "origin: 32-bit numbers cannot tell their places apart. If all are at the same place, set "
            "`nerfstudio-data --auto-scale-poses False` after all other flags. Otherwise move the scene to the origin."
        )


def describe_bad_frames(data: Path) -> str | None:
    """Name the frames whose cameras are not finite in the JSON lists of a scene, or return None if there are none."""
    # at any depth, as formats have their lists in various folders; the one that most scenes have first
    lists = [data] if data.is_file() else sorted(data.rglob("*.json"), key=lambda file: file.name != "transforms.json")
    for file in lists:
        found = _bad_frames(file)
        if found:
            names = [f"{name} ({', '.join(keys)})" for name, keys in found.items()]
            return (
                f"{file} has cameras whose numbers are missing, zero or not finite: {_first(names)}. Correct them, or "
                "remove these frames from the list."
            )
    return None


def _bad_frames(file: Path) -> dict[str, list[str]]:
    """Return what is wrong in a JSON list, by the image; by "all frames" where one number stands for all."""
    try:
        small = file.stat().st_size <= MAX_LISTING_BYTES
        content = json.loads(file.read_text(encoding="utf-8")) if small else None
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("frames"), list):
        return {}
    found = {"all frames": _bad_keys(content)}
    for number, frame in enumerate(content["frames"]):
        if isinstance(frame, dict):
            name = next((str(frame[key]) for key in FILE_KEYS if key in frame), f"frame {number}")
            found[name] = _bad_keys(frame)
    return {name: keys for name, keys in found.items() if keys}


def _bad_keys(entries: dict[str, Any]) -> list[str]:
    """Return the keys whose numbers no camera can have."""
    return [
        key
        for key in entries
        if key in CAMERA_KEYS
        and any(not np.isfinite(value) or (key in FOCAL_KEYS and value == 0) for value in _numbers(entries[key]))
    ]


def _numbers(value: Any) -> Iterator[np.float32]:
    """Yield the numbers in nested lists as float32, which dataparsers convert them to; NaN for what is none."""
    if isinstance(value, list):
        for part in value:
            yield from _numbers(part)
        return
    try:
        with np.errstate(over="ignore"):
            yield np.float32(value)
    except (TypeError, ValueError):
        yield np.float32("nan")


def _is_bad(cameras: Cameras) -> Bool[Tensor, " cameras"]:
    """Return which cameras cannot make rays: a number is not finite, a focal length 0, or the rotation singular."""
    parts = [cameras.fx, cameras.fy, cameras.cx, cameras.cy, cameras.distortion_params, cameras.camera_to_worlds]
    finite = [part.flatten(1).isfinite().all(dim=-1) for part in parts if part is not None]
    axes = cameras.camera_to_worlds[:, :3, :3].double()
    is_flat = torch.linalg.det(axes).abs() <= 1e-6 * axes.flatten(1).norm(dim=-1) ** 3
    return ~torch.stack(finite).all(dim=0) | is_flat | (cameras.fx == 0)[:, 0] | (cameras.fy == 0)[:, 0]


def _describe_bad_cameras(outputs: DataparserOutputs, bad: Bool[Tensor, " cameras"]) -> str:
    """Name the images of bad cameras where no JSON list does."""
    files = [file for file, is_bad in zip(outputs.image_filenames, bad.tolist(), strict=True) if is_bad]
    return (
        f"the poses or intrinsics of {len(files)} of {len(bad)} cameras are not finite, or their focal length or "
        f"rotation is zero: {_first([str(file) for file in files])}, {listed_in(Path(files[0]))}. Correct them there. "
        "If that is all images, one of them may have spoilt the others."
    )


def _first(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
