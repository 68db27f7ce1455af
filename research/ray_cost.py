"""Time of making the rays of a batch: by nerfstudio's own function and from the table of a lens, in turn.

    python research/ray_cost.py

A hundred cameras with one lens, distorted or not. The last column is the time that making the table takes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import tyro
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.utils.rich_utils import CONSOLE

from nerfstudio_softmining.bench.report import make_table
from nerfstudio_softmining.bench.results import device_name
from nerfstudio_softmining.plugin.rays import MiningRayGenerator

NUM_CAMERAS = 100
DISTORTION = (0.05, -0.02, 0.0, 0.0, 0.003, -0.002)


def main(
    size: tuple[int, int] = (1080, 1920), rays: int = 512, steps: int = 200, device: str = "cpu", threads: int = 2
) -> None:
    """Measure and print.

    Args:
        size: height and width of the images.
        rays: rays of a batch.
        steps: batches that are timed.
        device: where rays are made.
        threads: threads of the CPU.
    """
    torch.set_num_threads(threads)
    rows = {name: _measure(size, rays, steps, device, name == "distorted") for name in ("not distorted", "distorted")}
    columns = ["nerfstudio", "table", "nerfstudio, with gradient", "table, with gradient", "making the table"]
    cells = pd.DataFrame.from_dict(rows, orient="index", columns=columns).map("{:,.2f}".format)
    title = f"ms for {rays:,} rays, median of {steps}; {size[0]} x {size[1]} pixels; {device_name(device)}"
    CONSOLE.print(make_table(title, cells.rename_axis("lens")))


def _measure(size: tuple[int, int], rays: int, steps: int, device: str, is_distorted: bool) -> list[float]:
    height, width = size
    cameras = Cameras(
        camera_to_worlds=torch.eye(4)[None, :3].repeat(NUM_CAMERAS, 1, 1),
        fx=0.75 * width,
        fy=0.75 * width,
        cx=width / 2,
        cy=height / 2,
        width=width,
        height=height,
        distortion_params=torch.tensor(DISTORTION).expand(NUM_CAMERAS, 6) if is_distorted else None,
        camera_type=CameraType.PERSPECTIVE,
    ).to(device)
    generator = MiningRayGenerator(cameras)
    indices = (torch.rand(rays, 3) * torch.tensor((NUM_CAMERAS, height, width))).long().to(device)
    making = _seconds(lambda: generator.table)
    ways: list[Callable] = [
        lambda: generator(indices),
        lambda: generator.mined(indices),
        lambda: generator.differentiate(indices),
        lambda: generator.differentiable(indices),
    ]
    seconds = [[_seconds(way) for way in ways] for _ in range(steps)]
    return [1000 * value for value in (*np.median(seconds, axis=0), making)]


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    tyro.cli(main)
