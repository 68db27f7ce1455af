"""Time and memory of a step of each sampler, against the number of training images.

    python research/sampler_cost.py --images 10 100 1000 10000 --size 400 400

Draws and updates with made-up feedback, so that rendering does not count (for `multinomial`, whose price that is, only
its draws do). All images share one photograph's worth of memory, so that their number is bounded by what samplers
keep alone.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.bench.report import make_table
from nerfstudio_softmining.bench.results import device_name
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY, SPECS, MiningPixelSampler, MiningPixelSamplerConfig
from nerfstudio_softmining.samplers.base import MiningBatch


@dataclass
class Cost:
    """Measure what choosing pixels costs."""

    images: tuple[int, ...] = (10, 100, 1000, 10000)
    """Numbers of training images."""
    size: tuple[int, int] = (400, 400)
    """Height and width of an image in pixels."""
    rays: int = 4096
    """Rays of a batch."""
    steps: int = 150
    """Steps that are timed, after 10 that are not."""
    kinds: tuple[str, ...] = tuple(kind for kind, spec in SPECS.items() if not spec.sampler.is_uniform)
    """Kinds of samplers."""
    masked: bool = False
    """Give the images masks."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where images and samplers are."""


def make_sampler(cost: Cost, kind: str, num_images: int, image: Tensor) -> tuple[MiningPixelSampler, dict]:
    """Return a sampler, and a batch of images for it."""
    config = MiningPixelSamplerConfig(kind=kind, num_rays_per_batch=cost.rays)  # type: ignore[arg-type]
    config.multinomial.refresh = 1 << 30
    sampler = MiningPixelSampler(config, num_images, lambda indices: torch.ones(len(indices), device=cost.device))
    sampler.training = True
    batch = {"image": image.expand(num_images, -1, -1, -1), "image_idx": torch.arange(num_images)}
    if cost.masked:
        batch["mask"] = (image[..., :1] > 0.2).expand(num_images, -1, -1, -1)
    return sampler, batch


def make_feedback(mining: MiningBatch) -> MiningBatch:
    """Return a batch with made-up results of a training step."""
    count, device = len(mining.indices), mining.indices.device
    mining.importance = torch.rand(count, device=device)
    mining.error = mining.weighted_error = mining.importance.square().requires_grad_()
    mining.weighted_error.grad = torch.full_like(mining.importance, 1 / count)
    mining.coords = (mining.indices[:, 1:] + 0.5).requires_grad_()
    mining.coords.grad = torch.randn(count, 2, device=device) / count
    return mining


def memory(thing: Any, found: dict[int, int] | None = None) -> int:
    """Return the bytes of all tensors that a sampler holds, except the images."""
    found = {} if found is None else found
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for part in thing.values():
            memory(part, found)
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            memory(part, found)
    elif type(thing).__module__.startswith("nerfstudio_softmining"):
        memory({k: v for k, v in vars(thing).items() if k not in ("values", "_mask", "context", "config")}, found)
    return sum(found.values())


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def count_waits(sampler: MiningPixelSampler, batch: dict, device: str) -> str:
    """Return how often a step waits for the device, on CUDA."""
    if not device.startswith("cuda"):
        return "-"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            sampler.update(make_feedback(sampler.sample(batch)[BATCH_KEY]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return str(len(waits))


def measure(cost: Cost, kind: str, num_images: int, image: Tensor) -> tuple[str, ...]:
    """Return seconds of set-up, ms of the median and the mean step, bytes per training pixel, and waits."""
    sampler, batch = make_sampler(cost, kind, num_images, image)
    durations, start = [], time.perf_counter()
    sampler.sample(batch)
    synchronize(cost.device)
    set_up = time.perf_counter() - start
    for _ in range(cost.steps + 10):
        start = time.perf_counter()
        mining = sampler.sample(batch)[BATCH_KEY]
        synchronize(cost.device)
        drawn = time.perf_counter() - start
        feedback = make_feedback(mining)
        synchronize(cost.device)
        start = time.perf_counter()
        sampler.update(feedback)
        synchronize(cost.device)
        durations.append(drawn + time.perf_counter() - start)
    milliseconds = 1000 * np.array(durations[10:])
    size = memory(sampler.run) / (num_images * cost.size[0] * cost.size[1])
    numbers = (f"{set_up:.1f}", f"{np.median(milliseconds):.2f}", f"{np.mean(milliseconds):.2f}", f"{size:.3f}")
    return (*numbers, count_waits(sampler, batch, cost.device))


def main(cost: Cost) -> None:
    """Measure and print, kind by kind."""
    if cost.device == "cpu":
        compat.prepare_cpu()
    torch.manual_seed(0)
    image = torch.rand(1, *cost.size, 3, device=cost.device)
    rows = []
    for kind in cost.kinds:
        for num_images in cost.images:
            with CONSOLE.status(f"{kind}, {num_images} images"):
                row = (kind, f"{num_images:,}", *measure(cost, kind, num_images, image))
            rows.append(row)
            CONSOLE.print("  ".join(row))  # the table comes at the end, and that may be far
    headings = ["sampler", "images", "set-up, s", "median step, ms", "mean step, ms", "bytes a pixel", "waits"]
    title = f"{device_name(cost.device)}: images of {cost.size[0]} x {cost.size[1]}, {cost.rays} rays a step"
    CONSOLE.print(make_table(title, pd.DataFrame(rows, columns=headings).set_index("sampler")))


if __name__ == "__main__":
    main(tyro.cli(Cost))
