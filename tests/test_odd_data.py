"""Odd images, masks, cameras and depth maps: they are trained on, or a message names what to mend."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from captures import STEPS, train, write_capture
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.model_components.losses import DepthLossType
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from nerfstudio_softmining.bench.training import metrics_within_mask
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.samplers.registry import samplers

NAN, INF = math.nan, math.inf
SMALL = {"log2_hashmap_size": 10, "num_nerf_samples_per_ray": 8}
AT_ONE_PLACE = {"auto_scale_poses": False}
"""Settings of the dataparser for cameras at one place."""
MAPPED = pytest.mark.parametrize("kind", ["mixture", "detail", "langevin", "edge", "error-map", "quadtree"])
"""Kinds that do not evaluate the model in every cell, which takes hours for large images."""
EACH_KIND = pytest.mark.parametrize("kind", samplers(scenes=True))


def build(
    folder: Path, kind: str = "mixture", rays: int = 64, method: str = "nerfacto-lite", **settings
) -> VanillaPipeline:
    """Make the pipeline of a method on a capture; the settings are those of the dataparser."""
    config = deepcopy(all_methods[f"softmining-{method}"]).pipeline
    manager = config.datamanager
    manager.data, manager.dataparser = folder, deepcopy(all_dataparsers["nerfstudio-data"])
    manager.train_num_rays_per_batch = manager.eval_num_rays_per_batch = rays
    manager.pixel_sampler.kind = kind
    for name, value in {"eval_mode": "all", "downscale_factor": 1, **settings}.items():
        setattr(manager.dataparser, name, value)
    samples = {"num_proposal_samples_per_ray": (8,) * config.model.num_proposal_iterations}
    for name, value in (SMALL | samples).items():
        setattr(config.model, name, value)
    random.seed(0)
    torch.manual_seed(0)
    return config.setup(device="cpu")


def check_training(pipeline: VanillaPipeline, renders: bool = True) -> None:
    """Train and evaluate; check the losses, the weights and where the rays are.

    Args:
        pipeline: what is trained.
        renders: whether a whole image is rendered, too.
    """
    manager = pipeline.datamanager
    for losses in train(pipeline):
        assert all(loss.isfinite() for loss in losses.values())
    batch = manager.last_batch
    assert batch.weights is None or batch.weights.isfinite().all()
    assert batch.importance.isfinite().all() and batch.error.isfinite().all()
    assert_valid(manager.train_dataset, batch.indices)
    pipeline.eval()
    for step in range(STEPS):
        _, losses, _ = pipeline.get_eval_loss_dict(step)
        assert all(loss.isfinite() for loss in losses.values())
    assert_valid(manager.eval_dataset, manager.next_eval(0)[1]["indices"])
    if renders:
        metrics, _ = pipeline.get_eval_image_metrics_and_images(STEPS)
        assert math.isfinite(metrics["psnr"])


def assert_valid(images: InputDataset, indices: torch.Tensor) -> None:
    """Check that each pixel (image, row, column) is on its image and not masked."""
    for number in indices[:, 0].unique().tolist():
        data = images.get_data(number, "uint8")
        row, column = indices[indices[:, 0] == number, 1:].T
        assert (row >= 0).all() and (column >= 0).all()
        assert data.get("mask", torch.ones(*data["image"].shape[:2], 1))[row, column].all()


def change_frames(folder: Path, change: Callable[[int, dict], None]) -> Path:
    """Change the frames of a capture's list."""
    listing = folder / "transforms.json"
    content = json.loads(listing.read_text())
    for number, frame in enumerate(content["frames"]):
        change(number, frame)
    listing.write_text(json.dumps(content))
    return folder


