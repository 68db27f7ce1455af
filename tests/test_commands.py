"""nerfstudio's own commands, typed as a user types them, on a tiny scene."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_cases import METHOD, assert_same, flat

from nerfstudio_softmining.demo.scene import CAMERA_ANGLE_X, orbit, render_view, write_scene
from nerfstudio_softmining.plugin import compat

HAS_OPEN3D = subprocess.run([sys.executable, "-c", "import open3d"], capture_output=True).returncode == 0
STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def ffmpeg(tmp_path_factory) -> Iterator[None]:
    """ns-render does not start without ffmpeg on the path."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


def command(*words: object, folder: Path, fails: bool = False) -> str:
    """Run a command of this environment and return what it printed."""
    program, *rest = map(str, words)
    path = Path(sys.executable).with_name(program)
    done = subprocess.run(
        [path, *rest], cwd=folder, capture_output=True, text=True, timeout=400, env={**os.environ, "COLUMNS": "200"}
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output[-5000:]
    return output


def train(
    folder: Path,
    scene: Path,
    name: str,
    steps: int,
    *flags: object,
    method: str = METHOD,
    vis: str = "tensorboard",
    **how,
) -> str:
    """Train for some steps, with evaluations in between, and save at the end."""
    place = ("--data", scene, "--output-dir", folder, "--experiment-name", name, "--timestamp", "run", "--vis", vis)
    length = ("--max-num-iterations", steps, "--steps-per-eval-batch", 4, "--steps-per-eval-image", 5)
    batch = ("--pipeline.datamanager.train-num-rays-per-batch", 256)
    return command("ns-train", method, *place, *length, *batch, *flags, folder=folder, **how)


def checkpoint(folder: Path, name: str, method: str = METHOD) -> dict:
    (path,) = (folder / name / method / "run" / "nerfstudio_models").glob("*.ckpt")
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scene"
    write_scene(folder, num_train=8, num_eval=2, size=32)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(runs: Path, scene: Path) -> Path:
    """The config file of a finished run."""
    train(runs, scene, "whole", STEPS, "--decay-steps", STEPS)
    return runs / "whole" / METHOD / "run" / "config.yml"


def test_metrics_of_soft_mining_are_in_tensorboard(config):
    log = EventAccumulator(str(config.parent))
    log.Reload()
    scalars = {name: log.Scalars(name)[-1].value for name in log.Tags()["scalars"] if name.startswith("Soft Mining/")}
    assert scalars["Soft Mining/chains"] == pytest.approx(0.4, abs=0.01)
    assert 0.2 < scalars["Soft Mining/effective sample size"] <= 1
    assert len(log.Images("Soft Mining/density")) > 1 and log.Histograms("Soft Mining/image of rays")


def test_the_report_of_a_run_is_one_page_that_needs_no_network(config, runs):
    output = runs / "pages" / "report.html"
    printed = command("softmining", "report", config.parent, "--output", output, "--views", 2, folder=runs)
    assert "report.html" in printed
    content = output.read_text()
    assert content.count("class='pair'") == 2 and "PSNR of training rays" in content and "Where rays went" in content
    assert METHOD in content and "mixture" in content
    # the script of the plots holds addresses, but nothing is loaded from any
    assert not re.search(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=[\"']?http", content)
    body = re.sub(r"<script.*?</script>", "", content, flags=re.DOTALL)
    pictures = re.findall(r"data:image/(?:jpeg|png);base64,([^']+)", body)
    assert len(pictures) == 7
    for picture in pictures:
        assert cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), cv2.IMREAD_COLOR) is not None


def test_what_is_no_run_is_named(runs):
    printed = command("softmining", "report", runs / "nothing", folder=runs, fails=True)
    assert "nothing/config.yml does not exist" in printed and "Traceback" not in printed


