"""One of several processes that train together on CPUs, as nerfstudio starts them on GPUs. Run by test_distributed.py.

python ddp_worker.py RANK WORLD_SIZE PORT SCENE FOLDER STEPS SAMPLER [CHECKPOINTS]
"""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.pipelines import base_pipeline
from nerfstudio.scripts.train import train_loop
from torch.nn.parallel import DistributedDataParallel

rank, world_size, port = map(int, sys.argv[1:4])
scene, folder, steps, kind = Path(sys.argv[4]), Path(sys.argv[5]), int(sys.argv[6]), sys.argv[7]
torch.set_num_threads(1)


class OnCPU(DistributedDataParallel):
    """Without the GPU that nerfstudio names for each process."""

    def __init__(self, module, device_ids, **how) -> None:
        super().__init__(module, **how)


base_pipeline.DDP = OnCPU
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)

config = deepcopy(all_methods["softmining-nerfacto-lite-blender"])
config.data = config.pipeline.datamanager.data = scene
config.output_dir, config.experiment_name, config.timestamp = folder, "run", "0"
config.vis, config.machine.device_type, config.max_num_iterations, config.steps_per_save = (
    "tensorboard",
    "cpu",
    steps,
    4,
)
config.pipeline.datamanager.train_num_rays_per_batch = 64
config.pipeline.datamanager.pixel_sampler.kind = kind
config.pipeline.datamanager.pixel_sampler.detail.interval = 4
config.pipeline.datamanager.pixel_sampler.mixture.interval = 4
config.pipeline.model.log2_hashmap_size = 10
config.load_dir = Path(sys.argv[8]) if len(sys.argv) > 8 else None

seen: list[torch.Tensor] = []
states: list[dict] = []
trainers = []
original = type(config).setup


def setup(self, **how):
    trainer = original(self, **how)
    trainers.append(trainer)
    train_iteration = trainer.train_iteration

    def recorded(step: int):
        result = train_iteration(step)
        seen.append(trainer.pipeline.datamanager._mining_batch.indices.clone())
        return result

    trainer.train_iteration = recorded
    return trainer


type(config).setup = setup
train_loop(rank, world_size, config, rank)
manager = trainers[0].pipeline.datamanager
torch.save(
    {
        "indices": torch.stack(seen),
        "sampler": manager.train_pixel_sampler.state_dict(),
        "parameters": trainers[0].pipeline.model.state_dict(),
    },
    folder / f"rank{rank}.pt",
)
dist.barrier()
dist.destroy_process_group()
