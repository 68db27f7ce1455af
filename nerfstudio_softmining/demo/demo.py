"""`softmining demo`: uniform rays and soft mining side by side, on a scene of its own, by nerfstudio's commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nerfstudio_softmining.demo.scene import ensure_scene, image_files
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import naming_file, save_figure

METHOD = "softmining-nerfacto-lite-blender"
RUN = Path(METHOD, "run")
"""nerfstudio's folder of a run, within the folder of its training."""
LABELS = {"uniform": "uniform rays", "soft-mining": "soft mining"}
"""Name of each training's folder -> what pictures call it."""
RENDERS = "eval_images"
"""Folder of what ns-eval renders, within the folder of its training."""
TAIL_LINES = 15
"""Lines of a failed command's log that are shown."""
ERROR_SCALE = 0.3
"""Absolute error, of colours in [0, 1], that the end of the error pictures' colour scale stands for."""
SHOWN_VIEWS = 2
"""Held-out views that pictures are made of."""
SHOWN_IMAGES = 4
"""Training images on which rays are drawn."""
SHOWN_RAYS = 20_000
"""Rays that are drawn, of all training images."""
PROGRESS_LINE = re.compile(r"(\d+) \(\d+\.\d\d%\) ")
"""How each line of nerfstudio's table of training steps begins: "250 (25.00%) "."""

Image8 = NDArray[np.uint8]


def run_demo(output: Path, iterations: int, seed: int) -> None:
    """Render a scene, train on it with uniform rays and with soft mining, and draw both beside the truth.

    Args:
        output: Folder for everything. The scene of an earlier demo is used again, its results are kept.
        iterations: Training steps of each.
        seed: Seed of both trainings.

    Raises:
        UserError: If an argument cannot be used, or a command of nerfstudio fails.
    """
    if iterations < 1:
        raise UserError(f"--iterations is {iterations}: there must be at least 1. The demo is made for 500.")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output is {output}, which is a file. Name a folder.")
    console = Console()
    output = output.resolve()  # the saved settings must lead to the scene from wherever they are loaded
    scene, folder = output / "scene", fresh_folder(output)
    ensure_scene(scene)
    trainings = [folder / name for name in LABELS]
    seconds = [train(training, scene, iterations, seed, console) for training in trainings]
    results = [evaluate(training, console) for training in trainings]
    draw_pictures(trainings, scene, folder / "pictures")
    report(results, seconds, iterations, console)
    config = trainings[-1] / RUN / "config.yml"
    lines = [f"Look at {folder / 'pictures'}. All of it is in {folder}.", "Look further:"]
    lines += [f"  ns-viewer --load-config {shlex.quote(str(config))}"]
    lines += [f"  tensorboard --logdir {shlex.quote(str(folder))}"]
    lines += ["Your own images:", "  ns-train softmining-nerfacto --data <folder>"]
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def fresh_folder(output: Path) -> Path:
    """Make `run` in a new folder, else `run-2`, `run-3` and so on, so that no result is overwritten."""
    number, folder = 1, output / "run"
    while folder.exists():
        number += 1
        folder = output / f"run-{number}"
    folder.mkdir(parents=True)
    return folder


def report(results: list[dict[str, float]], seconds: list[float], iterations: int, console: Console) -> None:
    """Print how well each training went, and how long it took."""
    table = Table(title=f"Held-out views after {iterations} iterations, one seed", title_justify="left")
    for name in ("", "PSNR", "SSIM", "training time, with start-up"):
        table.add_column(name, justify="right")
    for label, result, duration in zip(LABELS.values(), results, seconds, strict=True):
        minutes, rest = divmod(round(duration), 60)
        table.add_row(label, f"{result['psnr']:.2f} dB", f"{result['ssim']:.4f}", f"{minutes} min {rest} s")
    console.print(table)


# ---------------------------------------------------------------------------------------------- nerfstudio's commands


