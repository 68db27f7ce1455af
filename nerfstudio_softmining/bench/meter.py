"""Time and memory of a training."""

from __future__ import annotations

import math
import time

import numpy as np
import psutil
import torch


class Meter:
    """Time of training, without that of evaluation, and memory.

    Args:
        before: seconds of training before the run was resumed.
    """

    def __init__(self, before: float) -> None:
        self.before = before
        self.durations: list[float] = []
        self.process = psutil.Process()
        self.peak = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - self.start)
        if not torch.cuda.is_available():
            self.peak = max(self.peak, self.process.memory_info().rss)

    @property
    def seconds(self) -> float:
        """Return the time of training so far."""
        return self.before + sum(self.durations)

    def read(self, rays: int) -> dict[str, float | int]:
        """Return time in seconds, and peak memory in bytes, as an evaluation records them.

        Args:
            rays: rays of a step.
        """
        step = float(np.median(self.durations)) if self.durations else math.nan
        return {
            "seconds": round(self.seconds, 3),
            "seconds_per_step": round(step, 5),
            "rays_per_second": round(rays / step) if step > 0 else 0,
            "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.peak,
        }
