"""A training that is killed at any moment goes on from a whole checkpoint, and ends as one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_worker import MOMENTS
from trainer_cases import assert_same, checkpoints, make_trainer, read, small_config

from nerfstudio_softmining.demo.scene import write_scene

WORKER = Path(__file__).with_name("killed_worker.py")


def train(folder: Path, steps: int, seed: int, num_kills: int) -> list[str]:
    """Train with and without kills, and assert that the last checkpoints are the same.

    Args:
        folder: where all of it goes.
        steps: steps of each training.
        seed: seed of the moments.
        num_kills: how often it is killed at random; 0 for once at each moment of writing a checkpoint.

    Returns:
        How each process ended, and steps that were done before it was killed.
    """
    scene = folder / "scene"
    write_scene(scene, num_train=4, num_eval=1, size=24)
    whole, killed = (small_config(scene, folder / name, steps) for name in ("whole", "killed"))
    whole.steps_per_save = 1
    make_trainer(whole).train()
    done = subprocess.run(
        [sys.executable, WORKER, scene, folder / "killed", str(steps), str(seed), str(num_kills)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # more threads add up in another order
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    (path,) = checkpoints(killed)
    assert_same(read(path), read(*checkpoints(whole)))
    return [line for line in done.stdout.splitlines() if line.startswith(("killed", "ended with", "after step"))]


def test_killed_at_each_moment_of_writing_a_checkpoint(tmp_path):
    ends = train(tmp_path, steps=12, seed=0, num_kills=0)
    assert ends == ["killed"] * len(MOMENTS) + ["ended with 0"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_twenty_times(tmp_path, seed):
    ends = train(tmp_path, steps=100, seed=seed, num_kills=20)
    print("\n".join(ends))
    assert ends.count("killed") == 20 and ends[-1] == "ended with 0"
