"""Small captures in nerfstudio's format, written by tests, and a few steps of training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from PIL import Image

SIZES = ((24, 32), (20, 28), (32, 24), (18, 22), (24, 32))
"""Height and width of images that differ."""
STEPS = 3
"""Steps of a training."""


def write_capture(
    folder: Path, num_images: int = 5, mixed_sizes: bool = False, masks: bool = False, depths: bool = False, **meta: Any
) -> Path:
    """Write noise seen from a circle, and its transforms.json.

    Args:
        folder: where it goes.
        num_images: how many images.
        mixed_sizes: whether images differ in size.
        masks: whether each has a mask, which leaves out its left third.
        depths: whether each has a depth map of 16 bit.
        meta: entries of transforms.json, such as camera_model.
    """
    random, frames = np.random.default_rng(0), []
    for name in ("images", "masks", "depths"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(num_images):
        height, width = SIZES[number % len(SIZES)] if mixed_sizes else SIZES[0]
        path = f"images/{number:03}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / path)
        angle = 2 * math.pi * number / num_images
        cosine, sine = math.cos(angle), math.sin(angle)
        pose = [[cosine, 0, sine, 3 * sine], [0, 1, 0, 0], [-sine, 0, cosine, 3 * cosine], [0, 0, 0, 1]]
        camera = {"w": width, "h": height, "cx": width / 2, "cy": height / 2, "fl_x": 30.0, "fl_y": 30.0}
        frame = {"file_path": path, "transform_matrix": pose, **camera}
        if masks:
            frame["mask_path"] = f"masks/{number:03}.png"
            mask = np.full((height, width), 255, dtype=np.uint8)
            mask[:, : width // 3] = 0
            Image.fromarray(mask).save(folder / frame["mask_path"])
        if depths:
            frame["depth_file_path"] = f"depths/{number:03}.png"
            Image.fromarray(np.full((height, width), 3000, dtype=np.uint16)).save(folder / frame["depth_file_path"])
        frames.append(frame)
    listing = folder / "transforms.json"
    listing.write_text(json.dumps({"camera_model": "OPENCV", **meta, "frames": frames}))
    return folder


def train(pipeline: VanillaPipeline) -> list[dict[str, torch.Tensor]]:
    """Train as nerfstudio's trainer does, and return the losses of each step."""
    parameters = [parameter for group in pipeline.get_param_groups().values() for parameter in group]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    scaler = torch.cuda.amp.GradScaler(enabled=False)
    callbacks = pipeline.get_training_callbacks(TrainingCallbackAttributes(None, scaler, pipeline, None))
    found = []
    for step in range(STEPS):
        pipeline.train()
        optimizer.zero_grad()
        for callback in callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        _, losses, _ = pipeline.get_train_loss_dict(step)
        sum(losses.values()).backward()
        optimizer.step()
        for callback in callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        found.append(losses)
    return found
