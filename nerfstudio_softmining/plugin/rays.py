"""Rays of training pixels, from a table of each lens."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import rich
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from nerfstudio.cameras.camera_utils import radial_and_tangential_undistort
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.model_components.ray_generators import RayGenerator
from torch import Tensor

from nerfstudio_softmining.errors import UserError

RAY_OFFSETS = {"origins": "origin_offsets", "directions": "direction_offsets"}
"""Keys of a ray bundle's metadata: zeros of [rays, 3] that have the gradient of the origins and directions with respect
to the pixel coordinates. They are apart from the rays so that only what is meant to see this gradient does."""
SINGLE_CENTRE = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR, CameraType.FISHEYE624)
"""Types of camera whose rays all start at its position, in directions that turn with its rotation."""
RENDER_ONLY = (
    CameraType.OMNIDIRECTIONALSTEREO_L,
    CameraType.OMNIDIRECTIONALSTEREO_R,
    CameraType.VR180_L,
    CameraType.VR180_R,
)
"""Types of camera whose whole images nerfstudio renders, but of which it makes no rays of single pixels."""
SMALL_TABLE_BYTES = 1 << 25
"""Memory that the tables of all lenses may always take."""
IMAGE_FRACTION = 0.25
"""Part of the memory of the images, at 3 bytes a pixel, that they may take."""
ROW_BYTES = 16
"""Memory of one pixel in a table."""
SMALLEST_LENGTH = 1e-7
"""Least length that a direction is divided by, as in nerfstudio."""
CHUNK = 1 << 15
"""Pixels whose rays are made at a time, which fit a processor's caches."""


class LensTable(NamedTuple):
    """Rays of every pixel of every lens, in the frame of the camera."""

    lens: Int64[Tensor, " cameras"]
    """Lens of each camera."""
    start: Int64[Tensor, " lenses"]
    """Row of a lens's first pixel."""
    size: Int64[Tensor, "lenses 2"]
    """Height and width of the images of each lens."""
    rows: Float[Tensor, "pixels 4"]
    """Direction, of any length, and pixel area."""


class MiningRayGenerator(RayGenerator):
    """Makes rays as nerfstudio does, and much cheaper ones for the batches of soft mining.

    Undoing the distortion of a lens takes nerfstudio about a thousand small operations a step. `mined` and
    `differentiable` look its result up in a table instead, which is made at their first use. Cameras without a common
    centre, or with too many different lenses, are left to nerfstudio.
    """

    def __init__(self, cameras: Cameras) -> None:
        """Refuse cameras that nothing can be trained on."""
        super().__init__(cameras)
        for kind in RENDER_ONLY:
            if (cameras.camera_type == kind.value).any():
                raise UserError(
                    f"the scene has cameras of type {kind.name}, which nerfstudio renders but does not train on. "
                    "Convert these images to perspective or equirectangular ones."
                )

    @cached_property
    def table(self) -> LensTable | None:
        """The table of all lenses; None where there can be none."""
        return make_table(self.cameras)

    def mined(self, indices: Int64[Tensor, "n 3"]) -> RayBundle:
        """Return the rays through the centres of pixels (camera, row, column)."""
        if self.table is None:
            return self(indices)
        indices = indices.to(self.cameras.device)
        return self._bundle(indices)

    def differentiable(self, indices: Int64[Tensor, "n 3"]) -> tuple[RayBundle, Float[Tensor, "n 2"]]:
        """Return these rays, and the leaf tensor of the pixels' centres (row, column) that they have a gradient for.

        The rays themselves are constants. Their metadata has zeros that carry the gradient ([RAY_OFFSETS][]).
        """
        if self.table is None:
            return self.differentiate(indices)
        indices = indices.to(self.cameras.device)
        with torch.enable_grad():
            coords = (indices[:, 1:] + 0.5).requires_grad_()
            camera, pixels = indices[:, 0], indices[:, 1:]
            rays = self._bundle(indices)
            last = self.table.size[self.table.lens[camera]] - 1
            change = torch.zeros_like(rays.directions)
            for axis, unit in enumerate(torch.eye(2, dtype=torch.int64, device=pixels.device)):
                ahead, behind = (pixels + unit).minimum(last), (pixels - unit).clamp_min(0)
                difference = self._direction(camera, ahead) - self._direction(camera, behind)
                slope = difference / (ahead - behind).sum(dim=-1, keepdim=True).clamp_min(1)
                change = change + slope * (coords - coords.detach())[:, axis, None]
            rays.metadata[RAY_OFFSETS["directions"]] = change
        return rays, coords

    def differentiate(self, indices: Int64[Tensor, "n 3"]) -> tuple[RayBundle, Float[Tensor, "n 2"]]:
        """Return the same by differentiating nerfstudio's own ray generation."""
        indices = indices.to(self.cameras.device)
        with torch.enable_grad():
            coords = (indices[:, 1:] + 0.5).requires_grad_()
            rays = self.cameras.generate_rays(camera_indices=indices[:, :1], coords=coords)
        for name, key in RAY_OFFSETS.items():
            ray_part = getattr(rays, name)
            setattr(rays, name, ray_part.detach())
            if ray_part.requires_grad:
                rays.metadata[key] = ray_part - ray_part.detach()
        rays.pixel_area = rays.pixel_area.detach()
        return rays, coords

    def _look_up(self, camera: Tensor, pixels: Tensor) -> Float[Tensor, "n 4"]:
        assert self.table is not None
        lens = self.table.lens[camera]
        return self.table.rows[self.table.start[lens] + pixels[:, 0] * self.table.size[lens, 1] + pixels[:, 1]]

    def _turn(self, camera: Tensor, rows: Tensor) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 1"]]:
        """Turn directions into the world's frame; return them with unit length, and the length they had."""
        turned = (rows[:, None, :3] * self.cameras.camera_to_worlds[camera, :, :3]).sum(dim=-1)
        length = torch.linalg.vector_norm(turned, dim=-1, keepdim=True).clamp_min(SMALLEST_LENGTH)
        return turned / length, length

    def _direction(self, camera: Tensor, pixels: Tensor) -> Float[Tensor, "n 3"]:
        return self._turn(camera, self._look_up(camera, pixels))[0]

    def _bundle(self, indices: Tensor) -> RayBundle:
        camera, cameras = indices[:, 0], self.cameras
        rows = self._look_up(camera, indices[:, 1:])
        directions, length = self._turn(camera, rows)
        metadata = cameras.metadata and cameras._apply_fn_to_dict(cameras.metadata, lambda value: value[camera])
        return RayBundle(
            origins=cameras.camera_to_worlds[camera, :, 3],
            directions=directions,
            pixel_area=rows[:, 3:],
            camera_indices=indices[:, :1],
            times=None if cameras.times is None else cameras.times[camera],
            metadata={**(metadata or {}), "directions_norm": length},
        )


