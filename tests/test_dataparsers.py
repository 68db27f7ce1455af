"""Training on scenes in the format of each of nerfstudio's dataparsers."""

from __future__ import annotations

import json
import math
import random
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from captures import SIZES, STEPS, train, write_capture
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.utils import colmap_parsing_utils as colmap
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from nerfstudio_softmining.demo.scene import write_scene

COUNT, RAYS = 10, 64
SMALL = {
    "nerfacto-lite": {"log2_hashmap_size": 10},
    "neus-facto": {
        "num_neus_samples_per_ray": 16,
        "num_proposal_samples_per_ray": (32, 16),
        "mono_depth_loss_mult": 0.1,
        "mono_normal_loss_mult": 0.05,
    },
}
"""Methods, and settings under which each is small and uses all that a scene has."""
HEIGHT, WIDTH = SIZES[0]
FOCAL = 30.0
INTRINSICS = np.array([[FOCAL, 0, WIDTH / 2, 0], [0, FOCAL, HEIGHT / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
"""A pose times it has OpenCV's axes, if it has OpenGL's."""
NUM_EVAL = 1
"""Held-out images of formats whose files list them."""


def with_folder(path: Path) -> Path:
    """Make the folder of a file, and return the file's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_views(folder: Path, pictures: str) -> list[tuple[str, NDArray]]:
    """Write pictures of a scene, seen from a circle around its centre.

    Args:
        folder: where the scene goes.
        pictures: path of each picture in there, with a place for its number.

    Returns:
        The path of each picture in the folder, and its camera-to-world matrix [4, 4] in OpenGL's axes.
    """
    capture, views = write_capture(folder / "capture", COUNT), []
    for number, frame in enumerate(json.loads((capture / "transforms.json").read_text())["frames"]):
        path = pictures.format(number)
        (capture / frame["file_path"]).rename(with_folder(folder / path))
        views.append((path, np.array(frame["transform_matrix"], dtype=np.float32)))
    return views


def write_json(path: Path, content: dict | list) -> None:
    with_folder(path).write_text(json.dumps(content))


def nerfstudio_data(folder: Path) -> int:
    """Write a scene, and return how many of its images are for training, as all of the following do."""
    write_capture(folder, COUNT)
    return 9


def instant_ngp_data(folder: Path) -> int:
    write_capture(folder, COUNT, w=WIDTH, h=HEIGHT, fl_x=FOCAL, fl_y=FOCAL, aabb_scale=4)
    return 8


def blender_data(folder: Path) -> int:
    write_scene(folder, num_train=COUNT, num_eval=NUM_EVAL, size=24)
    return COUNT


def dnerf_data(folder: Path) -> int:
    blender_data(folder)
    for listing in folder.glob("transforms_*.json"):
        content = json.loads(listing.read_text())
        for number, frame in enumerate(content["frames"]):
            frame["time"] = number / COUNT
        write_json(listing, content)
    return COUNT


def minimal_parser(folder: Path) -> int:
    views = write_views(folder, "images/{}.png")
    for split, part in {"train": views[NUM_EVAL:], "val": views[:NUM_EVAL]}.items():
        cameras = {"fx": FOCAL, "fy": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2, "height": HEIGHT, "width": WIDTH}
        cameras = {name: np.full((len(part), 1), value, np.float32) for name, value in cameras.items()}
        for name in ("height", "width"):
            cameras[name] = cameras[name].astype(np.int64)
        cameras["camera_type"] = np.full((len(part), 1), CameraType.PERSPECTIVE.value)
        cameras["camera_to_worlds"] = np.stack([pose for _, pose in part])
        names, box = np.array([name for name, _ in part]), np.array([[-1.0] * 3, [1.0] * 3], np.float32)
        np.savez(folder / f"{split}.npz", image_filenames=names, scene_box=box, cameras=np.array(cameras))
    return COUNT - NUM_EVAL


def write_colmap(folder: Path, pictures: str, model: str, ext: str) -> None:
    """Write a reconstruction of COLMAP's, in which each image has its own camera."""
    cameras, images, centre = {}, {}, np.zeros(3)
    for number, (path, pose) in enumerate(write_views(folder, pictures), start=1):
        to_camera = np.linalg.inv(pose @ OPENCV)
        rotation, none = colmap.rotmat2qvec(to_camera[:3, :3]), np.zeros(0)
        parameters = np.array([FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2])
        cameras[number] = colmap.Camera(number, "PINHOLE", WIDTH, HEIGHT, parameters)
        name = Path(path).name
        images[number] = colmap.Image(number, rotation, to_camera[:3, 3], number, name, none.reshape(0, 2), none)
    seen_by, colour = np.array([1, 2]), np.array([255, 0, 0])
    points = {1: colmap.Point3D(1, centre, colour, 0.5, seen_by, np.array([0, 0]))}
    (folder / model).mkdir(parents=True)
    colmap.write_model(cameras, images, points, folder / model, ext)


def colmap_text(folder: Path) -> int:
    write_colmap(folder, "images/{:03}.png", "colmap/sparse/0", ".txt")
    return 8


def colmap_binary(folder: Path) -> int:
    write_colmap(folder, "images/{:03}.png", "colmap/sparse/0", ".bin")
    return 8


def phototourism_data(folder: Path) -> int:
    write_colmap(folder, "dense/images/{:03}.png", "dense/sparse", ".bin")
    return 9


def scannet_data(folder: Path) -> int:
    for number, (_, pose) in enumerate(write_views(folder, "color/{}.png")):
        np.savetxt(with_folder(folder / f"pose/{number}.txt"), pose @ OPENCV)
        cv2.imwrite(str(with_folder(folder / f"depth/{number}.png")), np.full((HEIGHT, WIDTH), 3000, np.uint16))
    np.savetxt(with_folder(folder / "intrinsic/intrinsic_color.txt"), INTRINSICS)
    kinds = ("float x", "float y", "float z", "uchar red", "uchar green", "uchar blue")
    properties = "".join(f"property {kind}\n" for kind in kinds)
    header = f"ply\nformat ascii 1.0\nelement vertex 1\n{properties}end_header\n"
    (folder / "scene.ply").write_text(f"{header}0 0 0 255 0 0\n")
    return 9


def scannetpp_data(folder: Path) -> int:
    frames = [
        {"file_path": Path(path).name, "transform_matrix": pose.tolist()}
        for path, pose in write_views(folder, "dslr/resized_images/{:03}.png")
    ]
    camera = {"w": WIDTH, "h": HEIGHT, "fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2}
    splits = {"frames": frames[NUM_EVAL:], "test_frames": frames[:NUM_EVAL]}
    write_json(folder / "dslr/nerfstudio/transforms.json", {"camera_model": "PINHOLE", **camera, **splits})
    return COUNT - NUM_EVAL


def sdfstudio_data(folder: Path, mono_prior: bool = False) -> int:
    frames = []
    for number, (path, pose) in enumerate(write_views(folder, "{:06}_rgb.png")):
        frame = {"rgb_path": path, "camtoworld": (pose @ OPENCV).tolist(), "intrinsics": INTRINSICS.tolist()}
        if mono_prior:
            frame |= {"mono_depth_path": f"{number:06}_depth.npy", "mono_normal_path": f"{number:06}_normal.npy"}
            noise = np.random.default_rng(number).random((4, HEIGHT, WIDTH), np.float32)
            np.save(folder / frame["mono_depth_path"], noise[0])
            np.save(folder / frame["mono_normal_path"], noise[1:])
        frames.append(frame)
    box = {"aabb": [[-1, -1, -1], [1, 1, 1]]}
    meta = {"height": HEIGHT, "width": WIDTH, "has_mono_prior": mono_prior, "scene_box": box, "frames": frames}
    write_json(folder / "meta_data.json", meta)
    return COUNT


def nerfosr_data(folder: Path) -> int:
    final = folder / "stjacob/final"
    for number, (path, pose) in enumerate(write_views(folder, "pictures/{:03}.png")):
        split = {0: "validation", 1: "test"}.get(number, "train")
        (folder / path).rename(with_folder(final / split / "rgb" / f"{number:03}.png"))
        for kind, matrix in {"pose": pose @ OPENCV, "intrinsics": INTRINSICS}.items():
            np.savetxt(with_folder(final / split / kind / f"{number:03}.txt"), matrix)
    return COUNT - 2


def dycheck_data(folder: Path) -> int:
    names = [f"0_{number:05}" for number in range(COUNT)]
    for name, (_, pose) in zip(names, write_views(folder, "rgb/1x/0_{:05}.png"), strict=True):
        pose = pose @ OPENCV
        camera = {"orientation": pose[:3, :3].T.tolist(), "position": pose[:3, 3].tolist(), "focal_length": FOCAL}
        camera |= {"principal_point": [WIDTH / 2, HEIGHT / 2], "image_size": [WIDTH, HEIGHT]}
        write_json(folder / f"camera/{name}.json", camera | {"pixel_aspect_ratio": 1.0})
        np.save(with_folder(folder / f"depth/1x/{name}.npy"), np.full((HEIGHT, WIDTH, 1), 3.0, np.float32))
    write_json(folder / "scene.json", {"center": [0.0, 0.0, 0.0], "scale": 0.1, "near": 1.0, "far": 6.0})
    write_json(folder / "dataset.json", {"ids": names})
    write_json(folder / "metadata.json", {name: {"warp_id": i, "camera_id": 0} for i, name in enumerate(names)})
    box = [[-1.0] * 3, [1.0] * 3]
    write_json(folder / "extra.json", {"factor": 1, "fps": 30, "bbox": box, "lookat": [0.0] * 3, "up": [0.0, 1.0, 0.0]})
    write_json(folder / "splits/train.json", {"frame_names": names, "time_ids": list(range(COUNT))})
    return COUNT


def arkit_data(folder: Path) -> int:
    frames, trajectory = folder / f"{folder.name}_frames", []
    views = write_views(folder, f"{folder.name}_frames/lowres_wide/{folder.name}_{{}}.000.png")
    for number, (path, pose) in enumerate(views):
        to_camera, name = np.linalg.inv(pose @ OPENCV), Path(path).stem
        axis_angle, _ = cv2.Rodrigues(to_camera[:3, :3])
        trajectory.append([number, *axis_angle[:, 0], *to_camera[:3, 3]])
        camera = [[WIDTH, HEIGHT, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2]]
        np.savetxt(with_folder(frames / "lowres_wide_intrinsics" / f"{name}.pincam"), camera)
        depth = str(with_folder(frames / "lowres_depth" / f"{name}.png"))
        cv2.imwrite(depth, np.full((HEIGHT, WIDTH), 3000, np.uint16))
    np.savetxt(frames / "lowres_wide.traj", trajectory)
    return 9


def sitcoms3d_data(folder: Path) -> int:
    full_size = (INTRINSICS * [[4], [4], [1], [1]]).tolist()  # the images are those that are 4 times smaller
    frames = [
        {"image_name": Path(path).name, "intrinsics": full_size, "camtoworld": pose.tolist()}
        for path, pose in write_views(folder, "images_4/{:03}.png")
    ]
    write_json(folder / "cameras.json", {"frames": frames, "bbox": [[-2.0, -2.0, 2.0], [2.0, 2.0, -2.0]]})
    write_json(folder / "panoptic_classes.json", {"thing": ["person"], "thing_colors": [[255, 0, 0]]})
    return COUNT


def nuscenes_data(folder: Path) -> int:
    """Write the tables of a drive past one camera, its pictures of the only size that the format has, and masks."""
    size = (1600, 900)
    tables: dict[str, list[dict]] = {
        "log": [{"token": "log"}],
        "map": [{"token": "map", "log_tokens": ["log"], "filename": "maps/map.png"}],
        "scene": [{"token": "scene", "name": "scene-0001"}],
        "sensor": [{"token": "sensor", "channel": "CAM_FRONT", "modality": "camera"}],
    }
    picture = np.full((8, 8), 255, np.uint8)
    cv2.imwrite(str(with_folder(folder / "maps/map.png")), picture)
    camera = [[1200.0, 0.0, size[0] / 2], [0.0, 1200.0, size[1] / 2], [0.0, 0.0, 1.0]]
    still = {"translation": [0.0, 0.0, 0.0], "rotation": [1.0, 0.0, 0.0, 0.0]}
    tables["calibrated_sensor"] = [{"token": "camera", "sensor_token": "sensor", "camera_intrinsic": camera, **still}]
    for number, (path, pose) in enumerate(write_views(folder, "samples/CAM_FRONT/{}.jpg")):
        pixels = cv2.imread(str(folder / path))
        cv2.imwrite(str(folder / path), cv2.resize(pixels, size))
        mask = with_folder(folder / "masks/CAM_FRONT" / f"{Path(path).stem}.png")
        cv2.imwrite(str(mask), cv2.resize(picture, size))
        token = f"{number}"
        x, y, z, w = Rotation.from_matrix((pose @ OPENCV)[:3, :3]).as_quat()
        place = {"translation": pose[:3, 3].tolist(), "rotation": [w, x, y, z]}
        data = {"sample_token": token, "calibrated_sensor_token": "camera", "ego_pose_token": token, "filename": path}
        tables.setdefault("sample", []).append({"token": token, "scene_token": "scene", "timestamp": number})
        tables.setdefault("ego_pose", []).append({"token": token, **place})
        tables.setdefault("sample_data", []).append({"token": token, "is_key_frame": True, **data})
    for name in ("category", "attribute", "visibility", "instance", "sample_annotation"):
        tables[name] = []
    for name, table in tables.items():
        write_json(folder / "v1.0-mini" / f"{name}.json", table)
    return 9


def distance_of_the_seen_point(poses: torch.Tensor) -> float:
    """Return how far in front of cameras [cameras, 3, 4] on a circle the point is that all of them look at."""
    place, direction = poses[:, :, 3], -poses[:, :, 2]
    place, direction = place - place.mean(dim=0), direction - direction.mean(dim=0)
    distance = -float((place * direction).sum() / direction.square().sum())
    torch.testing.assert_close(place, -distance * direction, rtol=0, atol=1e-4)
    return distance


def check(
    folder: Path, parser: str, num_images: int, method: str = "nerfacto-lite", scale: float = 1.0, **settings
) -> list[dict]:
    """Train on a scene and evaluate a view of it; return the losses of each step."""
    config = deepcopy(all_methods[f"softmining-{method}"]).pipeline
    config.datamanager.dataparser = deepcopy(all_dataparsers[parser])
    for name, value in settings.items():
        setattr(config.datamanager.dataparser, name, value)
    config.datamanager.data = folder
    config.datamanager.train_num_rays_per_batch = RAYS
    config.datamanager.camera_res_scale_factor = scale
    for name, value in SMALL[method].items():
        setattr(config.model, name, value)
    if hasattr(config.model, "sdf_field"):
        sdf = config.model.sdf_field
        sdf.log2_hashmap_size, sdf.num_levels, sdf.hidden_dim, sdf.num_layers = 10, 4, 80, 2
    random.seed(0)
    torch.manual_seed(0)
    pipeline: VanillaPipeline = config.setup(device="cpu")
    manager = pipeline.datamanager
    assert isinstance(manager.dataparser, all_dataparsers[parser]._target)
    assert len(manager.train_dataset) == num_images
    cameras = manager.train_dataset.cameras
    assert distance_of_the_seen_point(cameras.camera_to_worlds) > 0

    found = train(pipeline)
    assert all(loss.isfinite() for losses in found for loss in losses.values())
    image, row, column = manager.last_batch.indices.T
    assert len(image) == RAYS
    assert len(image.unique()) > 1
    assert image.min() >= 0 and image.max() < num_images
    for place, size in ((row, cameras.height), (column, cameras.width)):
        assert (place >= 0).all() and (place < size[image, 0]).all()
    assert manager.last_batch.num_chains > 0

    pipeline.eval()
    metrics, _ = pipeline.get_eval_image_metrics_and_images(STEPS)
    assert math.isfinite(metrics["psnr"])
    return found


@pytest.mark.parametrize(
    "parser, write",
    [
        ("nerfstudio-data", nerfstudio_data),
        ("colmap", colmap_text),
        ("colmap", colmap_binary),
        ("blender-data", blender_data),
        ("instant-ngp-data", instant_ngp_data),
        ("minimal-parser", minimal_parser),
        ("dnerf-data", dnerf_data),
        ("scannet-data", scannet_data),
        ("scannetpp-data", scannetpp_data),
        ("sdfstudio-data", sdfstudio_data),
        ("phototourism-data", phototourism_data),
        ("nerfosr-data", nerfosr_data),
        ("dycheck-data", dycheck_data),
        ("arkit-data", arkit_data),
        ("sitcoms3d-data", sitcoms3d_data),
    ],
)
def test_trains_on_a_scene_of_every_format(tmp_path, parser, write):
    folder = tmp_path / "scene"
    settings = {
        "scannet-data": {"ply_file_path": folder / "scene.ply"},
        "instant-ngp-data": {"train_split_fraction": 0.8},  # nerfstudio 1.1.5 fails on a single held-out image
    }
    check(folder, parser, write(folder), **settings.get(parser, {}))


def test_trains_on_a_scene_of_nuscenes(tmp_path):
    """Its data is the name of a scene, and the folder is a setting of its own."""
    num_images = nuscenes_data(tmp_path)
    check(Path("scene-0001"), "nuscenes-data", num_images, scale=1 / 50, data_dir=tmp_path, mask_dir=tmp_path)


@pytest.mark.parametrize(
    "method, loss",
    [
        ("nerfacto-lite", "rgb_loss"),
        ("neus-facto", "normal_loss"),
        ("neus-facto", "depth_loss"),
    ],
)
def test_trains_with_monocular_depths_and_normals(tmp_path, method, loss):
    num_images = sdfstudio_data(tmp_path / "scene", mono_prior=True)
    found = check(tmp_path / "scene", "sdfstudio-data", num_images, method, include_mono_prior=True)
    assert all(loss in losses for losses in found)
