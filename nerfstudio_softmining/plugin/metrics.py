"""What soft mining does, in numbers and pictures: for the live viewer, TensorBoard, wandb and comet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import colormaps
from nerfstudio.configs import base_config  # noqa: F401 # first, as nerfstudio's writer and it import each other
from nerfstudio.utils import writer
from nerfstudio.utils.misc import step_check
from torch import Tensor

from nerfstudio_softmining.mining.importance import effective_sample_size
from nerfstudio_softmining.plugin.pixel_sampler import MiningPixelSampler
from nerfstudio_softmining.samplers.base import MiningBatch

if TYPE_CHECKING:
    from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManager
    from nerfstudio_softmining.plugin.loss import SoftMinedLoss

MAP_SIDE = 96
"""Pixels of the longer side of the density's picture."""
GROUP = "Soft Mining"
"""Group of the metrics in TensorBoard."""


def batch_metrics(batch: MiningBatch, loss: SoftMinedLoss) -> dict[str, Tensor | float]:
    """Describe a batch that has been trained on: where its rays come from, and how they are weighted.

    Does not synchronize with the device.
    """
    count = len(batch.indices)
    metrics: dict[str, Tensor | float] = {
        "chains": batch.num_chains / count,
        "map": (count - batch.num_chains - batch.num_uniform) / count,
        "uniform": batch.num_uniform / count,
        "alpha": loss.alpha_at(batch) if batch.importance_weighted else 0.0,
    }
    if batch.restarted is not None:
        metrics["restarted chains"] = batch.restarted
    weights = torch.ones(count) if batch.weights is None else batch.weights
    low, high = weights.quantile(weights.new_tensor([0.05, 0.95]))
    metrics["effective sample size"] = effective_sample_size(weights) / count
    return metrics | {"mean weight": weights.mean(), "weight, 5 %": low, "weight, 95 %": high}


class MetricsLog:
    """Writes metrics of soft mining through nerfstudio's writers, at its own steps.

    Args:
        trainer: nerfstudio's trainer.
        loss: the weighted loss.
    """

    def __init__(self, trainer: Any, loss: SoftMinedLoss) -> None:
        self.manager: SoftMiningDataManager = trainer.pipeline.datamanager
        self.loss = loss
        self.steps_per_log = trainer.config.logging.steps_per_log
        self.steps_per_picture = trainer.config.steps_per_eval_image

    def update(self, step: int) -> None:
        """Write what is due after a step."""
        batch, sampler = self.manager.last_batch, self.manager.train_pixel_sampler
        is_read = any(not isinstance(event_writer, writer.LocalWriter) for event_writer in writer.EVENT_WRITERS)
        if not is_read or batch is None or not isinstance(sampler, MiningPixelSampler):
            return
        if step_check(step, self.steps_per_log, run_at_zero=True):
            for name, value in batch_metrics(batch, self.loss).items():
                writer.put_scalar(f"{GROUP}/{name}", value, step)
        if step_check(step, self.steps_per_picture, run_at_zero=True) and sampler.run is not None:
            self._write_pictures(step, batch, sampler)

    def _write_pictures(self, step: int, batch: MiningBatch, sampler: MiningPixelSampler) -> None:
        """Write the density of a view, another one each time, and a histogram of the rays' images."""
        run = sampler.run
        assert run is not None
        cached = run.sampler.images.image_index
        view = int(cached[step // self.steps_per_picture % len(cached)])
        colours = density_colours(run, view)
        if colours is not None:
            writer.put_image(f"{GROUP}/density", torch.from_numpy(colours), step)
        for event_writer in writer.EVENT_WRITERS:
            if isinstance(event_writer, writer.TensorboardWriter):
                event_writer.tb_writer.add_histogram(f"{GROUP}/image of rays", batch.indices[:, 0], step)


def density_colours(run: Any, image_index: int) -> np.ndarray | None:
    """Return the [density_picture][] of a view as colours [rows, columns, 3] in [0, 1], brighter where it is higher."""
    density = density_picture(run, image_index)
    if density is None:
        return None
    return colormaps["inferno"](density / density.max())[..., :3].astype(np.float32)


def density_picture(run: Any, image_index: int) -> np.ndarray | None:
    """Return the density p / u of rays on a training view, on a coarse grid of its pixels [rows, columns].

    Args:
        run: the sampler in use.
        image_index: the view, as counted by the data set.

    Returns:
        The densities; None where the view is not cached, or the sampler does not know its density.
    """
    images = run.sampler.images
    cache_index = int(images.cache_index[image_index])
    if cache_index < 0:
        return None
    height, width = images.sizes[cache_index]
    step = max(1, -(-max(height, width) // MAP_SIDE))
    rows, columns = (torch.arange(step // 2, size, step, device=images.device) for size in (height, width))
    pixels = torch.cartesian_prod(rows, columns)
    samples = images.samples_at(torch.full_like(pixels[:, 0], cache_index), pixels)
    density = run.sampler.expected_density(run.state, samples)
    return None if density is None else density.view(len(rows), len(columns)).cpu().numpy()
