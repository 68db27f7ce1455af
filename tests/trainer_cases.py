"""Small trainings by nerfstudio's trainer in this process, and how their checkpoints compare."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.scripts.train import _set_random_seed
from nerfstudio.utils import writer

from nerfstudio_softmining.plugin.pixel_sampler import MiningPixelSamplerConfig

METHOD = "softmining-nerfacto-lite-blender"


def small_config(scene: Path, folder: Path, steps: int = 12, kind: str = "mixture", method: str = METHOD) -> Any:
    """Return the settings of a training whose steps take some milliseconds."""
    config: Any = deepcopy(all_methods[method])
    config.data = config.pipeline.datamanager.data = scene
    config.output_dir, config.experiment_name, config.timestamp, config.vis = folder, "run", "0", "tensorboard"
    config.max_num_iterations = config.decay_steps = steps
    config.machine.device_type = "cpu"
    config.steps_per_eval_batch = config.steps_per_eval_image = 4
    config.pipeline.datamanager.train_num_rays_per_batch = 64
    config.pipeline.datamanager.eval_num_rays_per_batch = 64
    if isinstance(config.pipeline.datamanager.pixel_sampler, MiningPixelSamplerConfig):
        config.pipeline.datamanager.pixel_sampler.kind = kind
        config.pipeline.datamanager.pixel_sampler.mixture.interval = 4
    config.pipeline.model.log2_hashmap_size = 10
    return config


def make_trainer(config: Any) -> Any:
    """Set up a training as ns-train does."""
    writer.EVENT_WRITERS.clear(), writer.EVENT_STORAGE.clear(), writer.GLOBAL_BUFFER.clear()
    _set_random_seed(config.machine.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def checkpoints(config: Any) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    return sorted(config.get_checkpoint_dir().glob("*.ckpt"))


def read(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Everything in nested containers, by its path."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {prefix: value}
    return {path: leaf for key, part in parts for path, leaf in flat(part, f"{prefix}/{key}").items()}


def assert_same(first: dict, second: dict) -> None:
    """Assert that two checkpoints are the same bit for bit."""
    ours, theirs = flat(first), flat(second)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[path], rtol=0, atol=0, equal_nan=True, msg=path)
        else:
            assert value == theirs[path], path
