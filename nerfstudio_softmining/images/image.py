"""`softmining image`: fits of a photograph with several samplers and seeds, and their report."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import torch
from nerfstudio.utils.rich_utils import CONSOLE
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn

from nerfstudio_softmining.bench.meter import Meter
from nerfstudio_softmining.bench.results import Results, check_flags, make_progress, write_bytes
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import file_name
from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images import report
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, Settings, fingerprint, load, load_field, make_settings, render, save
from nerfstudio_softmining.images.photo import Photo, fit_within

LIVE_PSNR_EVERY = 100
"""Iterations between two updates of the PSNR in the progress bar."""
LIVE_PSNR_PIXELS = 1 << 14
"""Pixels of which that PSNR is computed."""
FIRST_PREVIEW = 100
"""Iteration of the first preview."""
PREVIEW_SIDE = 512
"""Longer side in pixels of previews."""
DRAWS_SIDE = 384
"""Longer side in pixels of the picture of draws."""
SAVE_EVERY = 1000
"""Iterations between two checkpoints."""
COMPARED_ROWS = 256
"""Rows that are compared with the photograph at a time."""
LARGEST_SIDE = 1 << 16
"""Pixels of the longest side that can be rendered."""


@contextlib.contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second ends the process at once.

    Outside of the main thread, Python cannot handle signals, and the event is never set.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)
        CONSOLE.print("[yellow]Stopping after this step; what is there is kept. Ctrl-C again to quit now.[/yellow]")

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclasses.dataclass
class Run:
    """One fit of a comparison."""

    settings: Settings
    at: tuple[int, ...]
    """Iterations of evaluations."""
    folder: Path
    """Folder of its files."""

    @property
    def name(self) -> str:
        """Return the name that is shown to users."""
        return f"{self.settings.sampler}, seed {self.settings.seed}"

    @property
    def checkpoint(self) -> Path:
        """Return the file from which the fit resumes."""
        return self.folder / "checkpoint.pt"


def run_image(
    path: Path, output: Path, samplers: tuple[str, ...], seeds: tuple[int, ...], at: tuple[int, ...], config: FitConfig
) -> int:
    """Fit what has not been fitted yet, then write the report.

    Args:
        path: the photograph.
        output: folder for everything that comes out.
        samplers: ways of choosing points, with settings of their own after commas.
        seeds: seeds of the fits.
        at: iterations of evaluations; the last ends a fit.
        config: settings that all samplers share.

    Returns:
        The exit code: 0 if all went well, 1 if a fit failed, 130 after Ctrl-C.

    Raises:
        UserError: for a photograph or settings that cannot be used, before anything is trained.
    """
    check_flags(at, samplers=samplers, seeds=seeds)
    runs = [
        Run(make_settings(sampler, seed, at[-1], config), at, output / "runs" / file_name(sampler) / str(seed))
        for seed, sampler in product(seeds, samplers)
    ]
    photo = photos.read_for_training(path)
    scene = {"size": photo.size, "fingerprint": fingerprint(photo), **dataclasses.asdict(config)}
    results = Results(output, at, {path.name: scene}, may_grow=True)
    others = results.content["settings"]["scenes"].keys() - {path.name}
    if others:
        raise UserError(
            f"--output is {output}, which has fits of another photograph ({', '.join(others)}). Name another folder."
        )
    height, width = photo.size
    megapixels = f"{height * width / 1e6:.2f} megapixels"
    CONSOLE.print(f"{path.name}: {megapixels}, {height} x {width}", markup=False, highlight=False)
    with catch_interrupt() as interrupted, make_progress() as progress:
        total = progress.add_task("all fits", total=len(runs) * at[-1], visible=len(runs) > 1)
        for number, run in enumerate(runs):
            with results.recording_failure(run.name):
                _train(run, photo, path.name, results, progress, interrupted)
            progress.update(total, completed=(number + 1) * at[-1])
            if interrupted.is_set():
                break
    pictures = []
    for run in runs:
        if run.settings.seed == seeds[0] and run.checkpoint.exists():
            with contextlib.suppress(UserError):  # has been printed as a failure
                pictures.append(_reconstruct(run, photo))
    if pictures:
        report.write(photo, pictures, results.content, output, path.name)
        report.print_summary(pictures, results.content, output)
    return 130 if interrupted.is_set() else int(bool(results.content["failures"]))


def _train(
    run: Run, photo: Photo, scene: str, results: Results, progress: Progress, interrupted: threading.Event
) -> None:
    """Train from the last checkpoint to the last evaluation, or until Ctrl-C."""
    settings, at = run.settings, run.at
    entries = results.entries(scene, settings.sampler, settings.seed)
    evaluated = {entry["iteration"] for entry in entries}
    # results come first: a process that ends before its first checkpoint leaves them alone, and is made anew
    state = load(run.checkpoint, photo.values.device) if run.checkpoint.exists() else None
    if state is not None and not evaluated.issuperset(i for i in at if i <= state["iteration"]):
        raise UserError(
            f"{results.path} lacks results of {run.checkpoint}, which is at iteration {state['iteration']}. Remove the "
            "latter to fit anew, or name another --output."
        )
    if state is not None and state["iteration"] >= at[-1]:
        return
    fit = Fit(photo, settings)
    meter = Meter(0.0 if state is None else state["seconds"])
    if state is not None:
        fit.load_state_dict(state)
    task = progress.add_task(run.name, total=at[-1], completed=fit.iteration)
    stop = interrupted.is_set()
    try:
        while fit.iteration < at[-1] and not stop:
            with meter:
                fit.step()
            iteration = fit.iteration
            progress.update(task, completed=iteration)
            if iteration % LIVE_PSNR_EVERY == 0:
                progress.update(task, description=f"{run.name}: {fit.psnr(LIVE_PSNR_PIXELS):.1f} dB")
            if iteration == FIRST_PREVIEW or iteration in at:
                picture = torch.cat(list(fit.render(fit_within(photo.size, PREVIEW_SIDE))))
                write_bytes(255 * photos.to_rgb(picture), run.folder / f"preview_{iteration:06}.jpg")
            if iteration in at and iteration not in evaluated:
                entry = {"method": fit.field.implementation, "iteration": iteration, "psnr": round(fit.psnr(), 4)}
                results.add(scene, settings.sampler, settings.seed, {**entry, **meter.read(settings.config.batch)})
            stop = interrupted.is_set()  # once a step, so that the last one is saved
            if iteration % SAVE_EVERY == 0 or iteration in at or stop:
                save({**fit.state_dict(), "seconds": meter.seconds}, run.checkpoint)
    finally:
        progress.remove_task(task)
    if fit.iteration > 0:
        write_bytes(_picture_of_draws(fit), run.folder / "draws.png")


def _picture_of_draws(fit: Fit) -> NDArray[np.float32]:
    """Return how often each part of the photograph was drawn in the last batches, relative to a uniform draw.

    In the picture [h, w], 128 is as often, and 16 steps are a factor of two.
    """
    rows, columns = fit_within(fit.photo.size, DRAWS_SIDE)
    while rows * columns > 1 and sum(map(len, fit.drawn)) < 4 * rows * columns:
        rows, columns = max(1, rows // 2), max(1, columns // 2)
    position = torch.cat(list(fit.drawn)).cpu() / fit.size.cpu()
    cell = (position * torch.tensor((rows, columns))).long()
    count = torch.bincount(cell[:, 0] * columns + cell[:, 1], minlength=rows * columns).view(rows, columns)
    often = count / count.float().mean()
    return (128 + 16 * often.clamp_min(2**-8).log2()).clamp(0, 255).numpy()


def _reconstruct(run: Run, photo: Photo) -> report.Picture:
    """Write the reconstruction of a fit at its full size; return it with its PSNR over all pixels."""
    state = load(run.checkpoint, photo.values.device)
    field, _ = load_field(state, photo.values.device)
    picture = _render_all(field, photo.values.shape, photo.values.device, f"Rendering {run.settings.sampler}")
    picture.clamp_(0, 1)
    # some rows at a time, which bounds the memory
    squared = sum(
        float((part - truth.cpu()).square().sum(dtype=torch.float64))
        for part, truth in zip(picture.split(COMPARED_ROWS), photo.values.split(COMPARED_ROWS), strict=True)
    )
    error = squared / picture.numel()
    psnr = -10 * math.log10(error) if error > 0 else math.inf
    path = photos.write(photo.encoding.decode(picture), run.folder / "reconstruction")
    draws = cv2.imread(str(run.folder / "draws.png"), cv2.IMREAD_GRAYSCALE)
    octaves = None if draws is None else (draws.astype(np.float32) - 128) / 16
    return report.Picture(run.settings.sampler, state["iteration"], picture, psnr, path, octaves)


def _render_all(field: nn.Module, shape: Sequence[int], device: torch.device, description: str) -> Tensor:
    """Return the whole picture [h, w, c] of a field, on the CPU, with a progress bar."""
    picture, row = torch.empty(*shape), 0
    with make_progress(transient=True) as progress:
        task = progress.add_task(description, total=len(picture))
        for part in render(field, (shape[0], shape[1]), device):
            picture[row : row + len(part)] = part
            row += len(part)
            progress.update(task, completed=row)
    return picture


def run_render(checkpoint: Path, output: Path, size: tuple[int, int] | None, scale: float) -> None:
    """Render a checkpoint of `softmining image`.

    Args:
        checkpoint: checkpoint.pt of a fit.
        output: file of the picture; its suffix becomes .png, or .exr for high dynamic range.
        size: height and width in pixels; those of the photograph times `scale` if None.
        scale: factor on the photograph's size.

    Raises:
        UserError: if the checkpoint or the size cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = load(checkpoint, device)
    field, encoding = load_field(state, device)
    height, width = size or (round(side * scale) if math.isfinite(scale) else 0 for side in state["photo"]["size"])
    if not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE):
        raise UserError(
            f"the picture would have {height} x {width} pixels: each side has 1 to {LARGEST_SIDE:,}. Change --size or "
            f"--scale ({scale})."
        )
    picture = _render_all(field, (height, width, encoding.channels), device, "Rendering")
    try:
        path = photos.write(encoding.decode(picture), output)
    except OSError as error:
        raise UserError(f"--output is {output}, which cannot be written ({error}). Name another file.") from error
    CONSOLE.print(f"{path}: {height} x {width} pixels", markup=False, highlight=False, soft_wrap=True)
