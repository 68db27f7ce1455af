"""`softmining demo`: a whole training on a scene of its own, through nerfstudio's commands, and pictures of it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from nerfstudio_softmining.demo.scene import ensure_scene, image_files
from nerfstudio_softmining.errors import UserError

METHOD = "softmining-nerfacto-lite-blender"
EXPERIMENT = "demo"
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


@dataclass(frozen=True)
class Places:
    """Where one demo keeps its files."""

    output: Path
    """Folder of everything."""
    run_name: str
    """Name of the training run, nerfstudio's `--timestamp`."""

    @property
    def scene(self) -> Path:
        """The data set."""
        return self.output / "scene"

    @property
    def runs(self) -> Path:
        """nerfstudio's `--output-dir`."""
        return self.output / "outputs"

    @property
    def run(self) -> Path:
        """Folder of the training run."""
        return self.runs / EXPERIMENT / METHOD / self.run_name

    @property
    def config(self) -> Path:
        """What ns-eval, ns-viewer and ns-render load."""
        return self.run / "config.yml"

    @property
    def checkpoint(self) -> Path:
        """The run's last checkpoint."""
        return max((self.run / "nerfstudio_models").glob("step-*.ckpt"))

    @property
    def train_log(self) -> Path:
        """All that ns-train prints."""
        return self.output / "train.log"

    @property
    def eval_log(self) -> Path:
        """All that ns-eval prints."""
        return self.output / "eval.log"

    @property
    def numbers(self) -> Path:
        """What ns-eval has measured."""
        return self.output / "eval.json"

    @property
    def renders(self) -> Path:
        """What ns-eval has rendered."""
        return self.output / "eval_images"

    @property
    def pictures(self) -> Path:
        """Pictures to look at."""
        return self.output / "pictures"

    @property
    def results(self) -> list[Path]:
        """All that the next demo in the same folder would overwrite."""
        return [self.train_log, self.eval_log, self.numbers, self.renders, self.pictures]


def run_demo(output: Path, iterations: int, seed: int) -> None:
    """Render a scene, train on it, measure the result and draw it.

    Args:
        output: Folder for everything; the scene of an earlier demo is used again, its results are kept.
        iterations: Training steps.
        seed: Seed of the training.
    """
    if iterations < 1:
        raise UserError(f"--iterations is {iterations}: there must be at least 1. The demo is made for 1000.")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output is {output}, which is a file. Name a folder.")
    console = Console()
    output = output.resolve()  # the saved settings must lead to the scene from wherever they are loaded
    output.mkdir(parents=True, exist_ok=True)
    places = Places(output, fresh_run_name(output))
    keep_earlier_results(places, console)
    ensure_scene(places.scene)
    seconds = train(places, iterations, seed, console)
    evaluate(places, console)
    draw_pictures(places)
    report(places, iterations, seconds, console)


def fresh_run_name(output: Path) -> str:
    """`run` in a new folder, else `run-2`, `run-3` and so on: a run is never written over."""
    number, name = 1, "run"
    while Places(output, name).run.exists():
        number += 1
        name = f"run-{number}"
    return name


def keep_earlier_results(places: Places, console: Console) -> None:
    """Move what an earlier demo in this folder has left beside its run out of the way, and say where to."""
    found = [path for path in places.results if path.exists()]
    if not found:
        return
    number = 1
    while (kept := places.output / "earlier" / str(number)).exists():
        number += 1
    kept.mkdir(parents=True)
    for path in found:
        path.rename(kept / path.name)
    console.print(f"The log, numbers and pictures of the demo before this one are now in {kept}", soft_wrap=True)


# ---------------------------------------------------------------------------------------------- nerfstudio's commands


def train(places: Places, iterations: int, seed: int, console: Console) -> float:
    """Run ns-train.

    Returns:
        How long it took, in seconds, from start to end of the command.
    """
    arguments = [METHOD, "--data", str(places.scene), "--output-dir", str(places.runs)]
    arguments += ["--experiment-name", EXPERIMENT, "--timestamp", places.run_name]
    arguments += ["--max-num-iterations", str(iterations), "--machine.seed", str(seed)]
    arguments += ["--vis", "tensorboard"]  # with a viewer, nerfstudio waits for Ctrl-C after training
    arguments += ["--logging.local-writer.max-log-size", "0"]  # new lines, not a table redrawn in place
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("iterations,")]
    columns += [TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("to go")]
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Training", total=iterations)

        def advance(line: str) -> None:
            match = PROGRESS_LINE.match(line)
            if match:
                progress.update(task, completed=int(match.group(1)))

        run_logged("train", arguments, places.train_log, advance)
        progress.update(task, completed=iterations)
    return time.perf_counter() - start


