"""Training of one run by nerfstudio's trainer, with evaluations between steps; it resumes after a crash."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.scripts.train import _set_random_seed
from torch import Tensor

from nerfstudio_softmining.bench.meter import Meter
from nerfstudio_softmining.bench.results import write_bytes
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.trainer import RESUME

METRICS = ("psnr", "ssim", "lpips")


@dataclass
class Run:
    """A run, and its evaluations so far."""

    config: TrainerConfig
    """Settings, which also name the folder of checkpoints."""
    at: tuple[int, ...]
    """Iterations of evaluations."""
    views: tuple[int, ...]
    """Held-out views to render; all if empty."""
    entries: list[dict]
    """Evaluations that are finished already; `train` does not make them again."""
    pictures: Path | None = None
    """Folder for renders of the first view; none are written if None."""


def train(run: Run, on_evaluation: Callable[[dict], None], on_step: Callable[[int], None]) -> None:
    """Train from the last checkpoint to the last evaluation.

    Args:
        run: the run.
        on_evaluation: called with each new evaluation.
        on_step: called with the number of finished iterations after each.
    """
    checkpoints = run.config.get_base_dir() / "nerfstudio_models"
    if not run.entries:
        shutil.rmtree(run.config.get_base_dir(), ignore_errors=True)
    trainer = _set_up(run.config, checkpoints)
    start = trainer._start_step
    meter = Meter(next((entry["seconds"] for entry in run.entries if entry["iteration"] == start), 0.0))
    on_step(start)
    for step in range(start, run.at[-1]):
        with meter:
            trainer.pipeline.train()
            for callback in trainer.callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            trainer.train_iteration(step)
            for callback in trainer.callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        iteration = step + 1
        on_step(iteration)
        if iteration not in run.at:
            continue
        if all(entry["iteration"] != iteration for entry in run.entries):
            picture = run.pictures and run.pictures / f"{iteration}.png"
            with compat.fork_random_state(trainer.device):
                metrics = evaluate(trainer, run.views, picture)
            rays = trainer.pipeline.datamanager.get_train_rays_per_batch()
            on_evaluation({"iteration": iteration, **metrics, **meter.read(rays)})
        if iteration < run.at[-1]:
            trainer.save_checkpoint(step)  # after its evaluation is written, which has the seconds until then
    shutil.rmtree(checkpoints, ignore_errors=True)  # some hundred megabytes that nothing reads any more
    (run.config.get_base_dir() / RESUME).unlink(missing_ok=True)


def _set_up(config: TrainerConfig, checkpoints: Path) -> Trainer:
    """Return a trainer, resumed from the last checkpoint if there is one that can be read."""
    config.load_dir = checkpoints if any(checkpoints.glob("*.ckpt")) else None
    _set_random_seed(config.machine.seed)
    with compat.lenient_metrics():
        trainer: Trainer = config.setup(local_rank=0, world_size=1)
        try:
            trainer.setup(test_mode="test")
        except (UserError, RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            if config.load_dir is None:
                raise
            shutil.rmtree(checkpoints)  # nerfstudio's own trainer was killed while it wrote one
            return _set_up(config, checkpoints)
    return trainer


@torch.no_grad()
def evaluate(trainer: Trainer, views: tuple[int, ...], picture: Path | None = None) -> dict[str, float | None]:
    """Return mean metrics over held-out views; None for a metric that the model does not have.

    Args:
        trainer: trainer of the model.
        views: held-out views by their number; all if empty.
        picture: file for the first view's truth and render, side by side.

    Raises:
        UserError: if there is no such view.
    """
    pipeline: Any = trainer.pipeline
    manager = pipeline.datamanager
    count = len(manager.eval_dataset)
    if any(view >= count for view in views):
        raise UserError(f"views are {list(views)}, but the scene has {count} held-out views, 0 to {count - 1}.")
    pipeline.eval()
    rows = []
    for view in views or range(count):
        camera, batch = manager.fixed_indices_eval_dataloader.get_camera(view)
        outputs = pipeline.model.get_outputs_for_camera(camera)
        metrics, images = metrics_within_mask(pipeline.model, outputs, batch)
        rows.append(metrics)
        if picture is not None and not picture.exists():
            # models of a coarse and a fine stage have the render of each beside the truth
            image, width = images["img"].clamp(0, 1).cpu(), int(camera.width)
            write_bytes(255 * torch.cat((image[:, :width], image[:, -width:]), dim=1).numpy(), picture)
    pipeline.train()
    # models of a coarse and a fine stage have metrics of each
    values = {key: [row.get(key, row.get(f"fine_{key}", math.nan)) for row in rows] for key in METRICS}
    means = {key: float(torch.tensor(values[key], dtype=torch.float64).nanmean()) for key in METRICS}
    return {key: None if math.isnan(value) else round(value, 4) for key, value in means.items()}


def metrics_within_mask(model: Any, outputs: dict, batch: dict) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return a model's own metrics and images of a held-out view, of the pixels within its mask alone.

    A model is not trained outside of masks, so what it renders there is arbitrary. Its own metrics count these pixels.
    Here they are black in truth and render. PSNR and SSIM are scaled to the valid part of the image, and are NaN where
    there is none. LPIPS is that of the blackened images.

    Args:
        model: the model.
        outputs: its outputs for the view.
        batch: the view's image (H, W, 3 or 4), and its mask (H, W, 1) if it has one.
    """
    if "mask" not in batch:
        return model.get_image_metrics_and_images(outputs, batch)
    mask = batch["mask"].to(batch["image"].device)
    fraction = float(mask.float().mean()) or math.nan
    image = batch["image"] * mask
    image[..., 3:] += ~mask  # opaque, so that no background shows
    renders = {name: render * mask.to(render.device) for name, render in outputs.items() if name.startswith("rgb")}
    metrics, images = model.get_image_metrics_and_images({**outputs, **renders}, {**batch, "image": image})
    for name in metrics:
        if name.endswith("psnr"):
            metrics[name] += 10 * math.log10(fraction)
        elif name.endswith("ssim"):
            metrics[name] = 1 - (1 - metrics[name]) / fraction
    return metrics, images
