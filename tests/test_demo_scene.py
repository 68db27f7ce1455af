"""Laws of the demo's scene: its cameras say the truth about its images, and it is there as a whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nerfstudio_softmining.demo import scene
from nerfstudio_softmining.errors import UserError

SIZE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "scene"
    scene.write_scene(path, num_train=6, num_eval=2, size=SIZE)
    return path


def frames(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image [H, W, 4], camera-to-world [4, 4]) of each view, from the files alone."""
    meta = json.loads((folder / f"transforms_{split}.json").read_text())
    images = [np.asarray(Image.open(folder / f"{frame['file_path']}.png")) for frame in meta["frames"]]
    return [(i, np.array(f["transform_matrix"])) for i, f in zip(images, meta["frames"], strict=True)]


def project(point: np.ndarray, pose: np.ndarray) -> tuple[int, int]:
    """Row and column of the pixel that a world point [3] falls into, by the textbook."""
    x, y, z = pose[:3, :3].T @ (point - pose[:3, 3])
    focal = SIZE / 2 / np.tan(scene.CAMERA_ANGLE_X / 2)
    return int(SIZE / 2 - focal * y / -z), int(SIZE / 2 + focal * x / -z)


def is_inside(solid: scene.Solid, points: np.ndarray) -> np.ndarray:
    """Whether world points [..., 3] are inside a solid, by the textbook."""
    x, y, z = np.moveaxis(points - solid.centre, -1, 0)
    if solid.shape is scene.BALL:
        return x**2 + y**2 + z**2 <= solid.radius**2
    return (np.hypot(x, y) <= solid.radius) & (abs(z) <= solid.half_height)


def test_rays_end_where_small_steps_first_find_a_solid() -> None:
    steps = np.arange(2.4, 5.6, step := 0.002)
    for pose in scene.orbit(4):
        origin, directions = pose[:3, 3], scene.ray_directions(pose, 8)
        _, depth = scene.cast(origin, directions)
        points = origin + steps[:, None] * directions[:, None]
        inside = np.any([is_inside(solid, points) for solid in scene.SCENE], axis=0)
        walked = np.where(inside.any(1), steps[inside.argmax(1)], np.inf)
        agree = (walked == depth) | ((depth <= walked) & (walked <= depth + step))
        assert agree.mean() > 0.99  # steps may go over a rim, but never find a solid too early
        assert (depth <= walked).all() and 0.2 < np.isfinite(depth).mean() < 0.8


def test_every_solid_is_seen_and_lit_by_the_slope_of_its_surface() -> None:
    pose, probes = scene.orbit(5)[2], np.random.default_rng(0).normal(size=(4000, 3))
    probes *= 1e-4 / np.linalg.norm(probes, axis=1, keepdims=True)
    origin, directions = pose[:3, 3], scene.ray_directions(pose, SIZE)
    colours, depth = scene.cast(origin, directions)
    assert (colours[np.isinf(depth)] == 0).all()
    colours, directions, depth = (x[np.isfinite(depth)] for x in (colours, directions, depth))
    points = origin + depth[:, None] * directions
    owned = [is_inside(solid, points + 1e-6 * directions) for solid in scene.SCENE]
    assert (np.abs(points) <= 1 + 1e-9).all() and np.any(owned, axis=0).mean() > 0.999
    for solid, mine in zip(scene.SCENE, owned, strict=True):
        albedo = solid.texture(points[mine] - solid.centre)
        assert len(albedo) > 0 and (albedo >= 0).all() and (albedo <= 1).all()
        for i in np.linspace(0, len(albedo) - 1, 5).astype(int):
            outside = probes[~is_inside(solid, points[mine][i] + probes)].mean(0)
            normal = outside / np.linalg.norm(outside)
            light = scene.AMBIENT + (1 - scene.AMBIENT) * max(normal @ scene.LIGHT, 0)
            np.testing.assert_allclose(colours[mine][i], albedo[i] * light, atol=0.03)


