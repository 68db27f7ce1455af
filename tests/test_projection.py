"""Laws of projecting: what a pixel's ray meets appears at that pixel, and nothing else appears anywhere."""

from __future__ import annotations

import math

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from nerfstudio_softmining.sampling.projection import SUPPORTED, project, supported

PERSPECTIVE, FISHEYE, EQUIRECTANGULAR, ORTHOPHOTO = SUPPORTED
LENSES = {
    "none": None,
    "zero": torch.zeros(3, 6),
    "barrel": torch.tensor([[-0.28, 0.07, 0.0, 0.0, 1e-3, -7e-4], [-0.2, 0.05, -6e-3, 0.0, -2e-3, 1e-3], [0.0] * 6]),
    "pincushion": torch.tensor([[0.1, 0.03, 2e-3, 1e-3, 2e-3, 1e-3]]).repeat(3, 1),
}
TYPES = {kind.name.lower(): [kind] * 3 for kind in SUPPORTED} | {
    "mixed": [FISHEYE, PERSPECTIVE, EQUIRECTANGULAR],
    "aerial": [ORTHOPHOTO, FISHEYE, PERSPECTIVE],
}
N = 3000


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_cameras(kinds: list[CameraType], lens: Tensor | None = None) -> Cameras:
    """Cameras of different sizes, places and orientations."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(3, 3, 3, generator=generator))[0]
    rotation = rotation * torch.linalg.det(rotation)[:, None, None]
    width, height = torch.tensor([64, 200, 120]), torch.tensor([48, 90, 160])
    spherical = torch.tensor([kind is EQUIRECTANGULAR for kind in kinds])
    return Cameras(
        camera_to_worlds=torch.cat((rotation, torch.randn(3, 3, 1, generator=generator)), dim=-1),
        fx=torch.where(spherical, width / 2, torch.tensor([50.0, 140.0, 110.0])),
        fy=torch.where(spherical, height, torch.tensor([54.0, 120.0, 100.0])),
        cx=torch.where(spherical, width / 2, torch.tensor([30.0, 104.0, 61.0])),
        cy=torch.where(spherical, height / 2, torch.tensor([25.0, 41.0, 83.0])),
        width=width,
        height=height,
        distortion_params=lens,
        camera_type=kinds,
    )


def one_camera(kind: CameraType, lens: list[float] | None = None) -> Cameras:
    """A camera at the origin that looks along -z, 100 x 100 pixels, half of them a focal length."""
    params = None if lens is None else torch.tensor([lens])
    return Cameras(torch.eye(4)[None, :3], 50.0, 50.0, 50.0, 50.0, 100, 100, params, kind)


def see(cameras: Cameras, *points: list[float]) -> tuple[list[list[float]], list[bool]]:
    position, seen = project(cameras, torch.zeros(len(points), dtype=torch.int64), torch.tensor(points))
    return position.tolist(), seen.tolist()


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("kinds", TYPES)
def test_what_a_pixels_ray_meets_appears_at_that_pixel(kinds: str, lens: str) -> None:
    cameras = make_cameras(TYPES[kinds], LENSES[lens])
    camera = torch.randint(3, (N,))
    size = torch.cat((cameras.height, cameras.width), dim=-1)[camera]
    coords = torch.rand(N, 2) * (size - 0.1) + 0.05
    rays = cameras.generate_rays(camera_indices=camera[:, None], coords=coords)
    points = rays.origins + rays.directions * (0.1 + 20 * torch.rand(N, 1))
    position, seen = project(cameras, camera, points)
    assert seen.all()
    torch.testing.assert_close(position, coords, atol=1e-2, rtol=0)


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("kinds", TYPES)
def test_whatever_appears_at_a_pixel_is_on_its_ray(kinds: str, lens: str) -> None:
    cameras = make_cameras(TYPES[kinds], LENSES[lens])
    camera, points = torch.randint(3, (20 * N,)), 3 * torch.randn(20 * N, 3)
    position, seen = project(cameras, camera, points)
    assert (position[~seen] == 0).all()
    camera, points, position = camera[seen], points[seen], position[seen]
    assert len(points) > N / 10
    size = torch.cat((cameras.height, cameras.width), dim=-1)[camera]
    assert ((position >= 0) & (position < size)).all()
    rays = cameras.generate_rays(camera_indices=camera[:, None], coords=position)
    along = ((points - rays.origins) * rays.directions).sum(dim=-1, keepdim=True)
    assert (along > 0).all()
    torch.testing.assert_close(rays.origins + along * rays.directions, points, atol=2e-3, rtol=0)


@pytest.mark.parametrize("lens", [None, [0.0] * 6])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_camera_itself_and_what_is_no_place_are_not_seen(kind: CameraType, lens: list[float] | None) -> None:
    position, seen = see(one_camera(kind, lens), [0.0, 0.0, 0.0], [math.nan, 0.0, -1.0], [0.0, math.inf, -1.0])
    assert not any(seen)
    assert position == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("kind", SUPPORTED)
def test_straight_ahead_is_the_centre_and_straight_behind_is_not(kind: CameraType) -> None:
    position, seen = see(one_camera(kind, [-0.1, 0.0, 0.0, 0.0, 1e-3, 1e-3]), [0.0, 0.0, -2.0], [0.0, 0.0, 2.0])
    assert seen == [True, kind is EQUIRECTANGULAR]
    assert position == [[50.0, 50.0], [50.0, 0.0] if kind is EQUIRECTANGULAR else [0.0, 0.0]]


@pytest.mark.parametrize("kind", [PERSPECTIVE, ORTHOPHOTO])
@pytest.mark.parametrize(("x", "y"), [(0.99, 0.0), (-0.99, 0.0), (0.0, 0.99), (0.0, -0.99)])
def test_the_frame_ends_at_its_edges(kind: CameraType, x: float, y: float) -> None:
    inside, outside, behind = [x, y, -1.0], [x * 1.02, y * 1.02, -1.0], [x, y, 1.0]
    assert see(one_camera(kind), inside, outside, behind)[1] == [True, False, False]


def test_a_fisheye_sees_what_is_beside_and_behind_it() -> None:
    wide = one_camera(FISHEYE)
    wide.fx, wide.fy = wide.fx / 4, wide.fy / 4
    position, seen = see(wide, [1.0, 0.0, 0.0], [0.0, 1.0, 1.0])
    assert seen == [True, True]
    quarter = 12.5 * math.pi / 4
    torch.testing.assert_close(torch.tensor(position), 50 + quarter * torch.tensor([[0.0, 2.0], [-3.0, 0.0]]))


# Distance from the axis, in distances ahead, of what a polynomial alone would put into the frame.
FOLDS = {
    "falling": ([-0.3, 0.0, 0.0, 0.0, 0.0, 0.0], 1.7),
    "rising again": ([-0.4, 0.05, 0.0, 0.0, 0.0, 0.0], 2.2),
    "beyond the centre": ([-0.3, 0.0, 0.0, 0.0, 0.0, 0.0], 2.0),
    "tangential": ([0.0, 0.0, 0.0, 0.0, 0.0, 3e-3], -111.0),
}


@pytest.mark.parametrize("fold", FOLDS)
def test_what_a_lens_folds_back_into_the_frame_is_not_seen(fold: str) -> None:
    (k1, k2, k3, k4, p1, p2), x = FOLDS[fold]
    r = x * x
    distorted = x * (1 + r * (k1 + r * (k2 + r * (k3 + r * k4)))) + 3 * p2 * r
    assert abs(distorted) < 1, "it is in the frame"
    assert see(one_camera(PERSPECTIVE, [k1, k2, k3, k4, p1, p2]), [x, 0.0, -1.0], [0.1, 0.0, -1.0])[1] == [False, True]


def test_nothing_waits_for_the_device() -> None:
    """A tensor without values cannot be looked at from the host."""
    cameras = make_cameras(TYPES["mixed"], LENSES["barrel"]).to("meta")
    camera, points = torch.zeros(5, dtype=torch.int64, device="meta"), torch.zeros(5, 3, device="meta")
    position, seen = project(cameras, camera, points)
    assert position.shape == (5, 2) and seen.shape == (5,) and seen.dtype == torch.bool
    assert position.is_meta and seen.is_meta


@pytest.mark.parametrize("kind", CameraType)
def test_supported_names_every_type(kind: CameraType) -> None:
    assert supported(make_cameras([PERSPECTIVE, kind, FISHEYE])) == (kind in SUPPORTED)