@torch.no_grad()
def make_table(cameras: Cameras) -> LensTable | None:
    """Make the table of all lenses; None where there can be none."""
    rotation = cameras.camera_to_worlds[:, :, :3]
    is_rotation = torch.allclose(rotation @ rotation.mT, torch.eye(3, device=rotation.device), atol=1e-4)
    has_centre = torch.isin(
        cameras.camera_type, torch.tensor([kind.value for kind in SINGLE_CENTRE]).to(rotation.device)
    )
    if not is_rotation or not has_centre.all():
        return None
    parts = [cameras.camera_type, cameras.fx, cameras.fy, cameras.cx, cameras.cy, cameras.height, cameras.width]
    if cameras.distortion_params is not None:
        parts.append(cameras.distortion_params)
    lenses, lens = torch.cat([part.double() for part in parts], dim=-1).unique(dim=0, return_inverse=True)
    size = lenses[:, 5:7].long()
    num_pixels = size.prod(dim=-1)
    table_bytes, image_bytes = ROW_BYTES * int(num_pixels.sum()), 3 * int(num_pixels[lens].sum())
    if table_bytes > max(SMALL_TABLE_BYTES, IMAGE_FRACTION * image_bytes):
        if cameras.distortion_params is not None and cameras.distortion_params.any():
            rich.print(
                f"[yellow]{len(lenses):,} distorted lenses: a table of their rays would take "
                f"{table_bytes / 1e9:.1f} GB, so distortion is undone in every step. "
                "Undistort the images to save that time.[/yellow]"
            )
        return None
    rows = []
    for index, (height, width) in enumerate(size.tolist()):
        camera = cameras[(lens == index).nonzero()[:1, 0]]
        camera.camera_to_worlds = torch.eye(4, device=rotation.device)[None, :3]
        make_rows = _perspective if int(camera.camera_type) == CameraType.PERSPECTIVE.value else _by_nerfstudio
        column = torch.arange(width + 1, device=rotation.device) + 0.5
        for row in (torch.arange(height, device=rotation.device) + 0.5).split(max(1, CHUNK // width)):
            row = torch.cat((row, row[-1:] + 1))
            coords = torch.cartesian_prod(row, column).view(len(row), -1, 2)
            rows.append(make_rows(camera, coords).flatten(0, 1).float())
    return LensTable(lens, num_pixels.cumsum(0) - num_pixels, size, torch.cat(rows))


def _by_nerfstudio(camera: Cameras, coords: Float[Tensor, "h+1 w+1 2"]) -> Float[Tensor, "h w 4"]:
    """Make the rows of pixels by nerfstudio's own ray generation."""
    coords = coords[:-1, :-1]
    rays = camera.generate_rays(camera_indices=torch.zeros_like(coords[..., :1], dtype=torch.int64), coords=coords)
    return torch.cat((rays.directions, rays.pixel_area), dim=-1)


def _perspective(camera: Cameras, coords: Float[Tensor, "h+1 w+1 2"]) -> Float[Tensor, "h w 4"]:
    """Make the rows of pixels from directions before these get unit length, so that no bit of a ray differs.

    The next row and column give the areas. nerfstudio would undo the distortion three times for each pixel.
    """
    x, y = (coords[..., 1] - camera.cx[0]) / camera.fx[0], (coords[..., 0] - camera.cy[0]) / camera.fy[0]
    if camera.distortion_params is not None and camera.distortion_params.any():
        x, y = radial_and_tangential_undistort(torch.stack((x, y), dim=-1), camera.distortion_params[0]).unbind(-1)
    directions = torch.stack((x, -y, -torch.ones_like(x)), dim=-1)
    unit = F.normalize(directions, dim=-1)
    here = unit[:-1, :-1]
    area = (unit[:-1, 1:] - here).norm(dim=-1) * (unit[1:, :-1] - here).norm(dim=-1)
    return torch.cat((directions[:-1, :-1], area[..., None]), dim=-1)