def train(training: Path, scene: Path, iterations: int, seed: int, console: Console) -> float:
    """Run ns-train.

    Args:
        training: Folder for it, named as in [LABELS][].
        scene: Folder of the scene.
        iterations: Training steps.
        seed: Seed of the training.
        console: Where progress is shown.

    Returns:
        How long it took, in seconds, from start to end of the command.
    """
    arguments = [METHOD, "--data", str(scene), "--output-dir", str(training.parent)]
    arguments += ["--experiment-name", training.name, "--timestamp", RUN.name]
    arguments += ["--max-num-iterations", str(iterations), "--machine.seed", str(seed)]
    arguments += ["--decay-steps", str(2 * iterations)]  # so few steps teach more while the learning rate is high
    arguments += ["--vis", "tensorboard"]  # with a viewer, nerfstudio waits for Ctrl-C after training
    arguments += ["--logging.local-writer.max-log-size", "0"]  # new lines, not a table redrawn in place
    if training.name == "uniform":
        arguments += ["--pipeline.datamanager.pixel-sampler.kind", "uniform"]
    columns = ["{task.description}", BarColumn(), MofNCompleteColumn(), "iterations,"]
    columns += [TimeElapsedColumn(), "gone,", TimeRemainingColumn(), "to go"]
    training.mkdir()
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"Training with {LABELS[training.name]}", total=iterations)

        def advance(line: str) -> None:
            if match := PROGRESS_LINE.match(line):
                progress.update(task, completed=int(match.group(1)))

        run_logged("train", arguments, training / "train.log", advance)
        progress.update(task, completed=iterations)
    return time.perf_counter() - start


def evaluate(training: Path, console: Console) -> dict[str, float]:
    """Run ns-eval on the held-out views, and return what it measures by its name."""
    numbers = training / "eval.json"
    arguments = ["--load-config", str(training / RUN / "config.yml"), "--output-path", str(numbers)]
    arguments += ["--render-output-path", str(training / RENDERS)]
    columns = SpinnerColumn(), "{task.description}", TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(f"Rendering the held-out views of {LABELS[training.name]}")
        run_logged("eval", arguments, training / "eval.log", lambda line: None)
    return json.loads(numbers.read_text(encoding="utf-8"))["results"]


def run_logged(script: str, arguments: list[str], log: Path, on_line: Callable[[str], None]) -> None:
    """Run one of nerfstudio's commands to its end, in this Python environment.

    Args:
        script: Module in `nerfstudio.scripts`: `train` is ns-train.
        arguments: Its command line.
        log: File for all that it prints.
        on_line: Called with each line while the command runs.

    Raises:
        UserError: If the command fails, with the end of its log.
    """
    command = [sys.executable, "-m", f"nerfstudio.scripts.{script}", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with (
        naming_file(log),
        log.open("w", encoding="utf-8", buffering=1) as file,
        Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, encoding="utf-8", errors="replace") as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                on_line(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-TAIL_LINES:])
        raise UserError(
            f"ns-{script} ended with exit code {process.returncode}. The end of what it said:\n\n{tail}\n\n"
            f"All of it is in {log}. `softmining doctor` tells whether something is missing here."
        )


# ----------------------------------------------------------------------------------------------------------- pictures


def draw_pictures(trainings: list[Path], scene: Path, folder: Path) -> None:
    """Draw held-out views beside their renders, and where on the training images soft mining draws its rays."""
    folder.mkdir()
    views = sorted(path.name for path in (trainings[0] / RENDERS).glob("eval_img_*.png"))
    for view in np.unique(np.linspace(0, len(views) - 1, SHOWN_VIEWS + 2).astype(int)[1:-1]):
        pairs = [np.split(read_rgb(training / RENDERS / views[view]), 2, axis=1) for training in trainings]
        renders = {LABELS[training.name]: render for training, (_, render) in zip(trainings, pairs, strict=True)}
        save_figure(comparison(pairs[0][0], renders), folder / f"held_out_view_{view}.png", dpi=150)
    images = [read_rgb(path) for path in image_files(scene, "train")]
    figure = rays_figure(images, next_rays(trainings[-1] / RUN, images))
    save_figure(figure, folder / "where_the_rays_go.png", dpi=150)


