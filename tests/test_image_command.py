"""Laws of `softmining image` and `softmining render`: what they keep, what they go on from, what they say."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import forecast
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import SMALL, make_photo, picture

from nerfstudio_softmining.bench.results import Results
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images import fit as fits
from nerfstudio_softmining.images import image, report
from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, load, load_field, save
from nerfstudio_softmining.images.image import run_image, run_render
from nerfstudio_softmining.images.photo import Photo

CONFIG = FitConfig(**SMALL | {"batch": 64})
SAMPLERS = ("uniform", "langevin,noise=0.01")
FLAGS = ("--levels", "4", "--log2-hashmap-size", "10", "--width", "16", "--batch", "64")
RUN_FILES = {"checkpoint.pt", "draws.png"}
ENTRY = {
    *("scene", "sampler", "seed", "method", "iteration", "psnr"),
    *("seconds", "seconds_per_step", "rays_per_second", "peak_memory"),
}


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory) -> Path:
    return write_photo(tmp_path_factory.mktemp("photographs") / "a photo.png")


def write_photo(path: Path, **changes) -> Path:
    assert cv2.imwrite(str(path), np.ascontiguousarray(picture(**changes)[..., ::-1]))
    return path


def run(photo: Path, output: Path, samplers=("uniform",), seeds=(0,), at=(3, 6), config=CONFIG) -> int:
    return run_image(photo, output, samplers, seeds, at, config)


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def qualities(output: Path) -> dict:
    runs = results_of(output)["runs"]
    assert len({(r["scene"], r["sampler"], r["seed"], r["iteration"]) for r in runs}) == len(runs)
    return {(r["sampler"], r["seed"], r["iteration"]): r["psnr"] for r in runs}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pixels_of(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


@pytest.fixture(scope="module")
def done(photo_file, tmp_path_factory) -> Path:
    """The output of two samplers with two seeds each."""
    output = tmp_path_factory.mktemp("outputs") / "of a photo"
    assert run(photo_file, output, SAMPLERS, (0, 7)) == 0
    return output


def interrupting(monkeypatch: pytest.MonkeyPatch, when: Callable[[Fit], bool]) -> None:
    """Let Ctrl-C be pressed after the step at which this holds."""
    step = Fit.step

    def interrupted(fit: Fit) -> None:
        step(fit)
        if when(fit):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Fit, "step", interrupted)


# ------------------------------------------------------------------------------------------------------ what is there


def test_everything_is_there_in_the_end(done):
    assert files(done) == {"report.md", "results.json", "crops.jpg", "maps.jpg", "convergence.png", "runs"}
    for sampler in SAMPLERS:
        first, second = done / "runs" / sampler / "0", done / "runs" / sampler / "7"
        previews = {"preview_000003.jpg", "preview_000006.jpg"}
        assert files(first) == RUN_FILES | previews | {"reconstruction.png"}
        assert files(second) == RUN_FILES | previews
        for name in ("draws.png", "reconstruction.png", "preview_000006.jpg"):
            assert pixels_of(first / name).size > 0
    for name in ("crops.jpg", "maps.jpg", "convergence.png"):
        assert pixels_of(done / name).std() > 0
    text = (done / "report.md").read_text()
    assert all(sampler in text for sampler in SAMPLERS) and "a photo.png" in text and "24 x 40" in text
    for name in ("crops.jpg", "maps.jpg", "convergence.png", "runs/langevin,noise=0.01/0/reconstruction.png"):
        assert name in text


def test_results_have_the_schema_of_the_bench(done, tmp_path):
    content = results_of(done)
    reference = Results(tmp_path, (3, 6), {"a photo.png": {}}).content
    assert content.keys() == reference.keys() == {"settings", "versions", "device", "runs", "failures"}
    assert content["versions"] == reference["versions"] and content["device"] == reference["device"]
    assert content["settings"]["at"] == [3, 6] and content["settings"]["scenes"].keys() == {"a photo.png"}
    assert content["settings"]["scenes"]["a photo.png"]["batch"] == 64 and content["failures"] == {}
    assert set(qualities(done)) == {(sampler, seed, at) for sampler in SAMPLERS for seed in (0, 7) for at in (3, 6)}
    for entry in content["runs"]:
        assert entry.keys() == ENTRY and entry["scene"] == "a photo.png" and math.isfinite(entry["psnr"])
        assert min(entry[key] for key in ("seconds", "seconds_per_step", "rays_per_second", "peak_memory")) > 0


def test_samplers_of_one_seed_are_in_turn(done):
    order = [(run["seed"], run["sampler"]) for run in results_of(done)["runs"][::2]]
    assert order == [(seed, sampler) for seed in (0, 7) for sampler in SAMPLERS]


def test_the_reconstruction_is_what_the_checkpoint_shows_and_has_its_psnr(done, photo_file):
    photo = photos.read(photo_file)
    for sampler in SAMPLERS:
        folder = done / "runs" / sampler / "0"
        field, _ = load_field(load(folder / "checkpoint.pt"), torch.device("cpu"))
        shown = torch.cat(list(fits.render(field, (24, 40), torch.device("cpu")))).clamp(0, 1)
        kept = pixels_of(folder / "reconstruction.png")[..., ::-1].astype(int)
        assert np.abs(kept - (shown * 255).round().numpy()).max() <= 1
        psnr = -10 * math.log10((shown - photo.values).square().mean())
        assert f"{psnr:.2f} dB over all pixels after 6 iterations" in (done / "report.md").read_text()
        assert abs(qualities(done)[sampler, 0, 6] - psnr) < 1e-3


def test_the_picture_of_draws_shows_where_points_were(tmp_path):
    values = np.full((32, 32, 3), 100, np.uint8)
    values[:, 16:] = np.random.default_rng(0).integers(0, 256, (32, 16, 3))
    assert cv2.imwrite(str(tmp_path / "half.png"), values)
    run(tmp_path / "half.png", tmp_path / "out", ("uniform", "greedy,interval=2"), at=(40,))
    for sampler, low in (("uniform", 124), ("greedy,interval=2", 0)):
        draws = pixels_of(tmp_path / "out" / "runs" / sampler / "0" / "draws.png").astype(float)
        often = 2 ** ((draws - 128) / 16)
        assert abs(often.mean() - 1) < 0.1
        left, right = (part.mean() for part in np.array_split(draws, 2, axis=1))
        assert left >= low and (abs(left - right) < 8 or right > left + 40) and (low or right > left + 40)


# ----------------------------------------------------------------------------------------------------------- going on


def test_the_same_command_again_trains_nothing(done, photo_file, monkeypatch):
    monkeypatch.setattr(Fit, "step", lambda fit: pytest.fail("has been trained"))
    before = {path: path.read_bytes() for path in done.rglob("*") if path.name in ("results.json", "checkpoint.pt")}
    (done / "report.md").unlink()
    assert run(photo_file, done, SAMPLERS, (0, 7)) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert all(sampler in (done / "report.md").read_text() for sampler in SAMPLERS)


@pytest.mark.parametrize("sampler", ["langevin,noise=0.01", "multinomial,refresh=4", "greedy,interval=4"])
def test_more_iterations_go_on_from_the_checkpoint_as_if_never_stopped(sampler, photo_file, tmp_path, monkeypatch):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    assert run(photo_file, whole, (sampler,), at=(3, 6, 15)) == 0
    assert run(photo_file, longer, (sampler,), at=(3, 6)) == 0
    trained: list[int] = []
    step = Fit.step
    monkeypatch.setattr(Fit, "step", lambda fit: (trained.append(fit.iteration), step(fit)))
    assert run(photo_file, longer, (sampler,), at=(3, 6, 15)) == 0
    assert trained == list(range(6, 15)) and qualities(longer) == qualities(whole)
    states = [load(output / "runs" / sampler / "0" / "checkpoint.pt") for output in (whole, longer)]
    assert states[0]["iteration"] == states[1]["iteration"] == 15
    assert all(torch.equal(states[0]["field"][key], states[1]["field"][key]) for key in states[0]["field"])
    times = [entry["seconds"] for entry in results_of(longer)["runs"]]
    assert times == sorted(times)


def test_more_samplers_and_seeds_join_those_that_are_there(photo_file, tmp_path):
    assert run(photo_file, tmp_path, ("uniform",)) == 0
    before = qualities(tmp_path)
    assert run(photo_file, tmp_path, ("uniform", "edge"), (0, 1)) == 0
    assert len(qualities(tmp_path)) == 8 and before.items() <= qualities(tmp_path).items()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": replace(CONFIG, alpha=0.1)},
        {"config": replace(CONFIG, batch=65)},
        {"config": replace(CONFIG, levels=5)},
        {"at": (3, 7)},
        {"at": (2, 6)},
        {"at": (3,)},
    ],
)
def test_results_of_other_settings_are_not_mixed(changes, done, photo_file):
    kept = (done / "results.json").read_bytes()
    with pytest.raises(UserError, match="other settings.*--output"):
        run(photo_file, done, **changes)
    assert (done / "results.json").read_bytes() == kept


def test_another_photograph_of_the_same_name_is_refused(done, tmp_path):
    with pytest.raises(UserError, match="other settings.*--output"):
        run(write_photo(tmp_path / "a photo.png", seed=1), done)


def test_a_photograph_never_gets_the_reconstruction_of_another(photo_file, tmp_path):
    """Refused, or fitted on its own."""
    output = tmp_path / "out"
    run(photo_file, output)
    other = write_photo(tmp_path / "other.png", seed=1)
    try:
        run(other, output)
    except UserError as error:
        assert "--output" in str(error)
        return
    assert {entry["scene"] for entry in results_of(output)["runs"]} == {"a photo.png", "other.png"}
    again = tmp_path / "again"
    run(other, again)
    psnr = [entry["psnr"] for entry in results_of(output)["runs"] if entry["scene"] == "other.png"]
    assert psnr == list(qualities(again).values())


def test_settings_that_could_not_be_trained_can_be_mended(photo_file, tmp_path):
    def mistaken() -> int:
        return run(photo_file, tmp_path / "out", ("langevin,uniform_fraction=0.1",), config=replace(CONFIG, batch=3))

    try:
        assert mistaken() == 1
        assert "--batch is 3" in str(results_of(tmp_path / "out")["failures"])
    except UserError as error:
        assert "--batch is 3" in str(error)
    assert run(photo_file, tmp_path / "out", ("langevin,uniform_fraction=0.1",), config=replace(CONFIG, batch=6)) == 0
    assert results_of(tmp_path / "out")["failures"] == {}


# ----------------------------------------------------------------------------------------------------- Ctrl-C, failures


def test_ctrl_c_keeps_what_is_there_and_the_same_command_goes_on(photo_file, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(photo_file, whole, SAMPLERS) == 0
    with monkeypatch.context() as patch:
        interrupting(patch, lambda fit: fit.settings.kind == "langevin" and fit.iteration == 5)
        assert run(photo_file, broken, SAMPLERS) == 130
    folder = broken / "runs" / SAMPLERS[1] / "0"
    assert load(folder / "checkpoint.pt")["iteration"] == 5
    assert (folder / "reconstruction.png").exists() and "after 5 iterations" in (broken / "report.md").read_text()
    assert len(qualities(broken)) == 3 and results_of(broken)["failures"] == {}
    assert run(photo_file, broken, SAMPLERS) == 0
    assert qualities(broken) == qualities(whole)


def test_after_ctrl_c_no_other_fit_is_begun(photo_file, tmp_path, monkeypatch):
    interrupting(monkeypatch, lambda fit: fit.iteration == 2)
    before = signal.getsignal(signal.SIGINT)
    assert run(photo_file, tmp_path, SAMPLERS, (0, 1)) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert files(tmp_path / "runs") == {"uniform"} and files(tmp_path / "runs" / "uniform") == {"0"}


def test_ctrl_c_before_the_first_step_is_no_failure(photo_file, tmp_path, monkeypatch):
    start = Fit.__init__
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "__init__", lambda fit, *to: (start(fit, *to), os.kill(os.getpid(), signal.SIGINT))[0])
        assert run(photo_file, tmp_path) == 130
    file = tmp_path / "results.json"
    assert not file.exists() or results_of(tmp_path)["failures"] == {}
    assert run(photo_file, tmp_path) == 0 and len(qualities(tmp_path)) == 2


@pytest.fixture
def _heard():
    """Ctrl-C as in a terminal; it is ignored where tests run in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("_heard")
