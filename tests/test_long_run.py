"""Fifty thousand steps of the lite method: memory, step time and the pool stay as they are. About 40 minutes."""

from __future__ import annotations

import resource
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation

from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.plugin import methods
from nerfstudio_softmining.plugin.metrics import batch_metrics

STEPS = 50_000
STEPS_PER_ROW = 1_000
ROW = (
    "step {:6d}: {:5.0f} MiB, {:5.1f} ms of processor time a step, restarted {:.3f}, effective sample size {:.3f}, "
    "mean weight {:.3f}, chains on the fullest image {}"
)


def resident_bytes() -> int:
    """Memory of this process now; the page size and the second field of Linux's statm."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux has it")
def test_memory_step_time_and_pool_stay_as_they_are(tmp_path):
    write_scene(tmp_path / "scene", num_train=20, num_eval=2, size=100)
    config = deepcopy(methods.softmining_nerfacto_lite_blender.config)
    config.data = config.pipeline.datamanager.data = tmp_path / "scene"
    config.output_dir, config.timestamp, config.vis = tmp_path, "run", "tensorboard"
    config.max_num_iterations, config.steps_per_eval_image = STEPS, 10 * STEPS_PER_ROW
    torch.manual_seed(0)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    rows: list[list[float]] = []
    times, metrics, before = [], [], time.process_time()

    def record(step: int) -> None:
        nonlocal before
        times.append(time.process_time() - before)
        batch = trainer.pipeline.datamanager.last_batch
        metrics.append(batch_metrics(batch, trainer.pipeline.model.rgb_loss))
        if (step + 1) % STEPS_PER_ROW == 0:
            counts = torch.bincount(batch.indices[: batch.num_chains, 0], minlength=20)
            names = ("restarted chains", "effective sample size", "mean weight")
            means = [float(np.mean([float(row[name]) for row in metrics])) for name in names]
            rows.append([step + 1, resident_bytes() / 2**20, 1000 * float(np.median(times)), *means, int(counts.max())])
            print(ROW.format(*rows[-1]), flush=True)
            times.clear(), metrics.clear()
        before = time.process_time()

    trainer.callbacks.append(
        TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], record, update_every_num_iters=1)
    )
    trainer.train()
    table = np.array(rows)
    assert len(table) == STEPS // STEPS_PER_ROW
    early, late = table[5:15].mean(axis=0), table[-10:].mean(axis=0)
    memory, step_time, restarted, sample_size, weight, fullest = late[1:]
    assert memory < early[1] + 50
    assert step_time < 1.2 * early[2]
    assert restarted == pytest.approx(early[3], abs=0.05)
    assert sample_size == pytest.approx(early[4], abs=0.1) and weight == pytest.approx(early[5], rel=0.1)
    num_chains = trainer.pipeline.datamanager.last_batch.num_chains
    assert fullest < 0.5 * num_chains
