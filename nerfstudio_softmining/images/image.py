"""`softmining image`: fits fields to a photograph, with several samplers and seeds, and shows what comes out."""

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from nerfstudio_softmining.bench.meter import Meter
from nerfstudio_softmining.bench.results import Results
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images import photo as photos
from nerfstudio_softmining.images import report
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import (
    Fit,
    Settings,
    fingerprint,
    load,
    load_field,
    make_settings,
    num_parts,
    render,
    save,
)
from nerfstudio_softmining.images.photo import Photo
from nerfstudio_softmining.plugin import compat

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
LIVE = 100
"""Iterations between two looks at the PSNR while training."""
LIVE_PIXELS = 1 << 14
"""Pixels that these are of."""
EARLY = 100
"""Iteration of the first picture."""
PREVIEW_SIDE = 512
"""Longer side in pixels of the pictures that are made while training."""
DRAWS_SIDE = 384
"""Longer side in pixels of the picture of draws."""
SAVE_EVERY = 1000
"""Iterations between two checkpoints."""
ROWS = 256
"""Rows of a picture that are compared with the photograph at a time."""
LARGEST_SIDE = 1 << 16
"""Pixels of a side that can be rendered."""


class Stop:
    """Whether Ctrl-C was pressed; the first asks, the second ends at once."""

    asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within this, Ctrl-C asks. Elsewhere than in the main thread, nothing can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def ask(*_: object) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, previous)
            CONSOLE.print("[yellow]Stopping after this step; what is there is kept. Ctrl-C again to quit now.[/yellow]")

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


