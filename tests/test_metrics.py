"""What is shown of soft mining is what it does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sampler_cases import Case, make_sampler, train

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin.loss import SoftMinedLoss
from nerfstudio_softmining.plugin.metrics import MetricsLog, batch_metrics, density_picture
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY
from nerfstudio_softmining.samplers.base import MiningBatch
from nerfstudio_softmining.samplers.images import PixelSamples

RAYS = 100
WRITER = "nerfstudio_softmining.plugin.metrics.writer"
KINDS = {"detail": {}, "edge": {}, "error-map": {"interval": 10}, "mixture": {}, "quadtree": {}}


def test_metrics_of_a_batch_are_those_of_its_weights():
    weights = torch.linspace(0.5, 2.0, RAYS)
    batch = MiningBatch(torch.zeros(RAYS, 3).long(), torch.ones(RAYS), 10, num_chains=40, weights=weights)
    metrics = {name: float(value) for name, value in batch_metrics(batch, SoftMinedLoss(0.6, "density")).items()}
    assert (metrics["chains"], metrics["map"], metrics["uniform"], metrics["alpha"]) == (0.4, 0.5, 0.1, 0.6)
    values = weights.numpy()
    expected = values.sum() ** 2 / (values**2).sum() / RAYS
    np.testing.assert_allclose(metrics["effective sample size"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["mean weight"], values.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        (metrics["weight, 5 %"], metrics["weight, 95 %"]), np.quantile(values, (0.05, 0.95)), rtol=1e-5
    )


@pytest.mark.parametrize("kind, settings", [("langevin", {"drift": 0.0, "noise": 0.0}), ("mixture", {"noise": 0.0})])
def test_restarted_chains_are_those_that_are_elsewhere(kind, settings):
    sampler, batch = make_sampler(RAYS, kind=kind, **settings), Case().batch()
    train(sampler, batch, 40)
    before = set(map(tuple, sampler.run.state.chains.position.tolist()))
    train(sampler, batch, 1)
    after = sampler.run.state.chains.position.tolist()
    elsewhere = np.mean([tuple(place) not in before for place in after])  # without steps, by restarts alone
    metrics = batch_metrics(sampler.sample(batch)[BATCH_KEY], SoftMinedLoss(0.6, "density"))
    assert 0 < elsewhere < 1
    assert float(metrics["restarted chains"]) == pytest.approx(elsewhere, abs=0.02)


def test_a_batch_without_weights_counts_in_full():
    batch = MiningBatch(torch.zeros(RAYS, 3).long(), torch.ones(RAYS), RAYS, importance_weighted=False)
    metrics = batch_metrics(batch, SoftMinedLoss(0.6, "density"))
    assert (metrics["uniform"], metrics["alpha"]) == (1, 0) and metrics["effective sample size"] == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_density_is_that_of_the_draws(kind, masked):
    case = Case(masked=masked)
    sampler, batch = make_sampler(RAYS, kind=kind, **KINDS[kind]), case.batch()
    train(sampler, batch, 40)
    drawn = sampler.sample(batch)[BATCH_KEY]
    run = sampler.run
    images = run.sampler.images
    indices = drawn.indices
    samples: PixelSamples = images.samples_at(images.cache_index[indices[:, 0]], indices[:, 1:])
    expected = run.sampler.expected_density(run.state, samples)
    torch.testing.assert_close(expected, drawn.density_ratio, rtol=0.02, atol=1e-3)
    assert expected.std() > 0.1  # or this would be no test


@pytest.mark.parametrize("steps_per_picture, pictures", [(0, []), (5, [0, 5])])
def test_pictures_are_written_at_nerfstudios_steps(steps_per_picture, pictures, monkeypatch):
    """0 is never."""
    sampler, batch = make_sampler(RAYS, kind="detail"), Case().batch()
    mining = sampler.sample(batch)[BATCH_KEY]
    manager = SimpleNamespace(last_batch=mining, train_pixel_sampler=sampler)
    config = SimpleNamespace(logging=SimpleNamespace(steps_per_log=100), steps_per_eval_image=steps_per_picture)
    trainer = SimpleNamespace(config=config, pipeline=SimpleNamespace(datamanager=manager))
    log, written = MetricsLog(trainer, SoftMinedLoss(0.6, "density")), []
    monkeypatch.setattr(f"{WRITER}.EVENT_WRITERS", [None])
    monkeypatch.setattr(f"{WRITER}.put_scalar", lambda *_: None)
    monkeypatch.setattr(f"{WRITER}.put_image", lambda name, picture, step: written.append(step))
    for step in range(8):
        log.update(step)
    assert written == pictures


def test_the_picture_is_the_density_of_the_view():
    case = Case()
    sampler, batch = make_sampler(RAYS, kind="detail"), case.batch()
    train(sampler, batch, 3)
    picture = density_picture(sampler.run, case.ids[1])
    images = sampler.run.sampler.images
    pixels = torch.cartesian_prod(*map(torch.arange, case.sizes[1]))
    samples = images.samples_at(torch.ones_like(pixels[:, 0]), pixels)
    expected = sampler.run.sampler.expected_density(sampler.run.state, samples)
    np.testing.assert_array_equal(picture.ravel(), expected.numpy())
    assert density_picture(sampler.run, 1) is None  # which is not cached


def test_a_chain_does_not_know_its_density():
    sampler = make_sampler(RAYS, kind="langevin")
    sampler.sample(Case().batch())
    assert density_picture(sampler.run, Case().ids[0]) is None


def test_settings_change_at_the_next_batch():
    sampler, batch = make_sampler(RAYS, kind="mixture"), Case().batch()
    train(sampler, batch, 5)
    assert sampler.live_settings()["chain_fraction"] == 0.4
    sampler.change("chain_fraction", 0.2)
    sampler.change("uniform_fraction", 0.3)
    train(sampler, batch, 1)
    mining = sampler.sample(batch)[BATCH_KEY]
    assert (mining.num_chains, mining.num_uniform) == (20, 30)


@pytest.mark.parametrize(
    "name, value", [("chain_fraction", 0.95), ("uniform_fraction", 0.001), ("restart_fraction", -1.0)]
)
def test_a_setting_that_cannot_be_used_stays_as_it_was(name, value):
    sampler, batch = make_sampler(RAYS, kind="mixture"), Case().batch()
    train(sampler, batch, 2)
    before = sampler.live_settings()
    with pytest.raises(UserError, match=name.replace("_", ".")):
        sampler.change(name, value)
    assert sampler.live_settings() == before
    train(sampler, batch, 2)


def test_switched_off_rays_are_uniform_and_the_sampler_waits():
    sampler, batch = make_sampler(RAYS, kind="mixture"), Case().batch()
    train(sampler, batch, 5)
    state = sampler.run.state
    sampler.draws_uniformly = True
    train(sampler, batch, 3)
    mining = sampler.sample(batch)[BATCH_KEY]
    assert mining.num_uniform == RAYS and not mining.importance_weighted
    assert sampler.run.state is state
    sampler.draws_uniformly = False
    train(sampler, batch, 3)
    assert sampler.run.state is not state