def of_sizes(*sizes: tuple[int, int]) -> Callable[[Path], None]:
    """Return what writes a capture of images with the given heights and widths."""

    def write(folder: Path) -> None:
        noise = np.random.default_rng(0)

        def resize(number: int, frame: dict) -> None:
            height, width = sizes[number]
            pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / frame["file_path"], compress_level=1)
            frame.update(w=width, h=height, cx=width / 2, cy=height / 2, fl_x=float(width), fl_y=float(width))

        change_frames(write_capture(folder, len(sizes)), resize)

    return write


def masked(mixed_sizes: bool, num_valid: Callable[[int], int]) -> Callable[[Path], None]:
    """Return what writes a capture whose masks are valid in so many pixels."""

    def write(folder: Path) -> None:
        def mask(number: int, frame: dict) -> None:
            pixels = np.zeros(frame["h"] * frame["w"], dtype=np.uint8)
            pixels[37 : 37 + num_valid(number)] = 255
            Image.fromarray(pixels.reshape(frame["h"], frame["w"])).save(folder / frame["mask_path"])

        change_frames(write_capture(folder, 3, mixed_sizes, masks=True), mask)

    return write


def with_alpha(alpha: int, which: set[int]) -> Callable[[Path], None]:
    """Return what writes a capture some of whose images have an alpha channel."""

    def write(folder: Path) -> None:
        for number in which & set(range(len(list((write_capture(folder, 3) / "images").iterdir())))):
            file = folder / f"images/{number:03}.png"
            image = Image.open(file).convert("RGBA")
            image.putalpha(alpha)
            image.save(file)

    return write


def same_pose(*which: int) -> Callable[[Path], None]:
    """Return what writes a capture in which some cameras have the pose of the first."""

    def write(folder: Path) -> None:
        first: list = []

        def move(number: int, frame: dict) -> None:
            first.append(frame["transform_matrix"])
            if number in which:
                frame["transform_matrix"] = first[0]

        change_frames(write_capture(folder, 3), move)

    return write


def grey(folder: Path) -> None:
    file = write_capture(folder, 3) / "images/001.png"
    Image.open(file).convert("L").save(file)


def one_colour(folder: Path) -> None:
    for file in (write_capture(folder, 3) / "images").iterdir():
        Image.new("RGB", Image.open(file).size, (128, 128, 128)).save(file)


CAPTURES: dict[str, tuple[Callable[[Path], object], dict]] = {
    "one image": (lambda folder: write_capture(folder, 1), AT_ONE_PLACE),
    "one image of one pixel": (of_sizes((1, 1)), AT_ONE_PLACE),
    "one pixel each": (of_sizes((1, 1), (1, 1), (1, 1)), {}),
    "one pixel wide": (of_sizes((9, 1), (9, 1), (9, 1)), {}),
    "one pixel wide or high": (of_sizes((9, 1), (1, 9), (1, 1)), {}),
    "sizes from 10 to 60": (of_sizes((10, 10), (50, 60), (10, 11)), {}),
    "empty masks": (masked(False, lambda number: 90 * number), {}),
    "empty masks, mixed sizes": (masked(True, lambda number: 90 * number), {}),
    "masks of one valid pixel": (masked(False, lambda number: 1), {}),
    "masks of one valid pixel, mixed sizes": (masked(True, lambda number: 1), {}),
    "all transparent": (with_alpha(0, {0, 1, 2}), {}),
    "one transparent, others RGB": (with_alpha(0, {1}), {}),
    "one grey": (grey, {}),
    "all of one colour": (one_colour, {}),
    "two cameras alike": (same_pose(0, 1), {}),
    "all cameras alike": (same_pose(0, 1, 2), AT_ONE_PLACE),
}


@EACH_KIND
@pytest.mark.parametrize("name", CAPTURES)
def test_odd_captures_are_trained_on(tmp_path, name, kind):
    write, settings = CAPTURES[name]
    write(tmp_path)
    check_training(build(tmp_path, kind, **settings))


