"""A file that is missing or cannot be read is named, with the file that lists it."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from captures import write_capture
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.depth_dataset import DepthDataset
from nerfstudio.engine.callbacks import TrainingCallbackAttributes

from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import methods
from nerfstudio_softmining.plugin.dataset import NamesBrokenFiles


class DepthImages(NamesBrokenFiles, DepthDataset):
    """Images with depth maps."""


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def turn_into_text(file: Path) -> None:
    file.write_text("not an image")


def dataset(folder: Path, kind: type[NamesBrokenFiles] = NamesBrokenFiles) -> NamesBrokenFiles:
    config = NerfstudioDataParserConfig(data=folder, eval_mode="all", downscale_factor=1)
    return kind(config.setup().get_dataparser_outputs("train"))


@pytest.mark.parametrize("image_type", ["uint8", "float32"])
@pytest.mark.parametrize("breaks", [remove, truncate, empty, turn_into_text])
@pytest.mark.parametrize("kind", ["image", "mask", "depth map"])
def test_the_broken_file_and_its_list_are_named(tmp_path, kind, breaks, image_type):
    write_capture(tmp_path, masks=True, depths=True)
    images = dataset(tmp_path, DepthImages)
    images.get_data(3, image_type)
    file = tmp_path / {"image": "images", "mask": "masks", "depth map": "depths"}[kind] / "003.png"
    breaks(file)
    with pytest.raises(UserError) as error:
        images.get_data(3, image_type)
    assert f"the {kind} {file}, listed in {tmp_path / 'transforms.json'}" in str(error.value)
    images.get_data(2, image_type)


def test_a_mask_of_another_size_is_named_with_its_image(tmp_path):
    write_capture(tmp_path, masks=True)
    write_capture(tmp_path / "other", masks=True, mixed_sizes=True)
    mask = tmp_path / "masks" / "001.png"
    mask.write_bytes((tmp_path / "other" / "masks" / "001.png").read_bytes())
    with pytest.raises(UserError) as error:
        dataset(tmp_path).get_data(1)
    assert str(mask) in str(error.value) and str(tmp_path / "images" / "001.png") in str(error.value)


def test_of_several_lists_the_one_that_has_the_file_is_named(tmp_path):
    write_scene(tmp_path, num_train=2, num_eval=1, size=8)
    outputs = BlenderDataParserConfig(data=tmp_path).setup().get_dataparser_outputs("train")
    outputs.image_filenames[1].unlink()
    with pytest.raises(UserError, match=r"listed in .*transforms_train\.json"):
        NamesBrokenFiles(outputs).get_data(1)


def test_a_list_of_colmap_is_found(tmp_path):
    write_capture(tmp_path)
    images = dataset(tmp_path)
    (tmp_path / "transforms.json").unlink()
    (tmp_path / "sparse" / "0").mkdir(parents=True)
    (tmp_path / "sparse" / "0" / "images.bin").write_bytes(b"\x01\x00" + b"000.png\x00\x03\x00" + b"004.png\x00")
    remove(tmp_path / "images" / "004.png")
    with pytest.raises(UserError, match=r"listed in .*images\.bin"):
        images.get_data(4)


@pytest.mark.parametrize(("listing", "reason"), [("{", "JSONDecodeError"), ('{"frames": [{}]}', "KeyError")])
def test_a_list_that_cannot_be_read_ends_with_a_message(tmp_path, listing, reason):
    write_capture(tmp_path)
    (tmp_path / "transforms.json").write_text(listing)
    config = deepcopy(methods.softmining_nerfacto_lite.config).pipeline.datamanager
    config.data = tmp_path
    with pytest.raises(UserError) as error:
        config.setup(device="cpu")
    assert str(tmp_path) in str(error.value) and reason in str(error.value)


def test_training_ends_with_the_name_of_the_missing_image(tmp_path):
    write_capture(tmp_path)
    frames = json.loads((tmp_path / "transforms.json").read_text())["frames"]
    missing = tmp_path / frames[1]["file_path"]
    missing.unlink()
    program = Path(sys.executable).with_name("ns-train")
    done = subprocess.run(
        [program, "softmining-nerfacto-lite", "--data", tmp_path, "--max-num-iterations", "2", "--vis", "tensorboard"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert f"the image {missing}, listed in {tmp_path / 'transforms.json'}, does not exist" in done.stderr


def test_a_split_without_images_is_named_when_it_is_needed(tmp_path):
    config = deepcopy(methods.softmining_nerfacto_lite.config).pipeline
    config.datamanager.data = write_capture(tmp_path, num_images=2)
    pipeline = config.setup(device="cpu")
    pipeline.get_training_callbacks(TrainingCallbackAttributes(None, None, pipeline, None))
    with pytest.raises(UserError, match="0 held-out images.*eval-mode"):
        pipeline.get_eval_loss_dict(0)


def test_each_data_set_has_its_own_list_of_what_stays_on_the_host(tmp_path):
    """nerfstudio's datamanager removes entries from the list, which is an attribute of the class."""
    before = list(NamesBrokenFiles.exclude_batch_keys_from_device)
    dataset(write_capture(tmp_path)).exclude_batch_keys_from_device.remove("image")
    assert NamesBrokenFiles.exclude_batch_keys_from_device == before == ["image", "mask"]


def test_colours_of_bytes_are_those_of_floats(tmp_path):
    images = dataset(write_capture(tmp_path))
    assert torch.equal(images.get_data(0, "uint8")["image"].float() / 255, images.get_data(0)["image"])