def read_rgb(path: Path) -> Image8:
    """Read an image on white, [height, width, 3]."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def next_rays(run: Path, images: list[Image8]) -> NDArray[np.int64]:
    """Draw the rays that the sampler would draw next, were training to go on.

    Args:
        run: nerfstudio's folder of the demo's own run, whose last checkpoint is loaded. It can run code with torch
            before 2.4 alone, which cannot load nerfstudio's checkpoints safely.
        images: Training images, each [height, width, 3].

    Returns:
        Index of the training image, row and column of each ray, [N, 3].
    """
    import torch

    from nerfstudio_softmining.plugin.checkpoints import read_newest
    from nerfstudio_softmining.plugin.pixel_sampler import MiningPixelSamplerConfig

    _, state = read_newest(run / "nerfstudio_models")
    sampler = MiningPixelSamplerConfig(num_rays_per_batch=SHOWN_RAYS).setup()
    sampler.training = True
    sampler.load_state_dict(state["pipeline"]["datamanager._extra_state"]["sampler"])
    batch = {"image": [torch.from_numpy(image / np.float32(255)) for image in images]}
    return sampler.sample(batch | {"image_idx": torch.arange(len(images))})["indices"].numpy()


def comparison(truth: Image8, renders: dict[str, Image8]) -> Figure:
    """Draw truth and renders in a row, and the errors of the renders below.

    Args:
        truth: [height, width, 3].
        renders: Renders [height, width, 3] by their titles.
    """
    figure = Figure(figsize=(3.6 * (1 + len(renders)), 7.2), layout="constrained")
    (first, *above), (empty, *below) = figure.subplots(2, 1 + len(renders))
    first.imshow(truth)
    first.set_title("held-out view")
    shown = None
    for upper, lower, (title, render) in zip(above, below, renders.items(), strict=True):
        difference = (truth.astype(np.float32) - render) / 255.0
        psnr = -10.0 * np.log10(max(np.mean(difference**2), 1e-10))
        upper.imshow(render)
        upper.set_title(f"{title}: {psnr:.1f} dB")
        shown = lower.imshow(np.abs(difference).mean(-1), cmap="magma", vmin=0.0, vmax=ERROR_SCALE)
    for axis in (first, empty, *above, *below):
        axis.set_axis_off()
    assert shown is not None
    scale = empty.inset_axes((0.8, 0.05, 0.06, 0.9))  # within the empty place, which keeps the columns together
    figure.colorbar(shown, cax=scale, extend="max", label="absolute error, mean over channels")
    scale.yaxis.set_ticks_position("left")
    scale.yaxis.set_label_position("left")
    return figure


def rays_figure(images: list[Image8], indices: NDArray[np.int64]) -> Figure:
    """Draw rays on the training images that have most of them.

    Args:
        images: Training images, each [height, width, 3].
        indices: Index of the image, row and column of each ray, [N, 3].
    """
    counts = np.bincount(indices[:, 0], minlength=len(images))
    shown = np.argsort(-counts, kind="stable")[:SHOWN_IMAGES]
    figure = Figure(figsize=(3.2 * len(shown), 3.9), layout="constrained")
    figure.suptitle(f"Where {len(indices):,} rays go, on the training images that have most of them")
    for axis, index in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        height, width = images[index].shape[:2]
        axis.imshow(255 - (255 - images[index]) // 3, extent=(0, width, height, 0))
        row, column = indices[indices[:, 0] == index, 1:].T + 0.5
        axis.scatter(column, row, s=5, c="crimson", linewidths=0)
        axis.set_title(f"image {index}: {counts[index]} rays")
        axis.set(xlim=(0, width), ylim=(height, 0))
        axis.set_axis_off()
    return figure