@pytest.mark.parametrize("alpha", [False, True])
def test_held_out_views_are_measured_within_their_masks(tmp_path, alpha):
    write_capture(tmp_path, 3, masks=True)
    for file in (tmp_path / "images").iterdir() if alpha else ():
        image = Image.open(file).convert("RGBA")
        image.putalpha(128)
        image.save(file)
    pipeline = build(tmp_path).eval()
    camera, batch = pipeline.datamanager.fixed_indices_eval_dataloader.get_camera(1)
    outputs = pipeline.model.get_outputs_for_camera(camera)
    metrics, images = metrics_within_mask(pipeline.model, outputs, batch)

    truth = pipeline.model.renderer_rgb.blend_background(batch["image"])
    valid = batch["mask"].squeeze(-1)
    assert 0 < valid.float().mean() < 1
    squared = (outputs["rgb"] - truth)[valid].square().mean()
    assert metrics["psnr"] == pytest.approx(-10 * float(squared.log10()), abs=1e-3)
    assert images["img"][:, : camera.width][valid].allclose(truth[valid])
    assert not images["img"].unflatten(1, (2, -1)).movedim(1, 0)[:, ~valid].any()

    elsewhere = {**outputs, "rgb": torch.where(batch["mask"], outputs["rgb"], torch.rand_like(outputs["rgb"]))}
    assert metrics_within_mask(pipeline.model, elsewhere, batch)[0] == metrics
    perfect = {**outputs, "rgb": torch.where(batch["mask"], truth, 1 - truth)}
    assert metrics_within_mask(pipeline.model, perfect, batch)[0]["ssim"] == pytest.approx(1)
    nowhere = {**batch, "mask": torch.zeros_like(batch["mask"])}
    assert math.isnan(metrics_within_mask(pipeline.model, outputs, nowhere)[0]["psnr"])


@pytest.mark.parametrize("kind", ["mixture", "uniform"])
@pytest.mark.parametrize("name", ["one pixel each", "sizes from 10 to 60", "empty masks, mixed sizes"])
def test_any_number_of_rays_is_trained_on(tmp_path, name, kind):
    write, settings = CAPTURES[name]
    write(tmp_path)
    for rays in (7, 301):
        check_training(build(tmp_path, kind, rays, **settings))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A capture of tiny images and a huge one."""
    folder = tmp_path_factory.mktemp("large")
    of_sizes((10, 10), (6000, 8000), (12, 10))(folder)
    return folder


@pytest.mark.slow
@MAPPED
def test_sizes_from_10_to_8000_are_trained_on(large, kind):
    check_training(build(large, kind), renders=False)


class CountedOperations(TorchDispatchMode):
    """Counts what torch does within it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module", params=[False, True], ids=["one size", "mixed sizes"])
def few_and_many(request, tmp_path_factory) -> list[Path]:
    """Captures of 100 and of 10,000 tiny images."""
    folders = []
    for num_images in (100, 10_000):
        folders.append(tmp_path_factory.mktemp("tiny"))
        of_sizes(*((8, 8 + request.param * (number % 2)) for number in range(num_images)))(folders[-1])
    return folders


@pytest.mark.slow
@MAPPED
def test_a_step_does_as_much_for_10_000_images_as_for_100(few_and_many, kind):
    counts = []
    for folder in few_and_many:
        pipeline = build(folder, kind)
        check_training(pipeline)
        pipeline.train()
        with CountedOperations() as operations:
            pipeline.datamanager.next_train(STEPS)
        counts.append(operations.count)
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------------- masks and colours


@EACH_KIND
@pytest.mark.parametrize("mixed_sizes", [False, True])
def test_masks_that_are_all_empty_are_named(tmp_path, kind, mixed_sizes):
    masked(mixed_sizes, lambda number: 0)(tmp_path)
    with pytest.raises(UserError, match="ignore-mask is False: the masks of all 3 cached images are empty"):
        train(build(tmp_path, kind))


