"""Trains in processes that are killed, until a training is complete. Run by test_killed.py.

python killed_worker.py SCENE FOLDER STEPS SEED NUM_KILLS

Each process trains from where the last one left off, and is killed by SIGKILL after some steps, at a random moment.
With 0 kills, each of the first processes kills itself instead, at one of the moments of writing its second checkpoint.
What has been imported is shared by forking, so that a process takes a second or two.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from nerfstudio.scripts.train import train_loop
from trainer_cases import small_config

from nerfstudio_softmining.plugin import checkpoints
from nerfstudio_softmining.plugin.trainer import RESUME, SoftMiningTrainer

MOMENTS = ("first bytes", "half written", "written", "moved", "settings written", "old one removed")


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Let this process kill itself when it writes its second checkpoint, at a moment of that."""
    count = {"writes": 0}
    write = checkpoints.write

    class HalfWritten:
        """A file that kills the process after some bytes."""

        def __init__(self, file, size: int) -> None:
            self.file, self.left = file, size

        def write(self, part) -> int:
            part = bytes(part)
            if len(part) >= self.left:
                self.file.write(part[: self.left])
                self.file.flush()
                die()
            self.left -= len(part)
            return self.file.write(part)

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    def counted(state: dict, path: Path) -> None:
        count["writes"] += 1
        if count["writes"] < 2:
            write(state, path)
            return
        if moment in MOMENTS[:2]:
            save = torch.save
            torch.save = lambda state, file: save(state, HalfWritten(file, 1 if moment == MOMENTS[0] else 20_000))
        elif moment == "written":
            os.fsync = die
        write(state, path)
        if moment == "moved":
            die()
        elif moment == "settings written":
            Path.unlink = die
        elif moment == "old one removed":
            unlink = Path.unlink
            Path.unlink = lambda path, **how: (unlink(path, **how), die())

    checkpoints.write = counted


def train(config: Any, pipe: int, moment: str | None) -> None:
    """Train from the last checkpoint, if there is one. Write the number of each step done to a pipe."""
    train_iteration = SoftMiningTrainer.train_iteration

    def reported(trainer: SoftMiningTrainer, step: int) -> Any:
        result = train_iteration(trainer, step)
        os.write(pipe, step.to_bytes(4, "little"))
        return result

    SoftMiningTrainer.train_iteration = reported
    resume = config.get_base_dir() / RESUME
    if resume.exists():
        config = yaml.load(resume.read_text(), Loader=yaml.Loader)
    if moment is not None:
        die_at(moment)
    train_loop(0, 1, config)


def main(scene: Path, folder: Path, steps: int, seed: int, num_kills: int) -> None:
    chance = random.Random(seed)
    moments: list[str | None] = list(MOMENTS) if num_kills == 0 else [None] * num_kills
    for number, moment in enumerate((*moments, None)):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            config = small_config(scene, folder, steps)
            config.steps_per_save = 1
            train(config, writer, moment)
            os._exit(0)
        os.close(writer)
        if moment is None and number < num_kills:
            for _ in range(chance.randrange(5)):
                select.select([reader], [], [], 60)
                print("after step", int.from_bytes(os.read(reader, 4), "little"))
            time.sleep(chance.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reader)
        code = os.waitstatus_to_exitcode(status)
        print("killed" if code == -signal.SIGKILL else f"ended with {code}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