def test_a_second_ctrl_c_ends_at_once(photo_file, tmp_path, monkeypatch):
    def twice(fit: Fit) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("has gone on")

    monkeypatch.setattr(Fit, "step", twice)
    with pytest.raises(KeyboardInterrupt):
        run(photo_file, tmp_path)


def test_a_fit_that_fails_is_reported_and_the_others_go_on(photo_file, tmp_path, monkeypatch):
    step = Fit.step

    def failing(fit: Fit) -> None:
        if fit.settings.kind == "edge" and fit.iteration == 2:
            raise RuntimeError("out of memory [enforce fail at x.cpp] [/red]")
        step(fit)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "step", failing)
        assert run(photo_file, tmp_path, ("edge", "uniform")) == 1
    assert list(results_of(tmp_path)["failures"]) == ["edge, seed 0"]
    assert "out of memory [enforce" in results_of(tmp_path)["failures"]["edge, seed 0"]
    assert {key[0] for key in qualities(tmp_path)} == {"uniform"} and "uniform" in (tmp_path / "report.md").read_text()
    assert run(photo_file, tmp_path, ("edge", "uniform")) == 0
    assert results_of(tmp_path)["failures"] == {} and len(qualities(tmp_path)) == 4


@pytest.mark.parametrize("length", [0, 1000, 0.5, -1])
def test_a_checkpoint_cut_off_fails_clearly_and_the_others_are_shown(length, photo_file, tmp_path):
    run(photo_file, tmp_path, ("uniform", "edge"))
    path = tmp_path / "runs" / "uniform" / "0" / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    (tmp_path / "report.md").unlink()
    assert run(photo_file, tmp_path, ("uniform", "edge"), at=(3, 6, 9)) == 1
    reason = results_of(tmp_path)["failures"]["uniform, seed 0"]
    assert str(path) in reason and "not the checkpoint" in reason
    assert ("edge", 0, 9) in qualities(tmp_path) and "edge" in (tmp_path / "report.md").read_text()
    path.unlink()
    (tmp_path / "results.json").unlink()
    assert run(photo_file, tmp_path, ("uniform",), at=(3, 6, 9)) == 0