def test_resuming_goes_on_bit_for_bit(config, runs, scene):
    train(runs, scene, "half", STEPS // 2, "--decay-steps", STEPS)
    first = runs / "half" / METHOD / "run" / "nerfstudio_models"
    train(runs, scene, "resumed", STEPS // 2, "--load-dir", first, "--decay-steps", STEPS)
    whole, resumed = checkpoint(runs, "whole"), checkpoint(runs, "resumed")
    assert any("by_image" in path for path in flat(whole))
    assert_same(whole, resumed)


@pytest.mark.skipif(
    not hasattr(torch.serialization, "add_safe_globals"), reason="torch before 2.4 loads no numpy scalars safely"
)
def test_checkpoint_loads_safely_and_holds_no_lpips(config):
    compat.allow_numpy_scalars_in_checkpoints()
    (path,) = (config.parent / "nerfstudio_models").glob("*.ckpt")
    state = torch.load(path, weights_only=True)["pipeline"]
    assert not [key for key in state if "lpips" in key]


def test_eval_reports_metrics_without_nan(config, runs):
    command("ns-eval", "--load-config", config, "--output-path", runs / "eval.json", folder=runs)
    results = json.loads((runs / "eval.json").read_text())["results"]
    assert {"psnr", "ssim"} <= results.keys()
    assert all(value == value for value in results.values()), results
    assert 3 < results["psnr"] < 60


def test_renders(config, runs, scene):
    frame = {"camera_to_world": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 4, 0, 0, 0, 1], "fov": 40, "aspect": 1}
    path = {
        "render_height": 24,
        "render_width": 24,
        "fps": 1,
        "seconds": 1,
        "camera_path": [frame],
        "camera_type": "perspective",
    }
    (runs / "path.json").write_text(json.dumps(path))
    common = ("--load-config", config, "--output-path")
    images = ("--output-format", "images", "--downscale-factor")
    command(
        "ns-render",
        "camera-path",
        *common,
        runs / "a",
        *images,
        1,
        "--camera-path-filename",
        runs / "path.json",
        folder=runs,
    )
    names = ("--rendered-output-names", "rgb", "importance", "sample_density")
    steps = ("--interpolation-steps", 2)
    command("ns-render", "interpolate", *common, runs / "b", *images, 2, *steps, *names, folder=runs)
    pictures = [np.asarray(Image.open(file)) for file in (runs / "b").rglob("*.*g")]
    assert all(picture.shape[1] > 2.5 * picture.shape[0] for picture in pictures)  # three outputs side by side
    command("ns-render", "dataset", *common, runs / "c", "--split", "test", folder=runs)
    for name, least in (("a", 1), ("b", 2), ("c", 2)):
        assert len([f for f in (runs / name).rglob("*.*g")]) >= least, name


@pytest.mark.parametrize(
    ("kind", "flags", "made"),
    [
        (
            "pointcloud",
            ("--num-points", 500, "--normal-method", "open3d", "--remove-outliers", False),
            "point_cloud.ply",
        ),
        (
            "poisson",
            ("--num-points", 5000, "--normal-method", "open3d", "--texture-method", "point_cloud"),
            "poisson_mesh.ply",
        ),
        ("tsdf", ("--resolution", 16, "--texture-method", "tsdf"), "tsdf_mesh.ply"),
        ("cameras", (), "transforms_train.json"),
    ],
)
@pytest.mark.skipif(not HAS_OPEN3D, reason="open3d does not load here (`softmining doctor` tells what it lacks)")
def test_exports(config, runs, kind, flags, made):
    command("ns-export", kind, "--load-config", config, "--output-dir", runs / kind, *flags, folder=runs)
    assert (runs / kind / made).stat().st_size > 100


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--pipeline.model.alpha", 1.5), ("alpha", "1.5")),
        (("--pipeline.datamanager.pixel-sampler.langevin.uniform-fraction", -0.1), ("uniform-fraction", "-0.1")),
        (("--pipeline.datamanager.pixel-sampler.multinomial.refresh", 0), ("multinomial.refresh", "0")),
        (("--pipeline.datamanager.pixel-sampler.langevin.noise", -1), ("noise", "-1")),
        (("--pipeline.datamanager.train-num-rays-per-batch", 4), ("train-num-rays-per-batch", "is 4")),
        (("--pipeline.datamanager.patch-size", 8), ("patch-size", "8")),
    ],
)
def test_bad_settings_are_named_without_a_traceback(runs, scene, flags, named):
    output = train(runs, scene, "bad", 2, *flags, fails=True)
    assert "Traceback" not in output, output
    for word in named:
        assert word in output


@pytest.mark.parametrize("spoil", ["no transforms", "no images"])
def test_bad_data_is_named_without_a_traceback(runs, tmp_path, spoil):
    if spoil == "no images":
        for split in ("train", "val", "test"):
            (tmp_path / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": 0.6, "frames": []}))
    output = train(runs, tmp_path, "bad", 2, fails=True)
    assert "Traceback" not in output, output
    assert str(tmp_path) in output.replace("\n", "")


def test_full_method_with_its_own_settings_on_what_users_have(runs, tmp_path):
    """softmining-nerfacto with the paper's sampler and the viewer, on nerfstudio's format: camera optimizer, masks,
    RGBA, two image sizes."""
    flags = ("--pipeline.model.log2-hashmap-size", 12, "--viewer.quit-on-train-completion", True)
    flags += ("--pipeline.datamanager.pixel-sampler.kind", "langevin")
    user_scene(tmp_path)
    train(runs, tmp_path, "full", 3, *flags, method="softmining-nerfacto", vis="viewer+tensorboard")
    pool = checkpoint(runs, "full", "softmining-nerfacto")["pipeline"]["datamanager._extra_state"]["sampler"]["run"][
        "state"
    ]["chains"]
    assert len(pool["image_index"]) == 256 - 26


def user_scene(folder: Path) -> None:
    """RGBA views of two sizes with masks, in nerfstudio's own format."""
    frames = []
    for number, pose in enumerate(orbit(10)):
        size = 24 if number % 2 else 32
        Image.fromarray(render_view(pose, size)).save(folder / f"view_{number}.png")
        mask = np.full((size, size), 255, np.uint8)
        mask[: size // 2] = 0
        Image.fromarray(mask).save(folder / f"mask_{number}.png")
        focal = 0.5 * size / np.tan(0.5 * CAMERA_ANGLE_X)
        intrinsics = dict(w=size, h=size, fl_x=focal, fl_y=focal, cx=size / 2, cy=size / 2)
        files = dict(file_path=f"view_{number}.png", mask_path=f"mask_{number}.png")
        frames.append({**files, **intrinsics, "transform_matrix": pose.tolist()})
    (folder / "transforms.json").write_text(json.dumps({"camera_model": "OPENCV", "frames": frames}))