@pytest.mark.parametrize("split", scene.SPLITS)
def test_balls_are_seen_where_the_written_camera_projects_them(folder: Path, split: str) -> None:
    seen = 0
    for ball in (solid for solid in scene.SCENE if solid.texture is scene.gradient):
        for image, pose in frames(folder, split):
            towards = ball.centre - pose[:3, 3]
            distance = np.linalg.norm(towards)
            colour, depth = scene.cast(pose[:3, 3], towards[None] / distance)
            if np.isclose(depth[0], distance - ball.radius):  # else something stands before it
                pixel = image[project(np.array(ball.centre), pose)] / 255
                np.testing.assert_allclose(pixel, [*colour[0], 1], atol=0.012 / ball.radius)  # a pixel of colours
                seen += 1
    assert seen > 6


def test_cameras_are_turned_not_mirrored_and_stand_upright() -> None:
    for turn in (pose[:3, :3] for pose in scene.orbit(5)):
        np.testing.assert_allclose(turn.T @ turn, np.eye(3), atol=1e-9)
        assert np.linalg.det(turn) > 0 and turn[2, 0] == 0 and turn[2, 1] > 0


def test_a_pixel_is_the_mean_of_its_rays_and_colour_that_of_those_that_hit() -> None:
    pose, blocks = scene.orbit(3)[0], (SIZE, scene.SUPERSAMPLING, SIZE, scene.SUPERSAMPLING)
    colours, depth = scene.cast(pose[:3, 3], scene.ray_directions(pose, SIZE))
    hits = np.isfinite(depth).reshape(blocks).sum((1, 3))
    image = scene.render_view(pose, SIZE) / 255
    np.testing.assert_allclose(image[..., 3], hits / scene.SUPERSAMPLING**2, atol=0.003)
    total = colours.reshape(*blocks, 3).sum((1, 3))
    np.testing.assert_allclose(image[..., :3] * hits[..., None], total, atol=0.003 * scene.SUPERSAMPLING**2)


def test_two_renders_are_identical(folder: Path, tmp_path: Path) -> None:
    scene.write_scene(tmp_path / "again", num_train=6, num_eval=2, size=SIZE)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 6 + 2 + 3
    assert all((folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_held_out_views_are_not_training_views(folder: Path) -> None:
    train, test = ([pose[:3, 3] for _, pose in frames(folder, split)] for split in ("train", "test"))
    assert min(np.linalg.norm(a - b) for a in train for b in test) > 0.1


def test_blender_data_reads_it(folder: Path) -> None:
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
    from nerfstudio.data.datasets.base_dataset import InputDataset

    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        dataset = InputDataset(BlenderDataParserConfig(data=folder).setup().get_dataparser_outputs(split=split))
        assert len(dataset) == count
        image = dataset[0]["image"].numpy()
        assert image.shape == (SIZE, SIZE, 3)
        np.testing.assert_array_equal(image[0, 0], 1.0)  # the sky, on white
        ours = scene.ray_directions(frames(folder, split)[0][1], SIZE)
        middle = ours.reshape(SIZE, scene.SUPERSAMPLING, SIZE, scene.SUPERSAMPLING, 3)[:, 1, :, 1]
        rays = dataset.cameras.generate_rays(camera_indices=0)
        np.testing.assert_allclose(rays.directions.numpy(), middle, atol=1e-5)


def test_a_scene_that_was_interrupted_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scene"
    outcomes = iter([np.zeros((SIZE, SIZE, 4), np.uint8)] * 3)

    with monkeypatch.context() as patch:
        patch.setattr(scene, "render_view", lambda pose, size: next(outcomes))
        with pytest.raises(StopIteration):
            scene.write_scene(folder, num_train=4, num_eval=1, size=SIZE)
    assert not folder.exists() and not scene.is_complete(folder)
    assert len(list(tmp_path.rglob("*.png"))) == 3
    scene.write_scene(folder, num_train=4, num_eval=1, size=SIZE)
    assert scene.is_complete(folder)
    assert all(image.max() > 0 for image, _ in frames(folder, "train"))


def test_a_whole_scene_is_used_again_and_a_damaged_one_is_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene, "render_view", lambda pose, size: pytest.fail("rendered again"))
    scene.ensure_scene(folder)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="no complete demo scene"):
        scene.ensure_scene(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["keep"]