def test_fits_whose_files_are_gone_are_made_anew_or_fail_clearly(photo_file, tmp_path):
    run(photo_file, tmp_path)
    (tmp_path / "runs" / "uniform" / "0" / "checkpoint.pt").unlink()
    code = run(photo_file, tmp_path)
    assert code == 0 or "checkpoint.pt" in results_of(tmp_path)["failures"]["uniform, seed 0"]
    assert len(qualities(tmp_path)) == 2


def test_fits_whose_results_are_gone_are_not_reported_as_if_they_had_some(photo_file, tmp_path):
    """Made anew, gone on with, or failed; but not a success without any result."""
    run(photo_file, tmp_path)
    (tmp_path / "results.json").unlink()
    code = run(photo_file, tmp_path)
    assert code == 1 or ("uniform", 0, 6) in qualities(tmp_path)


# --------------------------------------------------------------------------------------------------------- odd input


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"samplers": ("nonsense",)}, "nonsense"),
        ({"samplers": ()}, "--samplers"),
        ({"samplers": ("uniform", "uniform")}, "--samplers"),
        ({"samplers": ("uniform", "langevin,noise=-1.0")}, "noise is -1.0"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"at": ()}, "--at"),
        ({"at": (0, 4)}, "--at"),
        ({"at": (8, 4)}, "--at"),
        ({"at": (4, 4)}, "--at"),
    ],
)
def test_a_users_mistake_is_named_before_anything_is_trained(changes, word, photo_file, tmp_path, monkeypatch):
    monkeypatch.setattr(image, "Fit", lambda *_: pytest.fail("has been trained"))
    with pytest.raises(UserError, match=word):
        run(photo_file, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_photograph_that_can_not_be_read_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="missing.png"):
        run(tmp_path / "missing.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_is_refused(photo_file, tmp_path):
    (tmp_path / "out").write_text("keep")
    for output in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(UserError, match=r"--output is .*out.* Name another"):
            run(photo_file, output)
    assert (tmp_path / "out").read_text() == "keep"


def test_results_that_are_none_are_refused(photo_file, tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="--output"):
        run(photo_file, tmp_path)


def test_names_may_have_brackets(tmp_path):
    folder = tmp_path / "[/old] [red]"
    folder.mkdir(parents=True)
    photo = write_photo(folder / "[draft]a[b].png")
    assert run(photo, folder / "out") == 0
    assert "[draft]a[b].png" in (folder / "out" / "report.md").read_text()
    run_render(folder / "out" / "runs" / "uniform" / "0" / "checkpoint.pt", folder / "[/x].png", None, 1.0)
    assert (folder / "[/x].png").exists()


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (50, 2)])
def test_any_shape_can_be_fitted_and_shown(size, tmp_path):
    photo = write_photo(tmp_path / "odd.png", height=size[0], width=size[1])
    assert run(photo, tmp_path / "out", SAMPLERS, at=(2,)) == 0
    assert pixels_of(tmp_path / "out" / "runs" / "uniform" / "0" / "reconstruction.png").shape[:2] == size


