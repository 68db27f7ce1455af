"""Laws of the parser for scenes in the LLFF layout."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import tyro
import yaml
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import llff_dataparser
from nerfstudio_softmining.plugin.dataparsers import llff
from nerfstudio_softmining.plugin.llff_dataparser import LLFFDataParserConfig

POSE_WIDTH, POSE_HEIGHT, FOCAL = 96, 64, 80.0
UNTOUCHED = {"orientation_method": "none", "center_method": "none", "auto_scale_poses": False}


def random_cameras(count: int) -> np.ndarray:
    """Camera-to-world matrices [count, 3, 4] in OpenGL axes, all different."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(count, 3, 3)))
    rotation[:, :, 2] *= np.linalg.det(rotation)[:, None]
    return np.concatenate([rotation, rng.normal(size=(count, 3, 1))], axis=2)


def write_poses(scene: Path, cameras: np.ndarray) -> None:
    right, up, back, place = np.moveaxis(cameras, 2, 0)
    intrinsics = np.tile([POSE_HEIGHT, POSE_WIDTH, FOCAL], (len(cameras), 1))
    matrices = np.stack([-up, right, back, place, intrinsics], axis=2)
    bounds = np.tile([1.0, 10.0], (len(cameras), 1))
    np.save(scene / "poses_bounds.npy", np.concatenate([matrices.reshape(-1, 15), bounds], axis=1))


def write_images(folder: Path, sizes: list[tuple[int, int]], suffix: str = ".png") -> None:
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"image{i:03d}{suffix}")


def make_scene(folder: Path, count: int = 17, factors: tuple[int, ...] = (1,)) -> Path:
    folder.mkdir(exist_ok=True)
    write_poses(folder, random_cameras(count))
    for factor in factors:
        size = (POSE_WIDTH // factor, POSE_HEIGHT // factor)
        write_images(folder / ("images" if factor == 1 else f"images_{factor}"), [size] * count)
    return folder


def parse(scene: Path, split: str = "train", **settings):
    return LLFFDataParserConfig(data=scene, **settings).setup().get_dataparser_outputs(split)


def folders_used(outputs) -> set[str]:
    return {path.parent.name for path in outputs.image_filenames}


# Cameras


def test_untouched_world_gives_back_the_cameras_of_the_file(tmp_path):
    scene = make_scene(tmp_path, count=9)
    cameras = torch.from_numpy(random_cameras(9)).float()
    train, held_out = parse(scene, "train", **UNTOUCHED), parse(scene, "test", **UNTOUCHED)
    assert torch.equal(held_out.cameras.camera_to_worlds, cameras[[0, 8]])
    assert torch.equal(train.cameras.camera_to_worlds, cameras[1:8])
    assert torch.equal(train.dataparser_transform, torch.eye(4)[:3])
    assert train.dataparser_scale == 1.0


@pytest.mark.parametrize("orientation_method", ["up", "pca", "vertical", "none"])
@pytest.mark.parametrize("center_method", ["poses", "focus", "none"])
def test_transform_and_scale_lead_back_to_the_world_of_the_file(tmp_path, orientation_method, center_method):
    scene = make_scene(tmp_path)
    cameras = torch.from_numpy(random_cameras(17)).float()
    for flip in (1.0, -1.0):  # "pca" turns the world over for one of the two
        cameras[:, :, :2] *= flip
        write_poses(scene, cameras.double().numpy())
        settings = {"orientation_method": orientation_method, "center_method": center_method, "scale_factor": 0.7}
        outputs = parse(scene, "test", **settings)
        back = outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds, camera_convention="opengl")
        torch.testing.assert_close(back, cameras[::8], rtol=1e-4, atol=1e-4)
        rotation = outputs.cameras.camera_to_worlds[:, :, :3]
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3), rtol=1e-4, atol=1e-4)


