"""Full disks, folders that cannot be written, signals, clocks: what is there stays whole, and can be gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from image_cases import SMALL, picture
from matplotlib.figure import Figure

import nerfstudio_softmining
from nerfstudio_softmining import files
from nerfstudio_softmining.bench import run_page
from nerfstudio_softmining.bench.results import Results, write_bytes
from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images import fit, image, photo
from nerfstudio_softmining.images.config import FitConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits, mounts and signals are those of Linux")
SOFTMINING = [sys.executable, "-W", "ignore", "-m", "nerfstudio_softmining.cli"]
CONFIG = FitConfig(**SMALL | {"batch": 64})
FLAGS = ["--levels", "4", "--log2-hashmap-size", "10", "--width", "16", "--batch", "64"]
CAN_MOUNT = subprocess.run(
    ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"], capture_output=True, check=False
)
NEEDS_MOUNT = pytest.mark.skipif(
    CAN_MOUNT.returncode != 0, reason=f"a small disk cannot be mounted here: {CAN_MOUNT.stderr.decode().strip()}"
)


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file become larger than a number of bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photographs") / "photo.png"
    assert cv2.imwrite(str(path), picture())
    return path


def run(path: Path, output: Path, at=(3, 6)) -> int:
    return image.run_image(path, output, ("uniform",), (0,), at, CONFIG)


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def qualities(output: Path) -> dict:
    return {(run["sampler"], run["seed"], run["iteration"]): run["psnr"] for run in results_of(output)["runs"]}


def write_results(path: Path) -> None:
    results = Results(path.parent, (1,), {"scene": {"size": "x" * 5000}})
    results.add("scene", "uniform", 0, {"iteration": 1})


def figure() -> Figure:
    drawn = Figure(figsize=(3, 3))
    drawn.subplots().imshow(np.random.default_rng(0).random((99, 99)))
    return drawn


NOISE = np.random.default_rng(0).integers(0, 256, (99, 99, 3))
RUN = run_page.Run("a", {"data": "x" * 9999}, {}, None, [run_page.View(0, NOISE / 255, NOISE / 255, 20.0, 0.5)])
WRITERS = {
    "results.json": write_results,
    "checkpoint.pt": lambda path: fit.save({"field": torch.rand(9999)}, path),
    "preview.jpg": lambda path: write_bytes(NOISE, path),
    "reconstruction.png": lambda path: photo.write(NOISE.astype(np.uint8), path),
    "reconstruction.exr": lambda path: photo.write(NOISE.astype(np.float32), path),
    "crops.jpg": lambda path: files.save_figure(figure(), path, dpi=150),
    "maps.png": lambda path: files.save_figure(figure(), path, dpi=150),
    "report.html": lambda path: files.write(run_page.page([RUN]), path),
}


# ---------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_stays_as_it_was(name, tmp_path):
    path, write = tmp_path / name, WRITERS[name]
    write(path)
    before = path.read_bytes()
    for limit in (0, 10, 4096):
        with small_files(limit), pytest.raises(UserError) as error:
            write(path)
        assert str(path) in str(error.value) and "File too large" in str(error.value)
        assert path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [name]
    write(path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_is_interrupted_leaves_the_file_as_it_was(name, tmp_path, monkeypatch):
    path, write = tmp_path / name, WRITERS[name]
    write(path)
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_scene_of_the_demo_is_made_anew_after_a_full_disk(tmp_path):
    with small_files(100), pytest.raises(UserError, match=r"r_0\.png cannot be written \(File too large\)"):
        write_scene(tmp_path / "scene", num_train=2, num_eval=1, size=16)
    assert not (tmp_path / "scene").exists()
    write_scene(tmp_path / "scene", num_train=2, num_eval=1, size=16)
    assert (tmp_path / "scene" / "transforms_train.json").exists()


@pytest.mark.usefixtures("capsys")  # as what is printed goes to a file otherwise, which the limit is for as well
@pytest.mark.parametrize("limit", [0, 2000, 60_000])
def test_a_full_disk_ends_a_fit_with_the_name_of_the_file_and_it_goes_on(limit, photo_file, tmp_path):
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert run(photo_file, whole, (3, 6)) == 0 and run(photo_file, full, (3,)) == 0
    before = qualities(full)
    with small_files(limit), pytest.raises(UserError) as error:
        run(photo_file, full)
    message = str(error.value)
    assert str(full) in message and "File too large" in message and "Free some space" in message
    assert qualities(full).items() >= before.items()
    fit.load(full / "runs" / "uniform" / "0" / "checkpoint.pt")
    assert not list(full.rglob("*.part*"))
    assert run(photo_file, full) == 0 and qualities(full) == qualities(whole)


def test_a_fit_that_ended_between_its_first_result_and_its_checkpoint_is_made_anew(photo_file, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(photo_file, whole) == 0

    def ended(*_: object) -> None:
        raise SystemExit(143)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(image, "save", ended)
        run(photo_file, broken)
    assert len(qualities(broken)) == 1 and not list(broken.rglob("checkpoint.pt"))
    assert run(photo_file, broken) == 0 and qualities(broken) == qualities(whole)


# --------------------------------------------------------------------------------------------- folders without a place


def softmining(*arguments: object, prepare: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command, after shell commands in a name space of its own."""
    command = [*SOFTMINING, *map(str, arguments)]
    if prepare:
        command = ["unshare", "-rm", "sh", "-c", f"{prepare} && exec {shlex.join(command)}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def assert_named(result: subprocess.CompletedProcess[str], path: Path, *causes: str) -> None:
    text = "".join((result.stdout + result.stderr).split())
    assert result.returncode == 1 and "Traceback" not in text, result.stderr
    assert str(path) in text and any("".join(cause.split()) in text for cause in causes), result.stderr


@NEEDS_MOUNT
def test_a_read_only_folder_is_named(photo_file, tmp_path):
    mount = f"mount -t tmpfs -o ro tmpfs {tmp_path}"
    result = softmining("image", photo_file, "--output", tmp_path / "out", *FLAGS, prepare=mount)
    assert_named(result, tmp_path / "out", "Read-only file system")


@NEEDS_MOUNT
@pytest.mark.slow
@pytest.mark.parametrize("command", ["image", "demo", "bench", "report", "render"])
@pytest.mark.parametrize("fault", ["read only", "a file"])
def test_a_place_that_cannot_be_written_is_named(command, fault, photo_file, tmp_path):
    place = tmp_path / "place"
    if fault == "a file":
        place.write_text("keep")
    else:
        place.mkdir()
    write_scene(tmp_path / "scene", num_train=3, num_eval=1, size=16)
    run(photo_file, tmp_path / "fit")
    checkpoint = tmp_path / "fit" / "runs" / "uniform" / "0" / "checkpoint.pt"
    arguments = {
        "image": ("image", photo_file, "--output", place / "out", *FLAGS, "--at", 2),
        "demo": ("demo", "--output", place / "out", "--iterations", 2),
        "bench": ("bench", preset(tmp_path), "--data", tmp_path, "--output", place / "out"),
        "report": ("report", ns_train(tmp_path) if command == "report" else "", "--output", place / "a.html"),
        "render": ("render", checkpoint, "--output", place / "a.png"),
    }[command]
    prepare = f"mount -t tmpfs -o ro tmpfs {place}" if fault == "read only" else "true"
    result = softmining(*arguments, prepare=prepare)
    assert_named(result, place, *(["Read-only"] if fault == "read only" else ["Not a directory", "File exists"]))
    assert fault != "a file" or place.read_text() == "keep"


def preset(folder: Path, at=(2, 4)) -> Path:
    path = folder / "preset.yaml"
    scene = "{path: scene, method: softmining-nerfacto-lite-blender, set: [train_num_rays_per_batch=64]}"
    path.write_text(f"title: a\nscenes: [{scene}]\nsamplers: [uniform, mixture]\nseeds: [0]\nat: {list(at)}\n")
    return path


def ns_train(folder: Path) -> Path:
    """The folder of a short run of ns-train on the scene in a folder."""
    command = [sys.executable, "-W", "ignore", "-m", "nerfstudio.scripts.train", "softmining-nerfacto-lite-blender"]
    command += ["--data", str(folder / "scene"), "--output-dir", str(folder / "runs"), "--timestamp", "run"]
    command += ["--max-num-iterations", "2", "--vis", "tensorboard"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next((folder / "runs").rglob("config.yml")).parent


# --------------------------------------------------------------------------------------------------- a disk that fills


@NEEDS_MOUNT
@pytest.mark.slow
@pytest.mark.parametrize("command", ["image", "bench", "demo"])
def test_a_disk_that_fills_is_named_and_the_same_command_goes_on(command, photo_file, tmp_path):
    """On a real one, which is made larger for the second run."""
    write_scene(tmp_path / "scene", num_train=3, num_eval=1, size=16)
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    # a comparison that can write all but a checkpoint goes on without
    arguments, sizes = {
        "image": (["image", photo_file, "--output", disk / "out", *FLAGS, "--at", 2, 4], {"40k": 1, "200k": 1}),
        "bench": (["bench", preset(tmp_path), "--data", tmp_path, "--output", disk / "out"], {"200k": 1, "4m": 0}),
        "demo": (["demo", "--output", disk / "out", "--iterations", 2], {"500k": 1, "4m": 1}),
    }[command]
    line = shlex.join([*SOFTMINING, *map(str, arguments)])
    for size, code in sizes.items():
        shutil.rmtree(kept, ignore_errors=True)
        script = (
            f"mount -t tmpfs -o size={size} tmpfs {disk}; {line}; echo code $?; cp -r {disk} {kept}; "
            f"mount -o remount,size=500m {disk}; {line}; echo code $?"
        )
        result = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=600, check=False
        )
        text = result.stdout + result.stderr
        codes = [line for line in result.stdout.splitlines() if line.startswith("code ")]
        assert codes == [f"code {code}", "code 0"], text
        assert "No space left" in "".join(text).replace("\n", " ") and "Traceback" not in result.stderr, text
        for path in kept.rglob("results.json"):
            json.loads(path.read_text())
        for path in kept.rglob("checkpoint.pt"):
            fit.load(path)
        for path in (*kept.rglob("*.png"), *kept.rglob("*.jpg")):
            assert "partial" in str(path) or cv2.imread(str(path)) is not None, path


# -------------------------------------------------------------------------------------------------------------- signals


def test_killing_a_writer_at_any_time_leaves_a_whole_file(tmp_path):
    path, times = tmp_path / "results.json", random.Random(0)
    content = {"runs": [{"psnr": number / 7} for number in range(20_000)]}
    files.write(json.dumps(content), path)
    for _ in range(20):
        process = os.fork()
        if process == 0:
            while True:
                files.write(json.dumps(content), path)
        time.sleep(times.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert json.loads(path.read_text()) == content
    files.write("{}", path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [*SOFTMINING, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("signals", ["INT", "INT INT", "TERM", "KILL"])
def test_a_fit_ended_by_any_signal_goes_on(signals, photo_file, tmp_path):
    """Several times at random times, and in the end as if it had never been ended."""
    whole, broken, times = tmp_path / "whole", tmp_path / "broken", random.Random(signals)
    arguments = ["image", photo_file, *FLAGS, "--samplers", "uniform", "--at", 50, 400, "--output"]
    assert softmining(*arguments, whole).returncode == 0
    numbers = [getattr(signal, f"SIG{name}") for name in signals.split()]
    for attempt in range(5):
        process = start(*arguments, broken)
        wait_for(broken / "results.json" if attempt == 0 else broken, process)
        time.sleep(times.uniform(0, 0.5 if attempt == 0 else 12))
        for number in numbers:
            process.send_signal(number)
            time.sleep(times.uniform(0, 0.05))
        text = process.communicate(timeout=120)[0]
        assert "Traceback" not in text
        assert process.returncode in (0, 130, 128 + signal.SIGTERM, -numbers[0]), text
        if (broken / "results.json").exists():
            results_of(broken)
        for path in broken.rglob("checkpoint.pt"):
            fit.load(path)
    assert softmining(*arguments, broken).returncode == 0
    assert qualities(broken) == qualities(whole) and results_of(broken)["failures"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_ended_by_any_signal_goes_on(number, tmp_path):
    write_scene(tmp_path / "scene", num_train=3, num_eval=1, size=16)
    whole, broken, times = tmp_path / "whole", tmp_path / "broken", random.Random(number)
    arguments = ["bench", preset(tmp_path, (5, 40)), "--data", tmp_path, "--output"]
    assert softmining(*arguments, whole).returncode == 0
    for _ in range(3):
        process = start(*arguments, broken)
        wait_for(broken / "results.json", process)
        time.sleep(times.uniform(0, 15))
        process.send_signal(number)
        text = process.communicate(timeout=120)[0]
        assert "Traceback" not in text and process.returncode in (0, 130, 128 + signal.SIGTERM, -number), text
        if (broken / "results.json").exists():
            results_of(broken)
    assert softmining(*arguments, broken).returncode == 0
    assert qualities(broken) == qualities(whole) and results_of(broken)["failures"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_the_demo_has_started_ends_with_it(number, tmp_path):
    import psutil

    process = start("demo", "--output", tmp_path, "--iterations", 5000)
    wait_for(tmp_path / "run" / "uniform" / "train.log", process)
    time.sleep(5)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode in (130, 128 + signal.SIGTERM) and "Traceback" not in text
    assert not [child for child in psutil.wait_procs(children, timeout=20)[1] if child.is_running()]
    result = softmining("demo", "--output", tmp_path, "--iterations", 2)
    assert result.returncode == 0 and (tmp_path / "run-2" / "pictures").is_dir(), result.stderr


# --------------------------------------------------------------------------------------------------------------- clocks


def test_a_clock_that_is_set_back_changes_no_duration(photo_file, tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert run(photo_file, tmp_path, (3, 6)) == 0
    assert run(photo_file, tmp_path, (3, 6, 9)) == 0
    seconds = [entry["seconds"] for entry in results_of(tmp_path)["runs"]]
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[-1] < 100
    assert all(0 < entry["seconds_per_step"] < 100 for entry in results_of(tmp_path)["runs"])


def test_no_duration_is_taken_from_a_clock_that_can_be_set():
    for path in Path(nerfstudio_softmining.__file__).parent.rglob("*.py"):
        assert "time.time(" not in path.read_text(), path


def test_files_of_the_future_are_read(photo_file, tmp_path):
    """As after a clock was set back."""
    assert run(photo_file, tmp_path, (3,)) == 0
    for path in tmp_path.rglob("*"):
        os.utime(path, (time.time() + 1e8, time.time() + 1e8))
    assert run(photo_file, tmp_path, (3, 6)) == 0 and len(qualities(tmp_path)) == 2