def test_a_mask_of_another_size_is_named(tmp_path):
    masked(False, lambda number: 9)(tmp_path)
    Image.new("L", (7, 7), 255).save(tmp_path / "masks/001.png")
    with pytest.raises(UserError) as error:
        train(build(tmp_path))
    assert str(tmp_path / "masks/001.png") in str(error.value) and str(tmp_path / "images/001.png") in str(error.value)


@pytest.mark.parametrize(("colours", "is_fine"), [([0, 0, 0, 255, 255, 255], True), ([255, 255, 255, 0, 0, 0], False)])
def test_a_mask_with_a_palette_counts_as_it_looks_or_is_named(tmp_path, colours, is_fine):
    masked(False, lambda number: 9)(tmp_path)
    mask = Image.fromarray(np.tile(np.array([[0, 1]], dtype=np.uint8), (24, 16)), "P")
    mask.putpalette(colours)
    mask.save(tmp_path / "masks/001.png")
    if is_fine:
        check_training(build(tmp_path))
        return
    with pytest.raises(UserError) as error:
        train(build(tmp_path))
    assert f"the mask {tmp_path / 'masks/001.png'}, listed in {tmp_path / 'transforms.json'}" in str(error.value)


def stock_images(folder: Path) -> InputDataset:
    """Return nerfstudio's own data set of a capture."""
    config = NerfstudioDataParserConfig(data=folder, eval_mode="all", downscale_factor=1)
    return InputDataset(config.setup().get_dataparser_outputs("train"))


def write_colours(folder: Path, kind: str) -> Path:
    """Write a capture whose middle image has pixels of some kind, and return its file."""
    file, noise = write_capture(folder, 3) / "images/001.png", np.random.default_rng(1)
    if kind == "RGB of 16 bit":
        cv2.imwrite(str(file), noise.integers(0, 1 << 16, (24, 32, 3), dtype=np.uint16))
    elif kind == "I;16":
        Image.fromarray(noise.integers(0, 1 << 16, (24, 32), dtype=np.uint16)).save(file)
    elif kind == "CMYK":  # PNG has none, and PIL goes by the content, not the name
        Image.open(file).convert(kind).save(file, "TIFF")
    else:
        Image.open(file).convert(kind).save(file)
    return file


@pytest.mark.parametrize("kind", ["mixture", "uniform"])
@pytest.mark.parametrize("colours", ["RGB", "RGBA", "L", "RGB of 16 bit"])
def test_colours_that_nerfstudio_reads_are_its_own(tmp_path, colours, kind):
    file = write_colours(tmp_path, colours)
    theirs = stock_images(tmp_path)
    pipeline = build(tmp_path, kind, rays=300)
    _, batch = pipeline.datamanager.next_train(0)
    image, row, column = batch["indices"].T
    assert (image == 1).any()
    for number in range(3):
        drawn, truth = batch["image"][image == number], theirs[number]["image"][row, column][image == number]
        torch.testing.assert_close(drawn[:, :3], truth[:, :3], rtol=0, atol=0)
    with Image.open(file) as picture:
        np.testing.assert_allclose(theirs[1]["image"][..., :3] * 255, np.array(picture.convert("RGB")), atol=1e-3)


@pytest.mark.parametrize("colours", ["P", "1", "LA", "CMYK", "I;16"])
def test_colours_that_nerfstudio_misreads_are_named(tmp_path, colours):
    file = write_colours(tmp_path, colours)
    with pytest.raises(UserError) as error:
        train(build(tmp_path))
    message = str(error.value)
    assert f"the image {file}, listed in {tmp_path / 'transforms.json'}" in message
    assert "Convert it to grey, RGB or RGBA of 8 bit" in message
    try:
        theirs = stock_images(tmp_path).get_numpy_image(1)
    except AssertionError:
        return
    with Image.open(file) as picture:
        right = (np.array(picture) >> 8)[..., None] if colours == "I;16" else np.array(picture.convert("RGB"))
    assert np.abs(theirs[..., :3].astype(int) - right).mean() > 20


