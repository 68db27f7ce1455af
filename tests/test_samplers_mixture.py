"""Laws of the sampler mixture: where its chains settle, and that all of its rays have the density that they say."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from sampler_cases import BATCH_KEY, EACH_CASE, Case, feed, make_sampler
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin.pixel_sampler import MiningPixelSampler

LARGE = Case(((40, 24), (17, 48)), masked=False, ids=(3, 1))


def importance_of(case: Case, side: int, tile: int) -> Tensor:
    """An importance of each pixel as the sampler expects it: the root of detail, times a factor of each tile."""
    size = dict(zip(case.ids, case.sizes, strict=True))
    factor = torch.empty(len(case.pixels())).double()
    for place, (i, *at) in enumerate(case.pixels().tolist()):
        cell = [x * math.ceil(length / side) // length for x, length in zip(at, size[i], strict=True)]
        factor[place] = (0.2, 1.0, 0.5)[(cell[0] // tile + 2 * (cell[1] // tile) + i) % 3]
    mass = case.mass().clamp_min(1e-9)
    return (case.detail(side) / mass * mass.max()).sqrt() * factor


def run(case: Case, steps: int, first: int, importance: Tensor, **changes):
    """Yield the rays of each batch from the given step on, of a sampler whose importance does not change."""
    sampler: MiningPixelSampler = make_sampler(300, kind="mixture", interval=8, memory=1.0, **changes, **case.settings)
    batch = case.batch()
    for number in range(steps):
        mining = sampler.sample(batch)[BATCH_KEY]
        if number >= first:
            yield sampler, mining
        sampler.update(feed(mining, importance=importance[case.place(mining.indices)].float()))


@EACH_CASE
def test_weighted_rays_are_an_unbiased_estimate_of_the_uniform_mean(case):
    """Of several functions of the pixel; with the density of the chains as the map estimates it."""
    importance = importance_of(case, 1, 4)
    values = torch.stack((torch.ones_like(importance), importance, 1.0 + case.pixels()[:, 2]))
    sums, count = torch.zeros(3).double(), 0
    # most tiles of these small images are cut by their rims, which the density of larger steps leaves out
    for _, mining in run(case, 450, 150, importance, cell_size=1, tile=4, noise=0.2):
        sums += (values[:, case.place(mining.indices)] / mining.density_ratio).sum(dim=1)
        count += len(mining.indices)
    torch.testing.assert_close(sums / count, values @ case.uniform(), rtol=0.04, atol=0)


def test_chains_settle_in_proportion_to_the_importance():
    importance, tiles = importance_of(LARGE, 1, 8), LARGE.pixels() // torch.tensor((1, 8, 8))
    law: dict[tuple, float] = defaultdict(float)
    counts: dict[tuple, int] = defaultdict(int)
    for key, q in zip(tiles.tolist(), importance.tolist(), strict=True):
        law[tuple(key)] += q
    for sampler, _ in run(LARGE, 500, 200, importance, cell_size=1):
        chains = sampler.run.state.chains
        for key in torch.cat((chains.image_index[:, None], chains.position.long() // 8), dim=1).tolist():
            counts[tuple(key)] += 1
    ours, theirs = (torch.tensor([float(part[key]) for key in law]) for part in (counts, law))
    assert sum(counts.values()) == ours.sum() and theirs.max() > 5 * theirs.min()  # or this would be no test
    difference = ours / ours.sum() - theirs / theirs.sum()
    assert difference.abs().sum() < 0.15  # a start from the map is not even within its tile


@pytest.mark.parametrize(
    "noise, settings",
    [(0.0, {}), (0.5, {}), (2.0, {}), (0.5, {"is_equirectangular": True}), (0.5, {"fisheye_crop_radius": 45})],
)
def test_chains_are_followed_with_the_density_that_is_claimed(noise, settings):
    """Also around a small place of high error, from which chains step away by some tiles."""
    case = Case(((96, 64),), masked=False, settings=settings, ids=(0,))
    pixels, tiles = case.pixels()[:, 1:], case.pixels()[:, 1:] // 8
    importance = importance_of(case, 1, 8).nan_to_num() * torch.where(((pixels - 40).abs() < 8).all(dim=1), 10.0, 1.0)
    counts, claimed = torch.zeros(2, 12, 8).double().unbind()
    for number, (sampler, mining) in enumerate(run(case, 450, 150, importance, cell_size=1, noise=noise)):
        row, column = (mining.indices[: mining.num_chains, 1:] // 8).unbind(1)
        counts.index_put_((row, column), torch.ones(len(row)).double(), accumulate=True)
        if number % 20:
            continue
        state, mixture = sampler.run.state, sampler.run.sampler
        every = mixture.images.as_samples(case.pixels()[:, 0], pixels + 0.5)
        density = mixture._chain_density(state, state.map.density, every)
        claimed.index_put_((tiles[:, 0], tiles[:, 1]), density.nan_to_num() * case.uniform(), accumulate=True)
    ours, theirs = counts / counts.sum(), claimed / claimed.sum()
    assert (ours - theirs).abs().sum() < 0.1
    hot = slice(4, 6)
    assert float(ours[hot, hot].sum()) == pytest.approx(float(theirs[hot, hot].sum()), rel=0.08)


def test_chains_take_turns():
    """Each part of the pool has its own batch, whose rays are in the tiles that its chains may step to."""
    sampler, case = make_sampler(100, kind="mixture", chain_fraction=0.5, pool_size=3, cell_size=1), LARGE
    batch, pools = case.batch(), []
    for turn in range(6):
        mining = sampler.sample(batch)[BATCH_KEY]
        chains = sampler.run.state.chains
        part = slice(50 * (turn % 3), 50 * (turn % 3 + 1))
        assert torch.equal(mining.indices[:50, 0], chains.image_index[part])
        assert torch.equal(mining.indices[:50, 1:] // 8, chains.proposed[part].long() // 8)
        pools.append(chains.position)
        sampler.update(feed(mining, importance=torch.rand(100)))
    assert len(pools[0]) == 150
    assert torch.equal(pools[0], pools[2]) and torch.equal(pools[3], pools[5]) and not torch.equal(pools[2], pools[3])


def test_chains_stay_where_no_error_is_known():
    """Where the optimizer skipped a step, or a batch was drawn and not trained on."""
    sampler, case = make_sampler(100, kind="mixture", pool_size=3, cell_size=1), LARGE
    for turn in range(7):
        mining = sampler.sample(case.batch())[BATCH_KEY]
        if turn == 0:
            before = sampler.run.state.chains
        if turn % 2:
            sampler.update(feed(mining, importance=torch.rand(100)), applied=torch.tensor(False))
    after = sampler.run.state.chains
    assert sorted(before.position.tolist()) == sorted(after.position.tolist())
    assert not before.ratio.any() and not after.ratio.any()


def test_fractions_that_exceed_the_batch_are_named():
    sampler = make_sampler(100, kind="mixture", chain_fraction=0.7, uniform_fraction=0.4)
    with pytest.raises(UserError, match=r"mixture.chain-fraction is 0.7: more than is left beside a uniform_fraction"):
        sampler.sample(LARGE.batch())


@pytest.mark.parametrize("chain_fraction", [0.0, 0.6, 1.0])
def test_the_batch_may_be_of_any_parts(chain_fraction):
    settings = dict(chain_fraction=chain_fraction, uniform_fraction=0.4 if chain_fraction < 1 else 0.0)
    for _, mining in run(LARGE, 5, 0, importance_of(LARGE, 2, 4), **settings):
        assert len(mining.indices) == 300 and mining.num_uniform == round(300 * settings["uniform_fraction"])


def test_batches_that_change_in_size_are_drawn_one_at_a_time():
    """As those of instant-ngp do; batches of later steps would be drawn in vain."""
    sampler, batch, drawn = make_sampler(100, kind="mixture", pool_size=4, cell_size=1), LARGE.batch(), []
    for rays in (100, 100, 90, 110, 95, 95, 95):
        sampler.set_num_rays_per_batch(rays)
        mining = sampler.sample(batch)[BATCH_KEY]
        assert len(mining.indices) == rays
        drawn.append(len(sampler.run.state.block.error))
        sampler.update(feed(mining, importance=torch.rand(rays)))
    assert drawn == [4, 4, 1, 1, 1, 4, 4]
