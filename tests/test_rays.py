"""Rays from a table are nerfstudio's own, to float precision, and so is their gradient."""

from __future__ import annotations

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import rays as rays_module
from nerfstudio_softmining.plugin.rays import RAY_OFFSETS, MiningRayGenerator

DISTORTION = torch.tensor([0.05, -0.02, 0.001, 0.0, 0.003, -0.002])
CASES = {
    "perspective": {},
    "distorted": {"distortion_params": DISTORTION},
    "fisheye": {"camera_type": CameraType.FISHEYE, "distortion_params": 0.1 * DISTORTION},
    "panorama": {"camera_type": CameraType.EQUIRECTANGULAR, "fx": 32.0, "fy": 32.0, "cx": 32.0, "cy": 16.0},
    "several lenses": {"fx": [40.0, 50.0, 40.0, 60.0], "distortion_params": DISTORTION},
    "several sizes": {"width": [64, 30, 64, 30], "height": [32, 44, 32, 44], "distortion_params": DISTORTION},
    "times": {"times": [0.0, 0.25, 0.5, 1.0], "metadata": {"exposure": torch.arange(4.0)[:, None]}},
    "orthophoto": {"camera_type": CameraType.ORTHOPHOTO},
}
EACH_CASE = pytest.mark.parametrize("name", CASES)
COUNT = 4


