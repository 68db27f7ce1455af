"""Workarounds: each does what it says where it is needed."""

from __future__ import annotations

import random
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

from nerfstudio_softmining.plugin import compat


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch's downloads, without internet."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no internet")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(compat.Lpips, "_metric", None)
    monkeypatch.setattr(compat.Lpips, "is_missing", False)
    return tmp_path


@pytest.fixture
def images():
    return torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_lpips_without_its_weights_is_left_out_and_said_once(hub, images, capsys):
    before = torch.get_rng_state()
    for _ in range(2):
        assert compat.Lpips(normalize=True)(*images).isnan()
    assert capsys.readouterr().out.count("LPIPS is left out") == 1
    assert torch.equal(before, torch.get_rng_state())


def test_lpips_with_its_weights_in_the_cache_is_reported(hub, images):
    (hub / "checkpoints").mkdir()
    torch.save(torchvision.models.alexnet().state_dict(), hub / "checkpoints" / "alexnet-owt-7be5be79.pth")
    metric = compat.Lpips(normalize=True)
    assert metric(images[0], images[0]) == pytest.approx(0.0, abs=1e-6)
    assert metric(*images) > 0
    assert not isinstance(metric, torch.nn.Module)


def test_sources_of_randomness_go_on_through_a_checkpoint(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    np.random.rand(7)
    torch.save(compat.random_state(), tmp_path / "state")
    expected = [draw() for _ in range(3)]
    compat.set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert [draw() for _ in range(3)] == expected


@pytest.mark.skipif(
    not hasattr(torch.serialization, "add_safe_globals"), reason="torch before 2.4 loads no numpy scalars safely"
)
def test_numpy_scalars_load_safely(tmp_path):
    torch.save({"lr": np.float64(0.01)}, tmp_path / "state")
    compat.allow_numpy_scalars_in_checkpoints()
    assert torch.load(tmp_path / "state", weights_only=True) == {"lr": 0.01}


def test_adam_steps_fused_or_not():
    parameter = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], 0.1, fused=compat.has_fused_adam("cpu"))
    parameter.sum().backward()
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))


def test_a_model_that_has_imported_lpips_before_gets_ours_too(monkeypatch):
    from torchmetrics.image import lpip

    theirs = types.ModuleType("somebodys_model")
    theirs.LearnedPerceptualImagePatchSimilarity = original = lpip.LearnedPerceptualImagePatchSimilarity
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    with compat.lenient_metrics():
        assert isinstance(theirs.LearnedPerceptualImagePatchSimilarity("alex", normalize=True), compat.Lpips)
    assert theirs.LearnedPerceptualImagePatchSimilarity is lpip.LearnedPerceptualImagePatchSimilarity is original
