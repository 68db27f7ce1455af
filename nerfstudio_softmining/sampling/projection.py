"""Where points appear in images: the inverse of nerfstudio's ray generation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from nerfstudio.cameras.camera_utils import _compute_residual_and_jacobian
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

SUPPORTED = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR, CameraType.ORTHOPHOTO)
"""Types of cameras that points can be projected to."""
STATIONS = 16
"""Radii at which a lens is looked at between the centre of the image and a point."""


def supported(cameras: Cameras) -> bool:
    """Whether [project][] knows the types of all cameras; waits for the device."""
    return set(cameras.camera_type.unique().tolist()) <= {each.value for each in SUPPORTED}


def project(
    cameras: Cameras, camera: Int64[Tensor, " n"], points: Float[Tensor, "n 3"]
) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Where points appear in images, whether or not something hides them.

    The inverse of nerfstudio's `Cameras.generate_rays`, without waiting for the device.

    Args:
        cameras: a row of cameras of the [supported][] types, which may differ, on the points' device.
        camera: the camera that is to see each point.
        points: in world coordinates.

    Returns:
        Row and column in pixels as `generate_rays` takes them, centres at + 0.5, (0, 0) where the point is not seen;
        and whether it is: in front of the camera and within its frame.
    """
    pose, kind = cameras.camera_to_worlds[camera], cameras.camera_type[camera]
    perspective, fisheye, equirectangular, _ = (kind == each.value for each in SUPPORTED)
    local = ((points - pose[..., 3])[..., None] * pose[..., :3]).sum(dim=-2)
    right, up, back = local.split(1, dim=-1)
    down, ahead = -up, -back
    aside = torch.hypot(right, down)
    seen = (ahead > 0) | fisheye & (aside > 0) | equirectangular & (local != 0).any(dim=-1, keepdim=True)

    angle = torch.atan2(aside, ahead)
    scale = torch.where(fisheye, angle / aside.clamp_min(torch.finfo(aside.dtype).tiny), 1.0)
    flat = torch.cat((down, right), dim=-1) * torch.where(perspective, 1 / ahead, scale)
    if cameras.distortion_params is not None:
        distorted, unfolded = _distort(flat, cameras.distortion_params[camera])
        has_lens = perspective | fisheye
        flat = torch.where(has_lens, distorted, flat)
        seen = seen & (unfolded | ~has_lens)
    latitude, longitude = torch.atan2(down, torch.hypot(right, ahead)), torch.atan2(right, ahead)
    longitude = torch.where(longitude < math.pi, longitude, -math.pi)  # the seam is the left edge, not the right
    flat = torch.where(equirectangular, torch.cat((latitude, longitude), dim=-1) / math.pi, flat)

    focal, centre, size = (
        torch.cat((rows[camera], columns[camera]), dim=-1)
        for rows, columns in ((cameras.fy, cameras.fx), (cameras.cy, cameras.cx), (cameras.height, cameras.width))
    )
    position = flat * focal + centre
    seen = (seen & (position >= 0) & (position < size)).all(dim=-1)  # NaN is in no frame
    return torch.where(seen[:, None], position, 0.0), seen


def _distort(
    flat: Float[Tensor, "n 2"], params: Float[Tensor, "n 6"]
) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, "n 1"]]:
    """What a lens makes of rows and columns in focal lengths; and whether it is one to one up to there.

    The polynomial folds at some radius: what lies beyond comes back into the frame, and may even be in order again, so
    that its slope at the point alone does not tell. Hence its Jacobian is to keep its sign all the way from the centre;
    a fold that fits between two stations is too shallow to move anything far.
    """
    y, x = (flat[..., None] * (torch.arange(1, STATIONS + 1, device=flat.device) / STATIONS)).unbind(dim=-2)
    zero = torch.zeros_like(x)  # what remains of the distorted position when nothing is taken off
    x, y, x_x, x_y, y_x, y_y = _compute_residual_and_jacobian(x, y, zero, zero, params[:, None])
    unfolded = (x_x * y_y - x_y * y_x > 0).all(dim=-1, keepdim=True)
    return torch.stack((y[:, -1], x[:, -1]), dim=-1), unfolded