def test_an_image_that_is_not_of_its_cameras_size_is_named(tmp_path):
    change_frames(write_capture(tmp_path, 3), lambda number, frame: frame.update(w=frame["w"] // (1 + number % 2)))
    with pytest.raises(UserError) as error:
        train(build(tmp_path))
    assert f"the image {tmp_path / 'images/001.png'}, listed in {tmp_path / 'transforms.json'}" in str(error.value)
    assert "has 24 x 32 pixels (height x width), and its camera 24 x 16" in str(error.value)


@pytest.mark.parametrize("masks", [False, True])
def test_images_that_are_rounded_up_lose_the_rows_and_columns_that_their_cameras_have_not(tmp_path, masks):
    write_capture(tmp_path, 3, masks=masks)
    change_frames(tmp_path, lambda number, frame: frame.update(h=frame["h"] - number // 2, w=frame["w"] - number % 2))
    pipeline = build(tmp_path)
    check_training(pipeline)
    for number, (height, width) in enumerate(((24, 32), (24, 31), (23, 32))):
        data = pipeline.datamanager.train_dataset.get_data(number, "uint8")
        whole = np.array(Image.open(tmp_path / f"images/{number:03}.png"))
        assert (data["image"].numpy() == whole[:height, :width]).all()
        assert not masks or data["mask"].shape[:2] == (height, width)


def test_an_image_that_is_smaller_than_its_camera_is_named(tmp_path):
    change_frames(write_capture(tmp_path, 3), lambda number, frame: frame.update(w=frame["w"] + number % 2))
    with pytest.raises(UserError, match="24 x 32 pixels .* its camera 24 x 33.*--downscale-rounding-mode"):
        train(build(tmp_path))


@pytest.mark.parametrize("size", [(1, 1), (6, 40), (10, 11), (11, 11)])
def test_metrics_of_tiny_images_are_left_out_instead_of_failing(size):
    image = torch.rand(1, 3, *size)
    assert compat.ssim(image, image).isnan() == (min(size) < 11)
    assert compat.Lpips(normalize=True)(image, image).isnan()


# ------------------------------------------------------------------------------------------------------------ cameras


def spoil(key: str, value: object) -> Callable[[int, dict], None]:
    """Return what spoils the camera of frame 1."""

    def change(number: int, frame: dict) -> None:
        if number == 1 and key == "transform_matrix":
            frame[key][1][3] = value
        elif number == 1:
            frame[key] = value

    return change


@pytest.mark.parametrize("value", [NAN, INF, -INF, None, 1e39, "NaN"])
@pytest.mark.parametrize("key", ["transform_matrix", "fl_x", "cy", "k1", "w"])
@pytest.mark.parametrize("orientation", ["up", "pca", "vertical", "none"])
def test_cameras_that_are_not_finite_are_named_before_training(tmp_path, key, value, orientation):
    change_frames(write_capture(tmp_path, 4), spoil(key, value))
    with pytest.raises(UserError) as error:
        build(tmp_path, orientation_method=orientation)
    message = str(error.value)
    assert f"{tmp_path / 'transforms.json'} has cameras" in message and f"images/001.png ({key})" in message
    assert "images/000.png" not in message and "remove these frames" in message


@pytest.mark.parametrize("key", ["fl_x", "k1"])
def test_a_number_for_all_cameras_that_is_not_finite_is_named(tmp_path, key):
    with pytest.raises(UserError, match=rf"all frames \({key}\)"):
        build(write_capture(tmp_path, 3, **{key: NAN}))


@pytest.mark.parametrize(("key", "value"), [("fl_x", 0.0), ("transform_matrix", np.zeros((4, 4)).tolist())])
def test_cameras_that_see_nothing_are_named(tmp_path, key, value):
    change_frames(write_capture(tmp_path, 4), lambda number, frame: frame.update({key: value} if number == 1 else {}))
    with pytest.raises(UserError, match=r"images/001\.png") as error:
        build(tmp_path)
    assert str(tmp_path / "transforms.json") in str(error.value)


def shift(folder: Path, place: Callable[[int], float]) -> Path:
    """Write a capture whose cameras are on a diagonal."""

    def move(number: int, frame: dict) -> None:
        for row in frame["transform_matrix"][:3]:
            row[3] = place(number)

    return change_frames(write_capture(folder, 3), move)


@pytest.mark.parametrize("place", [lambda number: 0.0, lambda number: 777.7, lambda number: 1e9 + 10 * number])
def test_cameras_whose_places_cannot_be_told_apart_are_named(tmp_path, place):
    with pytest.raises(UserError, match=f"the cameras of {tmp_path} are .*auto-scale-poses False"):
        build(shift(tmp_path, place))


def test_cameras_far_from_the_origin_are_trained_on(tmp_path):
    check_training(build(shift(tmp_path, lambda number: 1e5 + 10 * number)))


def test_a_single_image_is_trained_on_by_what_the_messages_say(tmp_path):
    write_capture(tmp_path, 1)
    with pytest.raises(UserError, match="--auto-scale-poses False"):
        build(tmp_path, eval_mode="fraction")
    assert len(train(build(tmp_path, eval_mode="fraction", auto_scale_poses=False))) == STEPS


def test_a_scene_without_held_out_images_is_trained_on(tmp_path):
    pipeline = build(write_capture(tmp_path, 3), eval_mode="fraction", train_split_fraction=1.0)
    assert len(pipeline.datamanager.eval_dataset) == 0
    assert len(train(pipeline)) == STEPS


# --------------------------------------------------------------------------------------------------------- depth maps


def write_depths(folder: Path, suffix: str, spoilt: float) -> Path:
    """Write a capture whose depth maps have a spoilt strip."""

    def write(number: int, frame: dict) -> None:
        depth = np.full((frame["h"], frame["w"]), 3.0, np.float32)
        depth[:9] = spoilt
        frame["depth_file_path"] = f"depths/{number:03}{suffix}"
        if suffix == ".npy":
            np.save(folder / frame["depth_file_path"], depth)
        else:
            cv2.imwrite(str(folder / frame["depth_file_path"]), depth)

    return change_frames(write_capture(folder, 3), write)


@pytest.mark.parametrize("loss", [DepthLossType.DS_NERF, DepthLossType.URF])
@pytest.mark.parametrize(("suffix", "spoilt"), [(".npy", NAN), (".npy", -INF), (".tiff", INF)])
def test_spoilt_depths_are_no_depths(tmp_path, suffix, spoilt, loss, capsys):
    found = []
    for name, value in {"spoilt": spoilt, "none": 0.0}.items():
        pipeline = build(write_depths(tmp_path / name, suffix, value), method="depth-nerfacto")
        pipeline.model.config.depth_loss_type = loss
        found.append([{key: float(loss) for key, loss in losses.items()} for losses in train(pipeline)])
    assert found[0] == found[1] and all(math.isfinite(loss) for losses in found[0] for loss in losses.values())
    assert capsys.readouterr().out.count("trained without depth") == 1


def test_a_capture_without_depths_or_with_some_of_another_shape_is_named(tmp_path):
    with pytest.raises(UserError, match="no depth maps"):
        build(write_capture(tmp_path / "without", 3), method="depth-nerfacto")
    folder = write_depths(tmp_path / "shape", ".npy", 1.0)
    np.save(folder / "depths/001.npy", np.ones((3, 24, 32), np.float32))
    with pytest.raises(UserError) as error:
        train(build(folder, method="depth-nerfacto"))
    assert f"the depth map {folder / 'depths/001.npy'}, listed in {folder / 'transforms.json'}" in str(error.value)
