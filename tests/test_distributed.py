"""Several processes train one model: each on rays of its own, with what all of them have learnt about errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampler_cases import CACHED, Case, make_sampler

from nerfstudio_softmining.demo.scene import write_scene
from nerfstudio_softmining.plugin import distributed
from nerfstudio_softmining.samplers.base import MiningBatch

WORKER = Path(__file__).with_name("ddp_worker.py")
STEPS = 9


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scene"
    write_scene(folder, num_train=4, num_eval=1, size=24)
    return folder


def train(scene: Path, folder: Path, steps: int, kind: str, *resumed: Path) -> list[dict]:
    """Train with two processes; return what each of them leaves."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [
        [sys.executable, WORKER, str(rank), "2", str(port), scene, folder, str(steps), kind, *resumed]
        for rank in range(2)
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for command in commands
    ]
    printed = [worker.communicate(timeout=300)[0] for worker in workers]
    for worker, output in zip(workers, printed, strict=True):
        assert worker.returncode == 0, output[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def trained(scene, tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(scene, folder, STEPS, "mixture")


def test_processes_train_one_model_on_different_rays(trained):
    first, second = trained[1]
    for name, value in first["parameters"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second["parameters"][name]), name
    assert first["indices"].shape == second["indices"].shape == (STEPS, 64, 3)
    for ours, theirs in zip(first["indices"], second["indices"], strict=True):
        assert not torch.equal(ours, theirs)


def test_each_has_a_pool_of_its_own_and_all_have_one_map(trained):
    first, second = (rank["sampler"]["run"] for rank in trained[1])
    chains = [run["state"]["chains"]["position"] for run in (first, second)]
    assert not torch.equal(*chains)
    assert first["by_image"].keys() == second["by_image"].keys()
    seen = 0.0
    for image, fields in first["by_image"].items():
        for name, value in fields.items():
            torch.testing.assert_close(value, second["by_image"][image][name])
            seen += float(value.sum()) if name == "map.seen" else 0.0
    assert seen > 64 * 4  # more than one process has drawn until the map was corrected


def test_each_goes_on_with_its_own_pool(trained, scene, tmp_path):
    folder, whole = trained
    checkpoints = next(folder.rglob("nerfstudio_models"))
    (path,) = checkpoints.glob("*.ckpt")
    saved = torch.load(path, weights_only=False)["pipeline"]["datamanager._extra_state"]
    assert len(saved["others"]) == 1
    resumed = train(scene, tmp_path / "resumed", 1, "mixture", checkpoints)
    for rank, state in enumerate((saved, *saved["others"])):
        torch.testing.assert_close(
            state["sampler"]["run"]["state"]["chains"]["position"],
            whole[rank]["sampler"]["run"]["state"]["chains"]["position"],
        )
        block = state["sampler"]["run"]["state"]["block"]
        if block is not None and block["used"] < len(block["samples"]["image_index"]):
            expected = block["samples"]["position"][block["used"]].long()
            assert torch.equal(resumed[rank]["indices"][0][:, 1:], expected)


def test_one_process_shares_nothing():
    batch = MiningBatch(torch.zeros(3, 3).long(), torch.ones(3), 3)
    assert distributed.share(batch, 3, None) is None and distributed.gather("state", "cpu") == ["state"]


@pytest.mark.parametrize("num_rays", [6, 4, 9])
def test_rays_on_images_that_are_not_cached_here_are_left_out(num_rays, monkeypatch):
    """The other process has the same rays here, but for its images: one that is cached here, and one that is not."""
    sampler = make_sampler(6, kind="detail")
    sampler.sample(Case().batch())
    images = sampler.run.sampler.images
    indices = torch.tensor([[CACHED[0], 1, 2], [CACHED[1], 3, 4], [CACHED[2], 5, 6]]).repeat(2, 1)
    values = [torch.rand(6) + 0.1 for _ in range(3)]
    batch = MiningBatch(indices, values[0], 2, importance=values[1], error=values[2])

    def all_gather(everywhere: list[torch.Tensor], rows: torch.Tensor) -> None:
        everywhere[0].copy_(rows)
        everywhere[1].copy_(rows)
        everywhere[1][:, 0] = torch.tensor([CACHED[3], 1.0]).repeat(num_rays)[:num_rays]  # image 1 is not cached

    monkeypatch.setattr(distributed.comms, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
    shared = distributed.share(batch, num_rays, images)
    assert len(shared.indices) == 2 * num_rays
    assert (images.cache_index[shared.indices[:, 0]] >= 0).all()
    chosen = torch.arange(num_rays) * 6 // num_rays if num_rays <= 6 else torch.arange(6)
    known = min(num_rays, 6)
    for shown, own in zip((shared.density_ratio, shared.importance, shared.error), values, strict=True):
        assert torch.equal(shown[:known], own[chosen])
    assert torch.equal(shared.indices[:known], indices[chosen])
    theirs = shared.importance[num_rays:]
    assert theirs[1::2].isnan().all() and torch.equal(theirs[:known:2], values[1][chosen][::2])
    assert shared.importance[known:num_rays].isnan().all()
