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


def faces_camera(ball: scene.Sphere, pose: np.ndarray) -> bool:
    """Whether nothing stands between the camera and the ball's centre but the ball."""
    towards = ball.centre - pose[:3, 3]
    depth, _ = scene.first_hits(pose[:3, 3], towards[None] / np.linalg.norm(towards))
    return bool(np.isclose(depth[0], np.linalg.norm(towards) - ball.radius))


@pytest.mark.parametrize("split", scene.SPLITS)
def test_a_ball_is_seen_where_the_written_camera_projects_it(folder: Path, split: str) -> None:
    ball = scene.SMOOTH_BALL
    seen = 0
    for image, pose in frames(folder, split):
        if not faces_camera(ball, pose):
            continue
        towards_camera = (pose[:3, 3] - ball.centre) / np.linalg.norm(pose[:3, 3] - ball.centre)
        expected = scene.shade(ball, ball.radius * towards_camera[None])[0]
        colour = image[project(ball.centre, pose)] / 255.0
        np.testing.assert_allclose(colour, [*expected, 1.0], atol=0.06)
        seen += 1
    assert seen > 0


def test_pole_tops_are_opaque_and_the_sky_beside_them_is_not(folder: Path) -> None:
    tops = [solid.centre for solid in scene.SCENE if isinstance(solid, scene.Sphere) and solid.radius == 0.05]
    highest = max(tops, key=lambda top: top[2])
    for image, pose in frames(folder, "train"):
        for top in tops:
            assert image[project(top, pose)][3] > 0
        assert image[project(highest, pose)][3] == 255
        assert image[project(highest + 0.25 * pose[:3, 1], pose)][3] == 0


def test_colour_is_not_multiplied_by_opacity(folder: Path) -> None:
    rim = np.concatenate([i[(i[..., 3] > 20) & (i[..., 3] < 120)] for i, _ in frames(folder, "train")])
    assert len(rim) > 20
    assert rim[:, :3].max(1).mean() > 100  # it would be below 120 for white, and far below for these colours


def test_a_pixel_is_the_mean_of_its_rays() -> None:
    pose = scene.orbit(3)[0]
    fine = scene.render_view(pose, SIZE * 2).astype(float)
    coarse = scene.render_view(pose, SIZE).astype(float)
    alpha = fine[..., 3].reshape(SIZE, 2, SIZE, 2).mean((1, 3))
    assert np.abs(alpha - coarse[..., 3]).mean() < 1.5  # rays at other places, so up to the sampling of the outline
    assert set(np.unique(coarse[..., 3])) <= {round(255 * hits / 9) for hits in range(10)}


def test_normals_are_unit_and_look_at_the_camera() -> None:
    pose = scene.orbit(5)[2]
    origin, directions = pose[:3, 3], scene.ray_directions(pose, SIZE)
    depth, owner = scene.first_hits(origin, directions)
    assert set(np.unique(owner)) == {-1, *range(len(scene.SCENE))}
    for index, solid in enumerate(scene.SCENE):
        rays = owner == index
        points = origin - solid.centre + depth[rays, None] * directions[rays]
        normals = solid.normals(points)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1.0, atol=1e-9)
        assert (np.sum(normals * directions[rays], 1) < 1e-6).all()
        assert (np.abs(points + solid.centre) <= 1.0 + 1e-9).all()
        colours = solid.texture(points)
        assert colours.shape == points.shape and (colours >= 0).all() and (colours <= 1).all()


def test_two_renders_are_identical(folder: Path, tmp_path: Path) -> None:
    scene.write_scene(tmp_path / "again", num_train=6, num_eval=2, size=SIZE)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 6 + 2 + 3
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_held_out_views_are_not_training_views(folder: Path) -> None:
    seen = [pose[:3, 3] for _, pose in frames(folder, "train")]
    for _, pose in frames(folder, "test"):
        assert min(np.linalg.norm(pose[:3, 3] - position) for position in seen) > 0.1


def test_blender_data_reads_it(folder: Path) -> None:
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
    from nerfstudio.data.datasets.base_dataset import InputDataset

    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        dataset = InputDataset(BlenderDataParserConfig(data=folder).setup().get_dataparser_outputs(split=split))
        assert len(dataset) == count
        image = dataset[0]["image"].numpy()
        assert image.shape == (SIZE, SIZE, 3)
        np.testing.assert_array_equal(image[0, 0], 1.0)  # the sky, on white
        rays = dataset.cameras.generate_rays(camera_indices=0)
        ours = scene.ray_directions(frames(folder, split)[0][1], SIZE)
        middle = ours.reshape(SIZE, scene.SUPERSAMPLING, SIZE, scene.SUPERSAMPLING, 3)[:, 1, :, 1]
        np.testing.assert_allclose(rays.directions.numpy(), middle, atol=1e-5)


def test_a_scene_that_was_interrupted_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scene"
    views = []

    def render_until_interrupted(pose: np.ndarray, size: int) -> np.ndarray:
        if len(views) == 3:
            raise KeyboardInterrupt
        views.append(pose)
        return np.zeros((size, size, 4), np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(scene, "render_view", render_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            scene.write_scene(folder, num_train=4, num_eval=1, size=SIZE)
    assert len(views) == 3 and not folder.exists() and not scene.is_complete(folder)

    scene.write_scene(folder, num_train=4, num_eval=1, size=SIZE)
    assert scene.is_complete(folder)
    assert all(image.max() > 0 for image, _ in frames(folder, "train"))


def test_a_whole_scene_is_used_again_and_a_damaged_one_is_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene, "render_view", lambda pose, size: pytest.fail("rendered again"))
    scene.ensure_scene(folder)
    mine = tmp_path / "scene" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(UserError, match="no complete demo scene"):
        scene.ensure_scene(mine.parent)
    assert mine.read_text() == "keep"
