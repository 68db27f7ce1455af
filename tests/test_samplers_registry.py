"""Adding a sampler is writing one file: the command line, bench and image find it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nerfstudio_softmining
from nerfstudio_softmining.samplers.registry import parse, samplers

PACKAGE = Path(nerfstudio_softmining.__file__).parent
NEW = '''"""A sampler for this test: all rays in the top half of the images, and some uniform."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.samplers.base import DensitySampler, SamplerConfig, Stateless
from nerfstudio_softmining.samplers.cells import PixelDensity
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.settings import Fraction


@dataclass
class TopHalfConfig(SamplerConfig):
    """Settings of the sampler top-half."""

    uniform_fraction: Fraction = 0.5
    """Fraction of each batch that is drawn uniformly."""
    height_fraction: Fraction = 0.5
    """Fraction of the rows, from the top, that rays are drawn from."""


@register
class TopHalf(DensitySampler[TopHalfConfig, Stateless]):
    """Draw from the upper part of every image."""

    config_class = TopHalfConfig

    def __init__(self, config, context, images):
        super().__init__(config, context, images)
        grid = self.make_grid("rows", dens.bytes_per_entry())
        self._density = PixelDensity.from_weights(grid, self._weights, "Finding rows")

    def density(self, state):
        return self._density

    def _weights(self, cache_index):
        height, width = self.images.sizes[cache_index]
        row = (torch.arange(height) + 0.5) / height
        return (row < self.config.height_fraction).float()[:, None].expand(height, width)
'''
USE = """
import sys
from pathlib import Path

import torch

import nerfstudio_softmining
assert Path(nerfstudio_softmining.__file__).parent.parent == Path(sys.argv[1]), nerfstudio_softmining.__file__

from nerfstudio_softmining.bench.preset import Scene, trainer_config
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import Fit, make_settings
from nerfstudio_softmining.images.photo import Encoding, Photo

scene = Scene("scene", "softmining-nerfacto-lite-blender")
config = trainer_config(scene, "top-half,height_fraction=0.3", 0, Path("."), Path("."))
sampler = config.pipeline.datamanager.pixel_sampler
assert (sampler.kind, sampler.top_half.height_fraction) == ("top-half", 0.3)

small = FitConfig(levels=4, log2_hashmap_size=10, width=16, batch=64)
settings = make_settings("top-half,uniform_fraction=0", 0, 10, small)
fit = Fit(Photo(torch.rand(20, 30, 3), Encoding("uint8", 3)), settings)
for _ in range(3):
    fit.step()
assert all((position[:, 0] < 10).all() for position in fit.drawn)
try:
    make_settings("top-half,height_fraction=2", 0, 10, small)
except UserError as error:
    print(error)
"""
HELP = """
import sys
import torch
from nerfstudio.scripts.train import entrypoint
sys.argv = ["ns-train", "softmining-nerfacto", "--help"]
entrypoint()
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package with one file more."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / PACKAGE.name / "samplers" / "top_half.py").write_text(NEW)
    return folder


def run(copy: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=copy, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_bench_and_image_accept_a_new_sampler(copy):
    assert "--samplers top-half,height_fraction is 2.0: it must be in [0, 1]." in run(copy, USE)


def test_the_help_of_ns_train_shows_a_new_sampler(copy):
    text = run(copy, HELP)
    assert "top-half: Draw from the upper part of every image." in text
    assert "--pipeline.datamanager.pixel-sampler.top-half.height-fraction" in text


def test_every_sampler_says_what_it_is():
    for name, spec in samplers().items():
        assert spec.name == name and spec.summary[0].isupper() and spec.summary.endswith((".", ")."))
        assert spec.config.__name__ == f"{spec.sampler.__name__}Config" or name == "uniform"
    assert {"greedy", "evos"} == samplers().keys() - samplers(scenes=True).keys()


def test_names_with_settings_are_split():
    assert parse("langevin") == ("langevin", [])
    assert parse("langevin,drift=0,alpha=1") == ("langevin", ["drift=0", "alpha=1"])
    assert parse("uniform-weighted,alpha=1") == ("uniform", ["weight_by=importance", "alpha=1"])