def test_cameras_of_all_splits_fill_a_box_of_one_times_the_scale_factor(tmp_path):
    scene = make_scene(tmp_path)
    parser = LLFFDataParserConfig(data=scene, scale_factor=0.5, scene_scale=2.0).setup()
    outputs = [parser.get_dataparser_outputs(split) for split in ("train", "val")]
    places = torch.cat([out.cameras.camera_to_worlds[:, :, 3] for out in outputs])
    assert places.abs().max().item() == pytest.approx(0.5)
    torch.testing.assert_close(places.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    assert torch.equal(outputs[0].scene_box.aabb, torch.tensor([[-2.0] * 3, [2.0] * 3]))


def test_intrinsics_follow_the_actual_size_of_each_image(tmp_path):
    write_poses(tmp_path, random_cameras(3))
    sizes = [(24, 16), (48, 16), (13, 11)]
    write_images(tmp_path / "images_4", sizes)
    outputs = [parse(tmp_path, split) for split in ("val", "train")]
    for out, expected in zip(outputs, (sizes[:1], sizes[1:]), strict=True):
        cameras = out.cameras
        width, height = torch.tensor(expected).T[..., None]
        assert torch.equal(cameras.width, width)
        assert torch.equal(cameras.height, height)
        torch.testing.assert_close(cameras.fx, FOCAL * width / POSE_WIDTH)
        torch.testing.assert_close(cameras.fy, FOCAL * height / POSE_HEIGHT)
        torch.testing.assert_close(cameras.cx, width / 2)
        torch.testing.assert_close(cameras.cy, height / 2)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_cameras_have_the_size_of_the_images_that_are_loaded(tmp_path, scale):
    write_poses(tmp_path, random_cameras(3))
    write_images(tmp_path / "images_4", [(24, 16), (48, 17), (13, 11)])
    dataset = InputDataset(parse(tmp_path), scale_factor=scale)
    for i in range(len(dataset)):
        height, width, _ = dataset[i]["image"].shape
        assert (dataset.cameras.height[i].item(), dataset.cameras.width[i].item()) == (height, width)


def test_cameras_can_carry_metadata_as_the_camera_export_needs(tmp_path):
    assert parse(make_scene(tmp_path)).cameras[0:1].metadata == {}


# Views


@pytest.mark.parametrize("interval", [2, 8, 100])
def test_every_nth_view_is_held_out_and_the_others_train(tmp_path, interval):
    scene = make_scene(tmp_path)
    names = [f"image{i:03d}.png" for i in range(17)]
    found = {
        split: [path.name for path in parse(scene, split, eval_interval=interval).image_filenames]
        for split in ("train", "val", "test")
    }
    assert found["val"] == found["test"] == names[::interval]
    assert found["train"] == [name for i, name in enumerate(names) if i % interval]


def test_the_default_holds_out_every_8th_view():
    assert llff.config.eval_interval == 8


def test_order_is_that_of_the_file_names_and_other_files_are_no_images(tmp_path):
    write_poses(tmp_path, random_cameras(4))
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in [(2, "c.jpeg"), (0, "a.JPG"), (3, "d.Png"), (1, "b.jpg")]:
        Image.new("RGB", (10 + i, 10)).save(folder / name, format="PNG")
    (folder / "b.txt").write_text("not an image")
    (folder / "Thumbs.db").write_bytes(b"\0")
    held_out, train = parse(tmp_path, "val", eval_interval=2), parse(tmp_path, "train", eval_interval=2)
    assert [path.name for path in held_out.image_filenames] == ["a.JPG", "c.jpeg"]
    assert [path.name for path in train.image_filenames] == ["b.jpg", "d.Png"]
    assert held_out.cameras.width.flatten().tolist() == [10, 12]


# Folders


@pytest.mark.parametrize(("factor", "folder"), [(1, "images"), (2, "images_2"), (16, "images_16")])
def test_the_factor_names_the_folder(tmp_path, factor, folder):
    scene = make_scene(tmp_path, factors=(1, 2, 16))
    assert folders_used(parse(scene, downscale_factor=factor)) == {folder}


@pytest.mark.parametrize(("limit", "folder"), [(96, "images"), (95, "images_2"), (10, "images_16"), (1, "images_16")])
def test_without_a_factor_the_largest_images_within_the_limit_are_taken(tmp_path, monkeypatch, capsys, limit, folder):
    monkeypatch.setattr(llff_dataparser, "MAX_AUTO_RESOLUTION", limit)
    scene = make_scene(tmp_path, factors=(1, 2, 16))  # longer sides 96, 48 and 6
    parser = LLFFDataParserConfig(data=scene).setup()
    for split in ("train", "val"):
        assert folders_used(parser.get_dataparser_outputs(split)) == {folder}
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"{folder}/" in said
    assert ("over 1 px" in said) == (limit == 1)


def test_one_large_image_in_a_folder_is_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(llff_dataparser, "MAX_AUTO_RESOLUTION", 50)
    scene = make_scene(tmp_path, count=3, factors=(4,))
    write_images(scene / "images_2", [(48, 32), (48, 32), (32, 51)])
    assert folders_used(parse(scene)) == {"images_4"}


def test_folders_without_images_are_passed_over(tmp_path):
    scene = make_scene(tmp_path, factors=(8,))
    (scene / "images").mkdir()
    (scene / "images_old").mkdir()
    assert folders_used(parse(scene)) == {"images_8"}


# Rendering without training


@pytest.mark.parametrize("factor", [None, 2])
def test_in_inference_the_images_there_are_give_the_same_cameras(tmp_path, factor):
    scene = make_scene(tmp_path, factors=(2,))
    parser = LLFFDataParserConfig(data=scene, downscale_factor=factor).setup()
    parser.downscale_factor = 1  # as nerfstudio's data managers do
    found, expected = parser.get_dataparser_outputs("test"), parse(scene, "test", downscale_factor=factor)
    assert found.image_filenames == expected.image_filenames
    assert torch.equal(found.cameras.width, expected.cameras.width)
    assert torch.equal(found.cameras.fx, expected.cameras.fx)


@pytest.mark.parametrize("present", [(), (4,)])
def test_in_inference_the_images_may_be_missing(tmp_path, present):
    trained = parse(make_scene(tmp_path / "trained", factors=(2,)), downscale_factor=2)
    scene = make_scene(tmp_path / "elsewhere", factors=present)
    parser = LLFFDataParserConfig(data=scene, downscale_factor=2).setup()
    parser.downscale_factor = 1
    found = parser.get_dataparser_outputs("train")
    assert len(found.image_filenames) == len(trained.image_filenames)
    assert torch.equal(found.cameras.camera_to_worlds, trained.cameras.camera_to_worlds)
    assert torch.equal(found.cameras.height, trained.cameras.height)
    assert torch.equal(found.cameras.fy, trained.cameras.fy)
    assert found.dataparser_scale == trained.dataparser_scale


# Settings


def test_the_config_passes_through_the_command_line_and_the_saved_file():
    args = ["--data", "scene", "--downscale-factor", "4", "--orientation-method", "vertical"]
    config = tyro.cli(type(llff.config), args=args)
    assert config == LLFFDataParserConfig(data=Path("scene"), downscale_factor=4, orientation_method="vertical")
    assert yaml.load(yaml.dump(config), Loader=yaml.Loader) == config


# Bad input


def assert_refused(scene: Path, *told: object, **settings) -> None:
    with pytest.raises(UserError) as error:
        parse(scene, **settings)
    for part in told:
        assert str(part) in str(error.value)


@pytest.mark.parametrize("factor", [0, -4])
def test_refuses_a_factor_below_one(tmp_path, factor):
    assert_refused(make_scene(tmp_path), "downscale_factor", factor, downscale_factor=factor)


@pytest.mark.parametrize("interval", [1, 0, -8])
def test_refuses_to_hold_out_all_views(tmp_path, interval):
    assert_refused(make_scene(tmp_path), "eval_interval", interval, "at least 2", eval_interval=interval)


def test_refuses_a_missing_data_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", tmp_path / "nowhere", "--data")


def test_refuses_a_folder_without_poses(tmp_path):
    write_images(tmp_path / "images", [(4, 4)] * 3)
    assert_refused(tmp_path, tmp_path / "poses_bounds.npy", "--data")


@pytest.mark.parametrize("content", [b"", b"1 2 3", b"\x93NUMPY"])
def test_refuses_poses_that_are_no_array(tmp_path, content):
    scene = make_scene(tmp_path)
    (scene / "poses_bounds.npy").write_bytes(content)
    assert_refused(scene, scene / "poses_bounds.npy")


def test_refuses_pickled_poses_without_unpickling_them(tmp_path):
    scene = make_scene(tmp_path)
    np.save(scene / "poses_bounds.npy", np.array([{"pose": 1}], dtype=object), allow_pickle=True)
    assert_refused(scene, scene / "poses_bounds.npy")


@pytest.mark.parametrize("shape", [(17,), (17, 15), (17, 3, 5)])
def test_refuses_poses_of_another_shape(tmp_path, shape):
    scene = make_scene(tmp_path)
    np.save(scene / "poses_bounds.npy", np.ones(shape))
    assert_refused(scene, scene / "poses_bounds.npy", shape, "17]")


@pytest.mark.parametrize(("column", "value"), [(0, np.nan), (3, np.inf), (4, 0.0), (14, -1.0)])
def test_refuses_poses_that_no_camera_can_have(tmp_path, column, value):
    scene = make_scene(tmp_path)
    table = np.load(scene / "poses_bounds.npy")
    table[1, column] = value
    np.save(scene / "poses_bounds.npy", table)
    assert_refused(scene, scene / "poses_bounds.npy", "finite")


@pytest.mark.parametrize("count", [0, 1])
def test_refuses_too_few_views_to_split(tmp_path, count):
    assert_refused(make_scene(tmp_path, count=count), f"{count} poses", "at least 2")


def test_accepts_two_views(tmp_path):
    scene = make_scene(tmp_path, count=2)
    assert [len(parse(scene, split).image_filenames) for split in ("train", "val")] == [1, 1]


def test_refuses_a_number_of_images_other_than_that_of_poses(tmp_path):
    scene = make_scene(tmp_path, count=9)
    (scene / "images" / "image003.png").unlink()
    assert_refused(scene, "9 poses", "8 images", scene / "images")


@pytest.mark.parametrize("factor", [None, 1, 4])
def test_refuses_a_scene_without_images(tmp_path, factor):
    scene = make_scene(tmp_path, factors=())
    assert_refused(scene, scene, "images/", "images_4/", downscale_factor=factor)
    (scene / "images_4").mkdir()
    assert_refused(scene, scene, "images/", "images_4/", downscale_factor=factor)


@pytest.mark.parametrize(
    ("factor", "fix"),
    [
        (2, ["`--downscale-factor 4`"]),
        (1, ["no images in images/", "`--downscale-factor 4`"]),
        (8, ["`--downscale-factor 4`", "`--pipeline.datamanager.camera-res-scale-factor 0.5`"]),
        (64, ["`--downscale-factor 16`", "`--pipeline.datamanager.camera-res-scale-factor 0.25`"]),
    ],
)
def test_a_missing_folder_is_answered_with_those_there_are(tmp_path, factor, fix):
    scene = make_scene(tmp_path, factors=(4, 16))
    present = ["images_4/ (24x16)", "images_16/ (6x4)"]
    assert_refused(scene, f"downscale_factor is {factor}", *present, *fix, downscale_factor=factor)


def test_refuses_a_broken_image(tmp_path):
    scene = make_scene(tmp_path)
    (scene / "images" / "image005.png").write_bytes(b"not an image")
    assert_refused(scene, scene / "images" / "image005.png")


# Photographs


@pytest.fixture(params=[("fern", 20, 4, (1008, 756)), ("flower", 34, 8, (504, 378))], ids=["fern", "flower"])
def photographs(request):
    name, count, factor, size = request.param
    if "SOFTMINING_DATA" not in os.environ:
        pytest.skip("SOFTMINING_DATA is not set: it is the folder that nerf_llff_data/fern and .../flower lie in")
    return Path(os.environ["SOFTMINING_DATA"]) / "nerf_llff_data" / name, count, factor, size


def test_photographs_were_taken_upright_side_by_side_of_one_thing(photographs):
    scene, count, factor, size = photographs
    train, held_out = parse(scene, "train"), parse(scene, "test", downscale_factor=factor)
    assert len(held_out.cameras) == (count + 7) // 8
    assert len(train.cameras) == count - len(held_out.cameras)
    assert folders_used(train) == folders_used(held_out) == {f"images_{factor}"}
    assert (train.cameras.width == size[0]).all()
    assert (train.cameras.height == size[1]).all()

    poses = torch.cat([train.cameras.camera_to_worlds, held_out.cameras.camera_to_worlds])
    up, looking, places = poses[:, :, 1], -poses[:, :, 2], poses[:, :, 3]
    assert (looking @ looking.T).min() > np.cos(np.pi / 4)
    assert up[:, 2].mean() > 0.9
    assert looking[:, 2].abs().max() < 0.7  # photographs of something ahead, not of the floor or the sky
    steps = (places[:, None] - places[None, :])[~torch.eye(count, dtype=torch.bool)]
    ahead = torch.nn.functional.normalize(looking.mean(0), dim=0)
    assert (steps @ ahead).norm() < 0.3 * steps.norm()


def test_points_seen_in_two_photographs_obey_the_cameras(photographs):
    """Matched points lie on each other's epipolar lines, in front of both cameras and within the file's bounds."""
    scene, _, factor, _ = photographs
    outputs = parse(scene, "train", downscale_factor=factor, **UNTOUCHED)
    near, far = np.load(scene / "poses_bounds.npy")[1, 15:]
    points = matched_points(outputs.image_filenames[0], outputs.image_filenames[2])
    assert len(points[0]) > 50

    projections = []
    for i in (0, 2):
        camera = outputs.cameras[i]
        c2w = np.vstack([camera.camera_to_worlds.double().numpy(), [0, 0, 0, 1]])
        w2c = np.diag([1, -1, -1, 1]) @ np.linalg.inv(c2w)  # OpenCV's axes: right, down, forwards
        projections.append(camera.get_intrinsics_matrices().double().numpy() @ w2c[:3])
    world = cv2.triangulatePoints(*projections, points[0].T, points[1].T)
    for projection, seen in zip(projections, points, strict=True):
        *pixel, depth = projection @ (world / world[3])
        error = np.linalg.norm(np.stack(pixel, axis=1) / depth[:, None] - seen, axis=1)
        assert np.median(error) < 0.3
        assert np.mean((depth > 0.8 * near) & (depth < 1.2 * far)) > 0.8


def matched_points(first: Path, second: Path) -> list[np.ndarray]:
    """Pixel coordinates [n, 2] in each of two photographs of the points that look alike in both."""
    sift = cv2.SIFT_create(nfeatures=2000)
    found = [sift.detectAndCompute(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), None) for path in (first, second)]
    pairs = cv2.BFMatcher().knnMatch(found[0][1], found[1][1], k=2)
    good = [best for best, other in pairs if best.distance < 0.7 * other.distance]
    # SIFT counts from the centre of the first pixel, cameras from its corner
    return [
        np.array([found[0][0][match.queryIdx].pt for match in good]) + 0.5,
        np.array([found[1][0][match.trainIdx].pt for match in good]) + 0.5,
    ]