@pytest.mark.parametrize("kind", ["grey16", "rgba", "exr", "constant"])
def test_each_kind_of_photograph_is_reconstructed_as_it_was(kind, tmp_path):
    random = np.random.default_rng(0)
    values = {
        "grey16": random.integers(0, 1 << 16, (20, 30)).astype(np.uint16),
        "rgba": picture(20, 30, 4),
        "exr": (10 ** random.uniform(-3, 3, (20, 30, 3))).astype(np.float32),
        "constant": np.full((20, 30, 3), 55, np.uint8),
    }[kind]
    suffix = ".exr" if kind == "exr" else ".png"
    assert cv2.imwrite(str(tmp_path / f"a{suffix}"), values)
    assert run(tmp_path / f"a{suffix}", tmp_path / "out", SAMPLERS, at=(2,)) == 0
    for sampler in SAMPLERS:
        shown = pixels_of(tmp_path / "out" / "runs" / sampler / "0" / f"reconstruction{suffix}")
        assert shown.shape == values.shape and shown.dtype == values.dtype and np.isfinite(shown).all()


# ------------------------------------------------------------------------------------------------------------ command


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nerfstudio_softmining.cli", *arguments]


@pytest.mark.skipif(os.name != "posix", reason="only POSIX can send Ctrl-C to one other process")
def test_ctrl_c_on_the_command_line(photo_file, tmp_path):
    arguments = command("image", str(photo_file), "--at", "2", "1500", "--output", str(tmp_path), *FLAGS)
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "results.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    try:
        text = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in text
    folder = tmp_path / "runs" / "detail" / "0"
    stopped = load(folder / "checkpoint.pt")["iteration"]
    assert 2 <= stopped < 1500 and pixels_of(folder / "reconstruction.png").shape == (24, 40, 3)
    assert (tmp_path / "report.md").exists() and len(qualities(tmp_path)) == 1
    assert run(photo_file, tmp_path, ("detail",), at=(2, 1500)) == 0
    assert set(qualities(tmp_path)) == {("detail", 0, 2), ("detail", 0, 1500)}


