"""The files in examples/ run as they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
from captures import write_capture

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*words: object, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_a_regression_loop(tmp_path):
    printed = run(sys.executable, EXAMPLES / "regression.py", "--steps", 20, "--seeds", 0, 1, folder=tmp_path)
    assert printed.count("with soft mining") == 2


def test_a_photograph(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), photo)
    for sampler in ("detail", "langevin"):
        flags = ("--sampler", sampler, "--steps", 5, "--output", f"{sampler}.png")
        assert sampler in run(sys.executable, EXAMPLES / "photograph.py", "photo.png", *flags, folder=tmp_path)
        assert cv2.imread(str(tmp_path / f"{sampler}.png")).shape == photo.shape


def test_a_method_of_ones_own(tmp_path):
    write_capture(tmp_path / "capture", num_images=12)
    program = Path(sys.executable).with_name("ns-train")
    flags = ["--max-num-iterations", 2, "--vis", "tensorboard", "--machine.device-type", "cpu"]
    flags += ["--pipeline.model.implementation", "torch", "--pipeline.model.log2-hashmap-size", 12]
    flags += ["--pipeline.datamanager.train-num-rays-per-batch", 64]
    run(
        *(program, "my-softmined", "--data", tmp_path / "capture", *flags),
        folder=tmp_path,
        PYTHONPATH=str(EXAMPLES),
        NERFSTUDIO_METHOD_CONFIGS="my-softmined=soft_mined_method:my_softmined",
    )