def make_cameras(name: str) -> Cameras:
    """Four cameras in general position."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(COUNT, 3, 3)).Q
    settings = dict(camera_type=CameraType.PERSPECTIVE, fx=40.0, fy=44.0, cx=31.0, cy=17.0, width=64, height=32)
    settings |= CASES[name]
    for key in ("fx", "times", "width", "height"):
        if isinstance(settings.get(key), list):
            settings[key] = torch.tensor(settings[key])[:, None]
    if "distortion_params" in settings:
        settings["distortion_params"] = settings["distortion_params"].expand(COUNT, 6)
    return Cameras(camera_to_worlds=torch.cat((rotation, torch.randn(COUNT, 3, 1)), dim=-1), **settings)


def all_pixels(cameras: Cameras) -> Tensor:
    return torch.cat(
        [
            torch.cartesian_prod(torch.tensor([camera]), torch.arange(int(height)), torch.arange(int(width)))
            for camera, (height, width) in enumerate(zip(cameras.height, cameras.width, strict=True))
        ]
    )


def theirs(cameras: Cameras, indices: Tensor, coords: Tensor | None = None) -> RayBundle:
    coords = indices[:, 1:] + 0.5 if coords is None else coords
    return cameras.generate_rays(camera_indices=indices[:, :1], coords=coords)


@EACH_CASE
def test_rays_are_those_of_nerfstudio(name):
    cameras = make_cameras(name)
    indices = all_pixels(cameras)
    ours, expected = MiningRayGenerator(cameras).mined(indices), theirs(cameras, indices)
    for field in ("origins", "directions", "camera_indices", "times", "nears", "fars"):
        first, second = getattr(ours, field), getattr(expected, field)
        assert (first is None) == (second is None), field
        if first is not None:
            torch.testing.assert_close(first, second, rtol=0, atol=1e-6, msg=field)
    if cameras.camera_type[0] == CameraType.PERSPECTIVE.value:
        assert torch.equal(ours.directions, expected.directions)
    torch.testing.assert_close(ours.pixel_area, expected.pixel_area, rtol=1e-3, atol=1e-7)
    assert ours.metadata.keys() == expected.metadata.keys()
    for key, value in expected.metadata.items():
        torch.testing.assert_close(ours.metadata[key], value, rtol=1e-5, atol=1e-6)


@EACH_CASE
def test_their_gradient_is_that_of_nerfstudio(name):
    cameras = make_cameras(name)
    indices = all_pixels(cameras)[::7]
    ours, coords = MiningRayGenerator(cameras).differentiable(indices)
    places = (indices[:, 1:] + 0.5).requires_grad_()
    expected = theirs(cameras, indices, places)
    torch.manual_seed(1)
    found, wanted = torch.zeros(()), torch.zeros(())
    for part, key in RAY_OFFSETS.items():
        weights = torch.randn(len(indices), 3)
        assert not getattr(ours, part).requires_grad
        if key in ours.metadata:
            assert not ours.metadata[key].any()
            found = found + (ours.metadata[key] * weights).sum()
        wanted = wanted + (getattr(expected, part) * weights).sum()
    (gradient,) = torch.autograd.grad(found, coords)
    (reference,) = torch.autograd.grad(wanted, places)
    # differences of neighbours: exact up to how much the slope changes within a pixel
    assert (gradient - reference).norm() < 0.02 * reference.norm()
    width, height = cameras.width[indices[:, 0], 0], cameras.height[indices[:, 0], 0]
    row, column = indices[:, 1], indices[:, 2]
    inner = (row > 0) & (column > 0) & (row < height - 1) & (column < width - 1)
    assert (gradient - reference)[inner].norm() < 2e-3 * reference[inner].norm()


def test_cameras_with_the_same_lens_share_a_table():
    table = MiningRayGenerator(make_cameras("distorted")).table
    assert table is not None and table.rows.shape == (32 * 64, 4)
    assert table.rows.element_size() * table.rows.shape[1] == rays_module.ROW_BYTES
    several = MiningRayGenerator(make_cameras("several lenses")).table
    assert several is not None and len(several.rows) == 3 * 32 * 64


def test_what_has_no_common_centre_or_does_not_turn_has_no_table():
    assert MiningRayGenerator(make_cameras("orthophoto")).table is None
    mirrored = make_cameras("perspective")
    mirrored.camera_to_worlds[:, :, :3] *= 2
    assert MiningRayGenerator(mirrored).table is None


@pytest.mark.parametrize("name", ["several lenses", "perspective"])
def test_too_many_lenses_are_left_to_nerfstudio_with_a_word_if_that_is_slow(name, monkeypatch, capsys):
    monkeypatch.setattr(rays_module, "SMALL_TABLE_BYTES", 32 * 64 * 16 - 1)
    cameras = make_cameras(name)
    generator, indices = MiningRayGenerator(cameras), all_pixels(cameras)
    assert torch.equal(generator.mined(indices).directions, theirs(cameras, indices).directions)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("3 distorted lenses" in printed and "Undistort the images" in printed) == (name == "several lenses")


def test_a_table_takes_far_less_memory_than_many_images(monkeypatch):
    monkeypatch.setattr(rays_module, "SMALL_TABLE_BYTES", 0)
    for copies, has_table in ((5, False), (6, True)):  # a quarter of the bytes of 22 images is that of one lens
        cameras = make_cameras("distorted")[torch.arange(COUNT).repeat(copies)]
        assert (MiningRayGenerator(cameras).table is not None) == has_table


def test_a_table_is_made_in_parts(monkeypatch):
    cameras = make_cameras("several sizes")
    whole = MiningRayGenerator(cameras).table
    monkeypatch.setattr(rays_module, "CHUNK", 100)
    parts = MiningRayGenerator(cameras).table
    assert whole is not None and parts is not None and torch.equal(whole.rows, parts.rows)


@pytest.mark.parametrize("kind", rays_module.RENDER_ONLY)
def test_cameras_that_nothing_can_be_trained_on_are_refused(kind):
    pose = torch.eye(4)[:3].repeat(2, 1, 1)
    cameras = Cameras(pose, fx=32.0, fy=32.0, cx=32.0, cy=16.0, width=64, height=32, camera_type=kind)
    with pytest.raises((IndexError, RuntimeError)):  # nerfstudio's own, which this is to go with
        cameras.generate_rays(camera_indices=torch.zeros(5, 1).long(), coords=torch.ones(5, 2))
    with pytest.raises(UserError, match=f"cameras of type {kind.name}.*Convert"):
        MiningRayGenerator(cameras)