def test_a_mistake_on_the_command_line_ends_with_its_message(photo_file, tmp_path):
    result = subprocess.run(
        command("image", str(photo_file), "--samplers", "langevin,drift=abc", *FLAGS),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr and "drift=abc" in result.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- render


def checkpoint(path: Path, photo: Photo | None = None, steps: int = 3) -> Path:
    fit = Fit(make_photo() if photo is None else photo, fits.make_settings("uniform", 0, 10, CONFIG))
    for _ in range(steps):
        fit.step()
    save(fit.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [(None, 1.0, (24, 40)), (None, 2.0, (48, 80)), (None, 0.1, (2, 4)), ((7, 100), 3.0, (7, 100))],
)
def test_a_checkpoint_can_be_rendered_at_any_size(size, scale, expected, tmp_path):
    path = checkpoint(tmp_path / "checkpoint.pt")
    run_render(path, tmp_path / "deeper" / "picture.jpg", size, scale)
    assert files(tmp_path / "deeper") == {"picture.png"}
    shown = pixels_of(tmp_path / "deeper" / "picture.png")
    field, _ = load_field(load(path), torch.device("cpu"))
    expected_values = torch.cat(list(fits.render(field, expected, torch.device("cpu")))).clamp(0, 1)
    assert shown.shape == (*expected, 3) and shown.dtype == np.uint8
    assert np.abs(shown[..., ::-1] - (255 * expected_values).round().numpy()).max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_high_dynamic_range_is_rendered_to_exr(channels, tmp_path):
    lamp = (10 ** np.random.default_rng(0).uniform(-3, 3, (8, 9, channels))).astype(np.float32)
    source = photos.read(photos.write(lamp, tmp_path / "lamp.exr"))
    run_render(checkpoint(tmp_path / "checkpoint.pt", source), tmp_path / "lamp2.png", None, 2.0)
    assert not (tmp_path / "lamp2.png").exists()
    shown = photos.read(tmp_path / "lamp2.exr")
    assert shown.size == (16, 18) and shown.encoding.channels == channels and shown.encoding.dtype == "float32"


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        (None, 0.0),
        (None, -1.0),
        (None, 1e9),
        (None, math.nan),
        (None, math.inf),
        ((0, 5), 1.0),
        ((5, -5), 1.0),
        ((1, 1 << 20), 1.0),
    ],
)
def test_a_size_that_can_not_be_is_named(size, scale, tmp_path):
    path = checkpoint(tmp_path / "checkpoint.pt", steps=0)
    with pytest.raises(UserError, match="--size|--scale"):
        run_render(path, tmp_path / "picture.png", size, scale)
    assert files(tmp_path) == {"checkpoint.pt"}


