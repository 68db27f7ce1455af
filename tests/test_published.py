"""Weak points of the published code, put back into langevin: that they do what their names say."""

from __future__ import annotations

import published
import pytest
import torch
from sampler_cases import CASES, Case, chains_of, feed, follows, make_sampler, seeded

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining.importance import soft_weights
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY, MiningPixelSampler


@pytest.fixture
def restored(monkeypatch):
    """Lets a class take the place of langevin."""
    return lambda sampler: monkeypatch.setattr(MiningPixelSampler, "sampler_class", sampler)


def test_each_chain_stays_in_its_image_and_uniform_rays_are_in_the_last(restored):
    restored(published.FixedImages)
    case, rays = CASES["one size"], 500
    own = torch.tensor(case.ids).repeat_interleave(rays // 5)
    sampler, batch = make_sampler(rays=rays, reinit_fraction=0.3, uniform_fraction=0.2), case.batch()
    for step in range(20):
        mining = sampler.sample(batch)[BATCH_KEY]
        assert torch.equal(mining.indices[:, 0], own)
        assert mining.num_uniform == 100 and (mining.indices[-100:, 0] == case.ids[-1]).all()
        sampler.update(feed(mining, seed=step))


def test_fixed_chains_start_anew_from_the_edges_of_their_own_images(restored):
    restored(published.FixedImages)
    case, rays = CASES["one size"], 2000
    sampler, batch = make_sampler(rays=rays, reinit_fraction=1.0, uniform_fraction=0.0), case.batch()
    drawn = []
    for step in range(12):
        mining = sampler.sample(batch)[BATCH_KEY]
        drawn += [mining.indices] if step else []
        sampler.update(feed(mining, seed=step))
    for part in case.per_slot(torch.arange(len(case.pixels()))):
        law = torch.zeros(len(case.pixels())).double()
        law[part.flatten()] = case.edges()[part.flatten()]
        mine = torch.cat(drawn)[torch.isin(case.place(torch.cat(drawn)), part)]
        assert follows(case, mine, law / law.sum())


def test_chains_of_the_lowest_weighted_loss_start_anew(restored):
    restored(published.RankedByLoss)
    sampler, batch = make_sampler(rays=200, reinit_fraction=0.25, noise=0.0, drift=0.0), CASES["one size"].batch()
    mining = feed(sampler.sample(batch)[BATCH_KEY])
    order = torch.randperm(180, generator=seeded(1))
    mining.weighted_error.data[:180] = torch.arange(1.0, 181.0)[order]
    before = chains_of(sampler).position.clone()
    sampler.update(mining)
    moved = (chains_of(sampler).position != before).any(dim=1)
    assert torch.equal(moved, order < 45)


def test_steps_are_isotropic_in_the_unit_square(restored):
    restored(published.UnitSquare)
    sampler = make_sampler(rays=20_000, reinit_fraction=0.0, uniform_fraction=0.0, noise=1e-3)
    case = Case(((40, 160),), ids=(3,))
    mining = sampler.sample(case.batch())[BATCH_KEY]
    before = chains_of(sampler).position.clone()
    sampler.update(feed(mining))
    down, across = (chains_of(sampler).position - before).abs().median(dim=0).values
    torch.testing.assert_close(across / down, torch.tensor(4.0), rtol=0.1, atol=0)


def test_weights_are_clamped_to_their_mean_and_deviation():
    density = torch.rand(100, generator=seeded()) ** 4
    plain, clamped = soft_weights(density, 0.6), published.ClampedLoss(0.6, "density").weights(density, 0.6)
    assert torch.equal(clamped, plain.minimum(plain.mean() + plain.std())) and not torch.equal(clamped, plain)


def test_images_of_several_sizes_are_refused(restored):
    restored(published.FixedImages)
    with pytest.raises(UserError, match="several sizes"):
        make_sampler().sample(CASES["list"].batch())


def test_unknown_weak_points_are_named(tmp_path):
    with pytest.raises(UserError, match="'nothing'.*'fixed images'"):
        published.compare(tmp_path / "no.yaml", tmp_path, weak_points=("nothing",))