@dataclasses.dataclass
class Run:
    """One fit among those of a comparison, and where its files are."""

    settings: Settings
    at: tuple[int, ...]
    """Iterations at which PSNR is kept."""
    folder: Path
    """Folder of its files."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.settings.sampler}, seed {self.settings.seed}"

    @property
    def checkpoint(self) -> Path:
        """What it goes on from."""
        return self.folder / "checkpoint.pt"


def run_image(
    path: Path, output: Path, samplers: tuple[str, ...], seeds: tuple[int, ...], at: tuple[int, ...], config: FitConfig
) -> int:
    """Fit what has not been fitted yet, then report.

    Args:
        path: the photograph.
        output: folder for everything that comes out.
        samplers: ways of choosing points, with settings of their own after commas.
        seeds: seeds of the fits.
        at: iterations at which PSNR is kept; the last ends a fit.
        config: settings that all samplers share.

    Returns:
        The exit code: 0 if all went well, 1 if a fit failed, 130 after Ctrl-C.

    Raises:
        UserError: for a photograph or settings that cannot be used, before anything is trained.
    """
    if not at or sorted(set(at)) != list(at) or at[0] < 1:
        raise UserError(f"--at is {list(at)}: it is iterations in rising order, such as 500 1000 2000 5000.")
    for name, values in (("samplers", samplers), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} is {list(values)}: name at least one, and each once.")
    runs = [
        Run(make_settings(sampler, seed, at[-1], config), at, output / "runs" / sampler / str(seed))
        for seed, sampler in product(seeds, samplers)
    ]
    if not torch.cuda.is_available():
        compat.prepare_cpu()
    photo = photos.read(path).to("cuda" if torch.cuda.is_available() else "cpu")
    mark = fingerprint(photo)
    about = {"size": photo.size, "fingerprint": mark, **dataclasses.asdict(config)}
    results = Results(output, at, {path.name: about}, may_grow=True)
    others = results.content["settings"]["scenes"].keys() - {path.name}
    if others:
        raise UserError(
            f"--output is {output}, which has fits of another photograph ({', '.join(others)}). Name another folder."
        )
    height, width = photo.size
    megapixels = f"{height * width / 1e6:.2f} megapixels"
    CONSOLE.print(f"{path.name}: {megapixels}, {height} x {width}", markup=False, highlight=False)
    stop = Stop()
    with stop.listening(), Progress(*COLUMNS, console=CONSOLE) as progress:
        everything = progress.add_task("all fits", total=len(runs) * at[-1], visible=len(runs) > 1)
        for number, run in enumerate(runs):
            try:
                _train(run, photo, path.name, results, progress, stop)
                results.succeeded(run.name)
            except Exception as error:  # whatever it is, the other fits can still be made
                results.failed(run.name, f"{type(error).__name__}: {error}")
                CONSOLE.print(f"{run.name} failed: {error}", style="red", markup=False, highlight=False)
            progress.update(everything, completed=(number + 1) * at[-1])
            if stop.asked:
                break
    pictures = []
    for run in runs:
        if run.settings.seed == seeds[0] and run.checkpoint.exists():
            with contextlib.suppress(UserError):  # has been told of as a failure
                pictures.append(_picture(run, photo))
    if pictures:
        report.write(photo, pictures, results.content, output, path.name)
        report.tell(pictures, results.content, output)
    return 130 if stop.asked else int(bool(results.content["failures"]))


def _train(run: Run, photo: Photo, scene: str, results: Results, progress: Progress, stop: Stop) -> None:
    """Train from the last checkpoint to the last evaluation, or until Ctrl-C."""
    settings, at = run.settings, run.at
    entries = results.entries(scene, settings.sampler, settings.seed)
    known = {entry["iteration"] for entry in entries}
    state = load(run.checkpoint, photo.values.device) if entries or run.checkpoint.exists() else None
    if state is not None and not known.issuperset(i for i in at if i <= state["iteration"]):
        raise UserError(
            f"{results.path} lacks results of {run.checkpoint}, which is at iteration {state['iteration']}. Remove the "
            "latter to fit anew, or name another --output."
        )
    if state is not None and state["iteration"] >= at[-1]:
        return
    fit = Fit(photo, settings)
    before = 0.0
    if state is not None:
        fit.load_state_dict(state)
        before = state["seconds"]
    meter = Meter(before)
    task = progress.add_task(run.name, total=at[-1], completed=fit.iteration)

    def keep() -> None:
        save({**fit.state_dict(), "seconds": meter.seconds}, run.checkpoint)

    try:
        while fit.iteration < at[-1] and not stop.asked:
            with meter:
                fit.step()
            iteration = fit.iteration
            progress.update(task, completed=iteration)
            if iteration % LIVE == 0:
                progress.update(task, description=f"{run.name}: {fit.psnr(LIVE_PIXELS):.1f} dB")
            if iteration == EARLY or iteration in at:
                _preview(fit, run.folder / f"preview_{iteration:06}.jpg")
            if iteration in at and iteration not in known:
                entry = {"method": fit.field.implementation, "iteration": iteration, "psnr": round(fit.psnr(), 4)}
                results.add(scene, settings.sampler, settings.seed, {**entry, **meter.read(settings.config.batch)})
            if iteration % SAVE_EVERY == 0 or iteration in at:
                keep()
    finally:
        progress.remove_task(task)
    if fit.iteration == 0:
        return
    if stop.asked:
        keep()
    _picture_of_draws(fit, run.folder / "draws.png")


def _fitting(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A size of the same shape whose longer side is at most `side`."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _preview(fit: Fit, path: Path) -> None:
    """A small picture of what the field has learnt."""
    picture = photos.shown(torch.cat(list(fit.render(_fitting(fit.photo.size, PREVIEW_SIDE)))))
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.ascontiguousarray((picture[..., ::-1] * 255).round().astype(np.uint8)))


def _picture_of_draws(fit: Fit, path: Path) -> None:
    """Write how often each part of the photograph was drawn in the last batches, relative to a uniform draw.

    In the picture 128 is as often, and 16 steps are a factor of two.
    """
    rows, columns = _fitting(fit.photo.size, DRAWS_SIDE)
    while rows * columns > 1 and sum(map(len, fit.drawn)) < 4 * rows * columns:
        rows, columns = max(1, rows // 2), max(1, columns // 2)
    position = torch.cat(list(fit.drawn)).cpu() / fit.size.cpu()
    cell = (position * torch.tensor((rows, columns))).long()
    count = torch.bincount(cell[:, 0] * columns + cell[:, 1], minlength=rows * columns).view(rows, columns)
    often = count / count.float().mean()
    picture = (128 + 16 * often.clamp_min(2**-8).log2()).round().clamp(0, 255).to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture.numpy())


def _picture(run: Run, photo: Photo) -> report.Picture:
    """The reconstruction of a fit, written at its full size, and its PSNR over all pixels."""
    state = load(run.checkpoint, photo.values.device)
    field, _ = load_field(state, photo.values.device)
    picture = _rendered(field, photo.values.shape, photo.values.device, f"Rendering {run.settings.sampler}")
    picture.clamp_(0, 1)
    # some rows at a time, which bounds the memory
    squared = sum(
        float((part - truth.cpu()).square().sum(dtype=torch.float64))
        for part, truth in zip(picture.split(ROWS), photo.values.split(ROWS), strict=True)
    )
    error = squared / picture.numel()
    psnr = -10 * math.log10(error) if error > 0 else math.inf
    path = photos.write(photo.encoding.decode(picture), run.folder / "reconstruction")
    draws = cv2.imread(str(run.folder / "draws.png"), cv2.IMREAD_GRAYSCALE)
    octaves = None if draws is None else (draws.astype(np.float32) - 128) / 16
    return report.Picture(run.settings.sampler, state["iteration"], picture, psnr, path, octaves)


def _rendered(field: nn.Module, shape: Sequence[int], device: torch.device, description: str) -> Tensor:
    """The whole picture [h, w, c] of a field, on the CPU, with a progress bar."""
    picture, row, size = torch.empty(*shape), 0, (shape[0], shape[1])
    with Progress(*COLUMNS, console=CONSOLE, transient=True) as progress:
        for part in progress.track(render(field, size, device), total=num_parts(size), description=description):
            picture[row : row + len(part)] = part
            row += len(part)
    return picture


def run_render(checkpoint: Path, output: Path, size: tuple[int, int] | None, scale: float) -> None:
    """Render a checkpoint of `softmining image`.

    Args:
        checkpoint: its checkpoint.pt.
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
            f"the picture would have {height} x {width} pixels: each side has 1 to {LARGEST_SIDE:,}. Mend --size or "
            f"--scale ({scale})."
        )
    picture = _rendered(field, (height, width, encoding.channels), device, "Rendering")
    try:
        path = photos.write(encoding.decode(picture), output)
    except (OSError, cv2.error) as error:
        raise UserError(f"--output is {output}, which cannot be written ({error}). Name another file.") from error
    CONSOLE.print(f"{path}: {height} x {width} pixels", markup=False, highlight=False, soft_wrap=True)