def evaluate(places: Places, console: Console) -> None:
    """Run ns-eval on the held-out views."""
    arguments = ["--load-config", str(places.config), "--output-path", str(places.numbers)]
    arguments += ["--render-output-path", str(places.renders)]
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("Rendering the held-out views")
        run_logged("eval", arguments, places.eval_log, lambda line: None)


def run_logged(script: str, arguments: list[str], log: Path, on_line: Callable[[str], None]) -> None:
    """Run one of nerfstudio's commands to its end, in this Python environment.

    Args:
        script: Module in `nerfstudio.scripts`: `train` is ns-train.
        arguments: Its command line.
        log: File for all that it prints.
        on_line: Is told each line while the command runs.

    Raises:
        UserError: If the command fails, with the end of its log.
    """
    command = [sys.executable, "-m", f"nerfstudio.scripts.{script}", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with (
        log.open("w", encoding="utf-8", buffering=1) as file,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
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


def draw_pictures(places: Places) -> None:
    """Draw held-out views beside their renders, and where on the training images the sampler looks."""
    places.pictures.mkdir()
    views = sorted(places.renders.glob("eval_img_*.png"))
    for view in np.unique(np.linspace(0, len(views) - 1, SHOWN_VIEWS + 2).astype(int)[1:-1]):
        truth, render = np.split(read_rgb(views[view]), 2, axis=1)
        comparison(truth, render).savefig(places.pictures / f"held_out_view_{view}.png", dpi=150)
    images = [read_rgb(path) for path in image_files(places.scene, "train")]
    indices = next_rays(places.checkpoint, images)
    rays_figure(images, indices).savefig(places.pictures / "where_the_rays_go.png", dpi=150)


def read_rgb(path: Path) -> Image8:
    """An image on white, [height, width, 3]."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def next_rays(checkpoint: Path, images: list[Image8]) -> NDArray[np.int64]:
    """Rays that the sampler would draw next, were training to go on.

    Args:
        checkpoint: A checkpoint of the demo's own run; it is unpickled.
        images: Training images, each [height, width, 3].

    Returns:
        Index of the training image, row and column of each ray, [N, 3].
    """
    import torch

    from nerfstudio_softmining.plugin.pixel_sampler import MiningPixelSamplerConfig

    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    sampler = MiningPixelSamplerConfig(num_rays_per_batch=SHOWN_RAYS).setup()
    sampler.training = True
    sampler.load_state_dict(state["pipeline"]["datamanager._extra_state"]["sampler"])
    batch = {"image": [torch.from_numpy(image / np.float32(255)) for image in images]}
    return sampler.sample(batch | {"image_idx": torch.arange(len(images))})["indices"].numpy()


def comparison(truth: Image8, render: Image8) -> Figure:
    """Truth, render and their difference side by side.

    Args:
        truth: [height, width, 3].
        render: [height, width, 3].
    """
    difference = (truth.astype(np.float32) - render) / 255.0
    psnr = -10.0 * np.log10(max(np.mean(difference**2), 1e-10))
    figure = Figure(figsize=(10.6, 3.7), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(truth)
    axes[0].set_title("held-out view")
    axes[1].imshow(render)
    axes[1].set_title(f"render, {psnr:.1f} dB")
    shown = axes[2].imshow(np.abs(difference).mean(-1), cmap="magma", vmin=0.0, vmax=ERROR_SCALE)
    axes[2].set_title("absolute error")
    figure.colorbar(shown, ax=axes[2], extend="max", label="mean over red, green, blue", shrink=0.9)
    for axis in axes:
        axis.set_axis_off()
    return figure


def rays_figure(images: list[Image8], indices: NDArray[np.int64]) -> Figure:
    """Rays on the training images that have most of them.

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


# ------------------------------------------------------------------------------------------------------------- report


def report(places: Places, iterations: int, seconds: float, console: Console) -> None:
    """Say how well it went, and where everything is."""
    results = json.loads(places.numbers.read_text(encoding="utf-8"))["results"]
    table = Table(title="Held-out views", title_justify="left")
    for name in ("PSNR", "SSIM", "iterations", "training time, with start-up"):
        table.add_column(name, justify="right")
    minutes, rest = divmod(round(seconds), 60)
    table.add_row(f"{results['psnr']:.2f} dB", f"{results['ssim']:.4f}", str(iterations), f"{minutes} min {rest} s")
    console.print(table)
    shown = {"pictures": places.pictures, "renders": places.renders, "run": places.run, "scene": places.scene}
    shown["logs"] = places.train_log.with_name("*.log")
    lines = [f"In {places.output}:"]
    lines += [f"  {name:9} {path.relative_to(places.output)}" for name, path in shown.items()]
    lines += ["Look further:"]
    lines += [f"  ns-viewer --load-config {shlex.quote(str(places.config))}"]
    lines += [f"  tensorboard --logdir {shlex.quote(str(places.runs))}"]
    lines += ["Your own images:", "  ns-train softmining-nerfacto --data <folder>"]
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