def test_what_can_not_be_rendered_is_named(tmp_path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match="missing.pt is no file"):
        run_render(tmp_path / "missing.pt", tmp_path / "a.png", None, 1.0)
    with pytest.raises(UserError, match="file is not the checkpoint of an image fit"):
        run_render(tmp_path / "file", tmp_path / "a.png", None, 1.0)
    path = checkpoint(tmp_path / "checkpoint.pt", steps=0)
    for output in (tmp_path / "file" / "a.png", Path(".")):
        with pytest.raises(UserError, match="--output is"):
            run_render(path, output, None, 1.0)
    assert (tmp_path / "file").read_text() == "keep"


# -------------------------------------------------------------------------------------------------------------- report


def pictures_of(photo: Photo, errors: list[torch.Tensor]) -> list[report.Picture]:
    return [
        report.Picture(f"sampler {n}", 1, photo.values + error, 20.0, Path("out/runs/x.png"), None)
        for n, error in enumerate(errors)
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(0, 99))
def test_crops_are_where_errors_differ_most_and_do_not_overlap(height, width, side, samplers, seed):
    side, random = min(side, height, width), torch.Generator().manual_seed(seed)
    photo = make_photo(height, width, seed=seed)
    errors = [torch.randn(height, width, 3, generator=random) for _ in range(samplers)]
    squared = [error.double().square().mean(dim=-1) for error in (errors[0], errors[-1])]
    difference = (squared[0] - squared[1]).abs() if samplers > 1 else squared[0]
    scores = {
        (row, column): float(difference[row : row + side, column : column + side].sum())
        for row in range(height - side + 1)
        for column in range(width - side + 1)
    }
    found = report.largest_differences(photo, pictures_of(photo, errors), side)
    assert 1 <= len(found) <= report.CROPS and set(found) <= scores.keys()
    free = dict(scores)
    for row, column in found:
        assert free[row, column] >= max(free.values()) * (1 - 1e-5)  # a KeyError where it overlaps
        free = {at: s for at, s in free.items() if abs(at[0] - row) >= side or abs(at[1] - column) >= side}
    assert len(found) == report.CROPS or not free


def test_a_perfect_reconstruction_can_be_shown(tmp_path):
    photo = make_photo()
    pictures = pictures_of(photo, [torch.zeros_like(photo.values)] * 2)
    for figure in (report.crops(photo, pictures), report.maps(photo, pictures)):
        figure.savefig(tmp_path / "figure.png")
        assert pixels_of(tmp_path / "figure.png").std() > 0


# ----------------------------------------------------------------------------------------------------------- forecast


def test_forecasts_are_between_none_and_all_of_the_truth(photo_file, capsys):
    forecast.main(forecast.Forecast(photo_file, at=(3, 40), config=CONFIG))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [row[0].strip() for row in rows[1:]]
    assert len(names) >= 8 and all(0 <= float(value) <= 1 for row in rows[1:] for value in row[1:] if value.strip())
    assert any(name.startswith("own error") for name in names)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_tile_means_are_the_means_of_tiles(height, width, side):
    values = torch.rand(height, width, generator=torch.Generator().manual_seed(height))
    means = forecast.tile_means(values, side)
    for row in range(height):
        for column in range(width):
            top, left = row // side * side, column // side * side
            torch.testing.assert_close(means[row, column], values[top : top + side, left : left + side].mean())


def test_what_is_known_explains_itself_and_noise_explains_nothing():
    values, noise = torch.randn(2, 50, 60, generator=torch.Generator().manual_seed(0))
    assert abs(forecast.explained(3 - 2 * values, values) - 1) < 1e-5 and forecast.explained(noise, values) < 0.01
