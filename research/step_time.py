"""Time a lite training step with nerfstudio's torch hash encoding and with this plugin's, in turn.

python research/step_time.py --data FOLDER --scene nerf_llff_data/fern
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer

from nerfstudio_softmining.bench.preset import Scene, trainer_config
from nerfstudio_softmining.plugin import compat, model
from nerfstudio_softmining.plugin.hash_encoding import quicken

ENCODINGS = {"nerfstudio's": lambda module: [], "one look-up": quicken}
"""Hash encodings by what the output calls them: what the model is changed by."""


def make_trainer(scene: Scene, sampler: str, data: Path, folder: Path) -> Trainer:
    """Return a trainer with its images and its model."""
    trainer: Trainer = trainer_config(scene, sampler, 0, data, folder).setup(local_rank=0, world_size=1)
    trainer.setup(test_mode="test")
    trainer.pipeline.train()
    return trainer


def train(trainer: Trainer, first: int, count: int) -> list[float]:
    """Train for some steps, and return the seconds that each took."""

    def run_callbacks(location: TrainingCallbackLocation) -> None:
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, location)

    seconds = []
    for step in range(first, first + count):
        start = time.perf_counter()
        run_callbacks(TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        trainer.train_iteration(step)
        run_callbacks(TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def main(
    data: Path,
    scene: str = "nerf_llff_data/fern",
    method: str = "softmining-nerfacto-lite-llff",
    sampler: str = "detail",
    image_scale: float = 0.5,
    rounds: int = 6,
    steps: int = 30,
) -> None:
    """Print the median time of a step with each encoding, and its range over the rounds.

    Args:
        data: Folder that the scene's folder is in.
        scene: Scene to train on, by its folder.
        method: Method to train by.
        sampler: Sampler, and settings of its own after commas.
        image_scale: Factor on the resolution of the images.
        rounds: Rounds, each of which trains with both encodings in turn; the first is left out.
        steps: Steps of a round.
    """
    compat.prepare(compat.device_type())
    trainers, medians = {}, {name: [] for name in ENCODINGS}
    with tempfile.TemporaryDirectory() as folder:
        for name, change in ENCODINGS.items():
            with mock.patch.object(model, "quicken", change):
                trainers[name] = make_trainer(
                    Scene(scene, method, image_scale=image_scale), sampler, data, Path(folder)
                )
        for number in range(rounds):
            for name, trainer in trainers.items():
                medians[name].append(1000 * float(np.median(train(trainer, number * steps, steps))))
    for name, (_, *kept) in medians.items():
        print(f"{name}: {np.median(kept):.1f} ms a step ({min(kept):.1f} - {max(kept):.1f})")


if __name__ == "__main__":
    tyro.cli(main)
