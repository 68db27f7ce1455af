"""Time and memory from the start of a training to its first batch, on a capture of many large photographs.

    python research/start_up.py

Photographs of noise are written to a temporary folder, one file under many names. Each datamanager loads them in a
process of its own: nerfstudio's (`vanilla`, which decodes to float32), and this plugin's with its default sampler.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import psutil
import tyro
from nerfstudio.utils.rich_utils import CONSOLE

from nerfstudio_softmining.bench.report import make_table
from nerfstudio_softmining.bench.step_time import peak_memory

METHODS = ("softmining", "vanilla")


def main(images: int = 1000, size: tuple[int, int] = (1632, 2448), methods: tuple[str, ...] = METHODS) -> None:
    """Measure and print.

    Args:
        images: number of training images.
        size: their height and width.
        methods: which datamanagers to measure: softmining, vanilla.
    """
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        write_capture(Path(folder), images, size)
        for method in methods:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, before, peak = pool.apply(load, (method, Path(folder)))
            rows[method] = {
                "seconds": f"{seconds:.1f}",
                "memory before, GB": f"{before / 1e9:.2f}",
                "peak, GB": f"{peak / 1e9:.2f}",
                "growth over the images' bytes": f"{(peak - before) / (3 * images * size[0] * size[1]):.2f}",
            }
    title = f"{images:,} images of {size[0]} x {size[1]} pixels, until the first batch"
    CONSOLE.print(make_table(title, pd.DataFrame.from_dict(rows, orient="index").rename_axis("datamanager")))


def write_capture(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Write a capture as `ns-process-data` would."""
    noise = np.random.default_rng(0).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    first = folder / "images" / "0.jpg"
    cv2.imwrite(str(first), cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC))
    for number in range(1, images):
        (folder / "images" / f"{number}.jpg").hardlink_to(first)
    poses = np.tile(np.eye(4), (images, 1, 1))
    poses[:, 0, 3] = np.linspace(-1, 1, images)
    frames = [{"file_path": f"images/{i}.jpg", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)]
    lens = {"fl_x": size[1], "fl_y": size[1], "cx": size[1] / 2, "cy": size[0] / 2, "w": size[1], "h": size[0]}
    (folder / "transforms.json").write_text(json.dumps({"camera_model": "OPENCV", **lens, "frames": frames}))


def load(method: str, folder: Path) -> tuple[float, int, int]:
    """Return the seconds until a datamanager's first batch, and the memory in bytes before it and at its peak."""
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManagerConfig

    kinds: dict[str, Any] = {"softmining": SoftMiningDataManagerConfig, "vanilla": VanillaDataManagerConfig}
    config = kinds[method](
        dataparser=NerfstudioDataParserConfig(eval_mode="all", downscale_factor=1, load_3D_points=False),
        eval_num_images_to_sample_from=1,
    )
    config.data = folder
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    manager = config.setup(device="cpu", test_mode="val")
    manager.train()
    manager.next_train(0)
    return time.perf_counter() - start, before, peak_memory()


if __name__ == "__main__":
    tyro.cli(main)
