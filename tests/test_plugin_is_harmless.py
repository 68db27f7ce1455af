"""Installing the plugin changes nothing about any other method, whether the plugin works there or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nerfstudio_softmining.demo.scene import write_scene

OTHER_METHOD = """
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.plugins.types import MethodSpecification

other = MethodSpecification(TrainerConfig(method_name="other-method"), "A method of another plugin.")
"""
BREAK = """
import importlib.abc, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "nerfstudio_softmining.plugin.datamanager":
            raise RuntimeError("this torch is of the wrong age")

sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize.py that lets a module of the plugin fail, as an unsuitable version of a dependency does."""
WITHOUT_OURS = """
import importlib.metadata as metadata

def without_ours(original=metadata.entry_points, **selection):
    found = original(**selection)
    return metadata.EntryPoints(each for each in found if "softmining" not in each.value) if selection else found

original, metadata.entry_points = metadata.entry_points, without_ours
import nerfstudio.configs.method_configs as configs
metadata.entry_points = original
assert not [name for name in configs.all_methods if "softmining" in name]

def load_ours():
    for group in ("nerfstudio.method_configs", "nerfstudio.dataparser_configs"):
        for entry in original(group=group):
            if "softmining" in entry.value:
                assert entry.load() is not None
"""
"""Imports all of nerfstudio's methods without the plugin, which `load_ours` then loads as nerfstudio does."""
STATE = """
import os, random, signal, socket, sys, threading, warnings
import cv2, numpy as np, torch
from nerfstudio.data.datasets.base_dataset import InputDataset
from torchmetrics.image import lpip

def state():
    settings = torch.backends.cudnn
    return {
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.stdout, sys.stderr),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "warnings": list(warnings.filters),
        "timeout": socket.getdefaulttimeout(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            getattr(getattr(torch.utils, "deterministic", None), "fill_uninitialized_memory", None),
            (settings.enabled, settings.benchmark, settings.deterministic, settings.allow_tf32),
        ),
        "denormals": float(torch.tensor(1e-40) * torch.tensor(0.5)),
        "safe": str(getattr(torch.serialization, "get_safe_globals", list)()),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "nerfstudio": (list(InputDataset.exclude_batch_keys_from_device), lpip.LearnedPerceptualImagePatchSimilarity),
    }

before = state()
load_ours()
import nerfstudio_softmining.cli
after = state()
assert before == after, [key for key in before if before[key] != after[key]]
"""
STOCK_RUN = """
import hashlib, random, sys
from copy import deepcopy
from pathlib import Path
import torch
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from torchmetrics.image import lpip

lpip.LearnedPerceptualImagePatchSimilarity = lambda **_: None  # its weights are downloaded

def run():
    random.seed(0)
    torch.manual_seed(0)
    config = deepcopy(configs.all_methods["nerfacto"].pipeline)
    parser = BlenderDataParserConfig(data=Path(sys.argv[1]))
    config.datamanager = VanillaDataManagerConfig(dataparser=parser, train_num_rays_per_batch=64)
    config.model.log2_hashmap_size, config.model.implementation = 10, "torch"
    pipeline = config.setup(device="cpu")
    optimizer = torch.optim.Adam(pipeline.model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        sum(pipeline.get_train_loss_dict(step)[1].values()).backward()
        optimizer.step()
    return [parameter.detach().sum().item() for parameter in pipeline.model.parameters()]

torch.set_num_threads(1)  # torch adds up gradients of a hash grid in the order of its threads
before = run()
load_ours()
assert run() == before
"""


def python(code: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def command(program: str, *arguments: object, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment, with more modules and plugins on a path."""
    return subprocess.run(
        [Path(sys.executable).with_name(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=path,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(path)},
    )


@pytest.fixture
def other_plugin(tmp_path: Path) -> Path:
    """A folder with another plugin, installed as pip does."""
    (tmp_path / "other_plugin.py").write_text(OTHER_METHOD)
    info = tmp_path / "other_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nerfstudio.method_configs]\nother-method = other_plugin:other\n")
    return tmp_path


def test_importing_the_plugin_changes_no_state_of_the_process():
    python(WITHOUT_OURS + STATE)


def test_a_stock_run_is_the_same_before_and_after_importing_the_plugin(tmp_path):
    write_scene(tmp_path / "scene", num_train=3, num_eval=1, size=24)
    python(WITHOUT_OURS + STOCK_RUN, tmp_path / "scene")


def test_the_methods_of_other_plugins_are_listed_beside_ours(other_plugin):
    listed = command("ns-train", "--help", path=other_plugin)
    assert listed.returncode == 0
    assert "A method of another plugin." in listed.stdout and "softmining-nerfacto-lite" in listed.stdout


def test_where_the_plugin_cannot_work_all_other_methods_do(other_plugin):
    (other_plugin / "sitecustomize.py").write_text(BREAK)
    listed = command("ns-train", "--help", path=other_plugin)
    assert listed.returncode == 0
    assert "A method of another plugin." in listed.stdout and "the wrong age" in listed.stdout
    assert command("ns-train", "other-method", "--help", path=other_plugin).returncode == 0


def test_where_the_plugin_cannot_work_its_methods_and_doctor_say_why(other_plugin):
    (other_plugin / "sitecustomize.py").write_text(BREAK)
    refused = command("ns-train", "softmining-nerfacto", "--data", other_plugin, path=other_plugin)
    assert refused.returncode == 1
    assert "the wrong age" in refused.stderr and "softmining doctor" in refused.stderr
    assert "Traceback" not in refused.stderr and not (other_plugin / "outputs").exists()
    doctor = command("softmining", "doctor", path=other_plugin)
    assert doctor.returncode == 1 and "the wrong age" in doctor.stdout
