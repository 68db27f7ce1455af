"""Laws of the Langevin pixel sampler, driven with made-up images and feedback."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
import torch
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from sampler_cases import (
    BATCH_KEY,
    CACHED,
    CASES,
    EACH_CASE,
    INF,
    NAN,
    NUM_IMAGES,
    SIZES,
    Case,
    assert_true_colours,
    chains_of,
    copy,
    feed,
    follows,
    make_config,
    make_images,
    make_sampler,
    other_cache,
    p_value,
    replace_chains,
    same,
    seeded,
    through_a_file,
    train,
    wild,
)
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining.records import take
from nerfstudio_softmining.samplers.images import PixelSamples, TrainingImages
from nerfstudio_softmining.samplers.langevin import _Images


def propose(sampler, count: int) -> PixelSamples:
    """Starts of chains."""
    run = sampler.run
    return PixelSamples(*_Images(run.sampler, run.state.reserve).propose(count))


@EACH_CASE
def test_rays_stay_on_kept_pixels_and_show_their_colours_whatever_the_gradient(case):
    batch, sampler = case.batch(), make_sampler(rays=150, uniform_fraction=0.2, **case.settings)
    kept = case.uniform() > 0
    for step in range(25):
        rays = sampler.sample(batch)
        assert len(rays["indices"]) == len(rays["image"]) == 150
        assert kept[case.place(rays["indices"])].all()
        assert_true_colours(case.batch(), rays)
        sampler.update(feed(rays[BATCH_KEY], wild(150, step), seed=step))
    assert set(rays) == {*batch, "indices", BATCH_KEY} - {"image_idx"}


@EACH_CASE
def test_uniform_rays_cover_all_images_evenly(case):
    batch, sampler = case.batch(), make_sampler(rays=2500, uniform_fraction=0.8, **case.settings)
    mining = [rays[BATCH_KEY] for rays in train(sampler, batch, 25)]
    assert all(m.num_uniform == 2000 and (m.density_ratio[-2000:] == 1).all() for m in mining)
    assert follows(case, torch.cat([m.indices[-2000:] for m in mining]), case.uniform())


@EACH_CASE
def test_chains_start_uniformly(case):
    sampler = make_sampler(rays=30_000, uniform_fraction=0.0, **case.settings)
    mining = sampler.sample(case.batch())[BATCH_KEY]
    assert mining.num_uniform == 0 and (mining.density_ratio == 1).all()
    assert follows(case, mining.indices, case.uniform())
    within = chains_of(sampler).position.frac()
    for axis in within.unbind(-1):
        assert p_value(torch.histc(axis, 20, 0, 1), torch.full((20,), 0.05)) > 1e-4


@pytest.mark.parametrize(("start", "side"), [("edges", 1), ("edges", 2), ("edges", 3), ("detail", 2)])
@EACH_CASE
def test_reinitialised_chains_follow_edges_or_detail_with_the_density_they_say(case, start, side):
    settings = dict(uniform_fraction=0.0, reinit_fraction=1.0, reinit_from=start, cell_size=side, **case.settings)
    batch, sampler = case.batch(), make_sampler(rays=4000, **settings)
    mining = [rays[BATCH_KEY] for rays in train(sampler, batch, 11)][1:]
    indices, density = torch.cat([m.indices for m in mining]), torch.cat([m.density_ratio for m in mining])
    expected = case.edges(side) if start == "edges" else case.detail(side)
    assert follows(case, indices, expected)
    ratio = (expected / case.uniform())[case.place(indices)].float()
    torch.testing.assert_close(density, ratio, atol=0, rtol=1e-3)


@EACH_CASE
def test_chains_may_start_anew_uniformly(case):
    settings = dict(uniform_fraction=0.0, reinit_fraction=1.0, reinit_from="uniform", **case.settings)
    mining = [rays[BATCH_KEY] for rays in train(make_sampler(rays=4000, **settings), case.batch(), 8)][1:]
    assert follows(case, torch.cat([m.indices for m in mining]), case.uniform())
    assert all((m.density_ratio == 1).all() for m in mining)


@pytest.mark.parametrize("drift", [0.0, 1e-9])
def test_without_drift_no_gradient_is_asked_for_and_chains_still_diffuse(drift):
    batch, sampler = Case().batch(), make_sampler(drift=drift, uniform_fraction=0.0, reinit_fraction=0.0, noise=0.01)
    mining = sampler.sample(batch)[BATCH_KEY]
    assert (mining.image_gradient is not None) == sampler.run.sampler.needs_gradient == (drift > 0)
    before = copy(chains_of(sampler))
    sampler.update(feed(mining, importance=torch.zeros(64)))
    assert (chains_of(sampler).position != before.position).all() or drift


@EACH_CASE
def test_a_chain_is_inside_where_it_is_on_a_kept_pixel_of_a_cached_image(case):
    settings = dict(case.settings)
    pixels = TrainingImages(case.batch(), NUM_IMAGES, use_mask=not settings.pop("ignore_mask", False), **settings)
    image = torch.randint(NUM_IMAGES, (2000,), generator=seeded())
    position = torch.rand(2000, 2, generator=seeded(1)) * 20 - 2
    position[:600] = position[:600].round()
    position[600:603, 0], position[603:606, 1] = torch.tensor([NAN, INF, -INF]), torch.tensor([NAN, INF, -INF])
    starts = dict(zip(case.ids, torch.tensor([0] + [h * w for h, w in case.sizes]).cumsum(0).tolist(), strict=False))
    expected, kept = [], (case.uniform() > 0).tolist()
    for i, (y, x) in zip(image.tolist(), position.tolist(), strict=True):
        height, width = case.sizes[case.ids.index(i)] if i in case.ids else (0, 0)
        on_image = 0 <= y < height and 0 <= x < width
        expected.append(on_image and kept[starts[i] + int(y) * width + int(x)])
    inside = pixels.contains(pixels.as_samples(image, position))
    assert inside.tolist() == expected and 0 < inside.sum() < 2000


@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 1.0])
def test_images_without_any_edge_propose_uniformly(value):
    case, sampler = Case(), make_sampler()
    batch = case.batch() | {"image": torch.full((5, 10, 14, 3), value)}
    train(sampler, batch, 5)
    pool = propose(sampler, 30_000)
    assert (pool.density_ratio == 1).all()
    assert follows(case, pool.indices, case.uniform())


def test_what_is_transparent_has_no_edge():
    image = torch.rand(5, 10, 14, 4, generator=seeded())
    image[..., 3] = 0
    image[2, :, :7, 3] = 1
    sampler = make_sampler()
    sampler.sample({"image": image, "image_idx": torch.tensor(CACHED)})
    pool = propose(sampler, 2000)
    assert (pool.image_index == CACHED[2]).all() and (pool.pixels[:, 1] <= 7).all()


PANORAMA = Case(((40, 80),) * 2, settings=dict(is_equirectangular=True), ids=(0, 1))


def test_on_panoramas_the_drift_is_that_of_importance_times_solid_angle():
    sampler = make_sampler(
        400, 2, noise=0.0, reinit_fraction=0.0, uniform_fraction=0.0, drift=1e-3, is_equirectangular=True
    )
    sampler.sample(PANORAMA.batch())
    start = copy(chains_of(sampler))
    gradient = torch.randn(400, 2, generator=seeded())
    sampler.update(feed(sampler.sample(PANORAMA.batch())[BATCH_KEY], gradient))
    centre = start.position[:, 0].floor().double() + 0.5

    def log_solid_angle(row: Tensor) -> Tensor:
        return (math.pi * row / 40).sin().log()

    slope = (log_solid_angle(centre + 1e-4) - log_solid_angle(centre - 1e-4)) / 2e-4
    moves = 1e-3 * 40 * 80 * (gradient + torch.stack((slope, torch.zeros(400)), dim=-1).float())
    stays = chains_of(sampler).follows_importance  # the others have left the image
    assert stays.sum() > 200
    moved = chains_of(sampler).position - start.position
    moved[:, 1] = (moved[:, 1] + 40) % 80 - 40  # around the panorama
    torch.testing.assert_close(moved[stays], moves[stays], atol=1e-3, rtol=0)


@pytest.mark.parametrize("is_panorama", [False, True])
def test_chains_walk_around_a_panorama_and_end_at_the_side_of_other_images(is_panorama):
    sampler = make_sampler(
        200, 2, noise=0.0, reinit_fraction=0.0, uniform_fraction=0.0, drift=1e-3, is_equirectangular=is_panorama
    )
    sampler.sample(PANORAMA.batch())
    replace_chains(sampler, position=torch.tensor([[20.5, 79.5], [20.5, 0.5]]).repeat(100, 1))
    outwards = torch.tensor([[0.0, 1.0], [0.0, -1.0]]).repeat(100, 1) / 3.2
    sampler.update(feed(sampler.sample(PANORAMA.batch())[BATCH_KEY], outwards))
    chains = chains_of(sampler)
    assert chains.follows_importance.all() == is_panorama and chains.follows_importance.any() == is_panorama
    if is_panorama:
        expected = torch.tensor([0.5, 79.5]).repeat(100)
        torch.testing.assert_close(chains.position[:, 1], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("column", [-1e-9, -0.3, 0.0, 79.9999, 80.0, 163.0])
def test_a_position_on_a_panorama_is_within_it(column):
    sampler = make_sampler(10, 2, is_equirectangular=True)
    sampler.sample(PANORAMA.batch())
    images = sampler.run.sampler.images
    samples = images.as_samples(torch.zeros(1, dtype=torch.int64), torch.tensor([[3.0, column]]))
    wrapped = images.wrap(samples)
    assert images.contains(wrapped).all()
    assert abs((float(wrapped.position[0, 1]) - column + 40) % 80 - 40) < 1e-4


def test_on_panoramas_the_lowest_chains_are_those_of_importance_times_solid_angle():
    sampler = make_sampler(
        100, 2, noise=0.0, drift=0.0, reinit_fraction=0.25, uniform_fraction=0.0, is_equirectangular=True
    )
    mining = feed(sampler.sample(PANORAMA.batch())[BATCH_KEY])
    sampler.update(mining)
    anew = ~chains_of(sampler).follows_importance
    q = mining.importance * (math.pi * (mining.indices[:, 1] + 0.5) / 40).sin()
    assert anew.sum() == 25 and q[anew].max() < q[~anew].min()


def test_on_panoramas_chains_of_constant_importance_settle_in_proportion_to_solid_angle():
    """With b^2 = 2 a the walk's law is that of its drift; here from a uniform start over rows."""
    settings = dict(drift=0.03**2 / 2, noise=0.03, reinit_fraction=0.0, uniform_fraction=0.0, reinit_from="uniform")
    batch, sampler = PANORAMA.batch(), make_sampler(4000, 2, is_equirectangular=True, **settings)
    sampler.sample(batch)
    position = torch.rand(4000, 2, generator=seeded()) * torch.tensor([40.0, 80.0])
    replace_chains(sampler, position=position)
    rows = torch.zeros(40)
    for step in range(260):
        mining = sampler.sample(batch)[BATCH_KEY]
        rows += torch.bincount(mining.indices[:, 1], minlength=40) * (step >= 160)
        sampler.update(feed(mining, importance=torch.ones(4000)))
    expected = PANORAMA.uniform().view(2, 40, 80).sum(dim=(0, 2))
    assert (rows / rows.sum() - expected).abs().sum() / 2 < 0.03  # 0.2 for uniform rows


def test_the_lowest_chains_and_only_those_start_anew():
    batch, sampler = Case().batch(), make_sampler(rays=100, uniform_fraction=0.2, reinit_fraction=0.25, noise=0.0)
    mining = feed(sampler.sample(batch)[BATCH_KEY])
    before = copy(chains_of(sampler))
    sampler.update(mining)
    anew = ~chains_of(sampler).follows_importance
    q = mining.importance[:80]
    assert anew.sum() == 20 and q[anew].max() < q[~anew].min()
    assert torch.equal(chains_of(sampler).position[~anew], before.position[~anew])
    after = sampler.sample(batch)[BATCH_KEY]
    assert torch.equal(after.follows_importance[:80], ~anew)


def test_each_chain_follows_its_own_gradient_in_rows_and_columns():
    batch = {"image": torch.rand(2, 100, 100, 3, generator=seeded()), "image_idx": torch.tensor([1, 0])}
    sampler = make_sampler(rays=20, num_images=2, uniform_fraction=0.5, reinit_fraction=0.0, noise=0.0, drift=1e-3)
    sampler.sample(batch)
    replace_chains(sampler, position=torch.full((10, 2), 50.25))
    gradient = torch.full((20, 2), 1e9)  # of the uniform rays, to be ignored
    gradient[:10] = torch.stack((torch.arange(10), -2 * torch.arange(10)), dim=-1) / 10
    mining = feed(sampler.sample(batch)[BATCH_KEY], gradient)
    assert (mining.indices[:10, 1:] == 50).all()
    sampler.update(mining)
    torch.testing.assert_close(chains_of(sampler).position, 50.25 + 1e-3 * 100**2 * gradient[:10])


@pytest.mark.parametrize("scale", [2.0**16, 1 / 4096, 3.0, 1e-4])
def test_step_sizes_do_not_depend_on_the_loss_scale(scale):
    pools = []
    for factor in (1.0, scale):
        batch, sampler = Case().batch(), make_sampler(rays=200)
        for step in range(3):
            gradient = torch.randn(200, 2, generator=seeded(step))
            sampler.update(feed(sampler.sample(batch)[BATCH_KEY], gradient, seed=step, scale=factor))
        pools.append(chains_of(sampler))
    assert torch.equal(pools[0].image_index, pools[1].image_index)
    torch.testing.assert_close(pools[0].position, pools[1].position, rtol=1e-5, atol=1e-4)


def test_step_sizes_do_not_depend_on_batch_size_and_resolution():
    """A batch twice as large, on images three times as high and wide, moves its chains three times as many pixels."""
    position = 10 + 20 * torch.rand(50, 2, generator=seeded())
    gradient = torch.randn(50, 2, generator=seeded(1))
    moves = []
    for times, repeats in ((1, 1), (3, 2)):
        batch = {"image": torch.zeros(1, 40 * times, 40 * times, 3), "image_idx": torch.tensor([0])}
        rays = 50 * repeats
        sampler = make_sampler(rays, num_images=1, uniform_fraction=0.0, reinit_fraction=0.0, noise=0.0, drift=1e-3)
        sampler.sample(batch)
        start = times * position.repeat(repeats, 1)
        replace_chains(sampler, position=start)
        sampler.update(feed(sampler.sample(batch)[BATCH_KEY], gradient.repeat(repeats, 1) / times))
        moves.append((chains_of(sampler).position - start)[:50])
    assert moves[0].norm(dim=-1).mean() > 1
    torch.testing.assert_close(moves[1], 3 * moves[0], rtol=1e-4, atol=1e-3)


def test_noise_is_isotropic_in_pixels_and_in_units_of_the_mean_side():
    sizes = ((100, 400), (90, 40))
    batch = {"image": [torch.zeros(*size, 3) for size in sizes], "image_idx": torch.tensor([0, 1])}
    sampler = make_sampler(40_000, num_images=2, uniform_fraction=0.0, reinit_fraction=0.0, noise=0.02)
    sampler.sample(batch)
    chart = torch.arange(40_000) % 2
    centre = torch.tensor(sizes)[chart] / 2
    replace_chains(sampler, image_index=chart, position=centre)
    sampler.update(feed(sampler.sample(batch)[BATCH_KEY]))
    for i, (height, width) in enumerate(sizes):
        steps = (chains_of(sampler).position - centre)[chart == i] / (0.02 * math.sqrt(height * width))
        assert (torch.cov(steps.T) - torch.eye(2)).abs().max() < 0.04
        assert steps.mean(0).abs().max() < 0.03


def test_the_pool_grows_and_shrinks_with_the_batch_without_losing_chains():
    batch, sampler = Case().batch(), make_sampler(rays=64, uniform_fraction=0.25)
    train(sampler, batch, 3)
    first = sampler.sample(batch)["indices"]
    before = copy(chains_of(sampler))
    sampler.set_num_rays_per_batch(32)
    small = sampler.sample(batch)
    assert len(small["indices"]) == 32 and torch.equal(small["indices"][:24], first[:24])
    sampler.update(feed(small[BATCH_KEY], 1.0))
    assert not torch.equal(chains_of(sampler).position[:24], before.position[:24])
    assert same(take(chains_of(sampler), slice(24, None)), take(before, slice(24, None)))
    before = copy(chains_of(sampler))
    sampler.set_num_rays_per_batch(128)
    large = sampler.sample(batch)[BATCH_KEY]
    assert len(large.indices) == 128 and large.num_uniform == 32
    assert same(take(chains_of(sampler), slice(48)), before)
    assert (large.density_ratio[48:] == 1).all()


@pytest.mark.parametrize("applied", [True, False, torch.tensor(True), torch.tensor(False)])
def test_a_step_that_was_not_applied_leaves_the_pool_as_it_was(applied):
    batch, sampler = Case().batch(), make_sampler()
    train(sampler, batch, 2)
    before, mining = copy(chains_of(sampler)), sampler.sample(batch)[BATCH_KEY]
    sampler.update(feed(mining, wild(64, 0)), applied)
    assert same(chains_of(sampler), before) == (not applied)


@pytest.mark.parametrize("name", ["one size", "list", "mask"])
def test_outside_of_training_it_is_the_uniform_sampler_of_nerfstudio(name):
    batch, sampler = CASES[name].batch(), make_sampler()
    train(sampler, batch, 2)
    before, generator = copy(chains_of(sampler)), sampler.state_dict()["generator"]
    sampler.training = False
    torch.manual_seed(3)
    ours = sampler.sample(batch)
    torch.manual_seed(3)
    theirs = PixelSamplerConfig(num_rays_per_batch=64).setup().sample(batch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert same(chains_of(sampler), before) and torch.equal(sampler.state_dict()["generator"], generator)


@pytest.mark.parametrize("name", ["one size", "masked list"])
def test_a_resumed_run_continues_bit_for_bit(name):
    batch, sampler = CASES[name].batch(), make_sampler()
    train(sampler, batch, 3)
    state = through_a_file(sampler.state_dict())
    expected = train(sampler, batch, 3, first=3)
    other = make_sampler(seed=99)
    other.load_state_dict(state)
    resumed = train(other, CASES[name].batch(), 3, first=3)
    for ours, theirs in zip(resumed, expected, strict=True):
        assert torch.equal(ours["indices"], theirs["indices"]) and torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours[BATCH_KEY].density_ratio, theirs[BATCH_KEY].density_ratio)
    assert same(chains_of(other), chains_of(sampler))


def test_a_state_is_taken_up_at_the_next_batch_of_a_running_sampler():
    batch, sampler = Case().batch(), make_sampler()
    train(sampler, batch, 2)
    state = through_a_file(sampler.state_dict())
    expected = sampler.sample(batch)["indices"]
    train(sampler, batch, 2)
    sampler.load_state_dict(state)
    assert torch.equal(sampler.sample(batch)["indices"], expected)
    train(sampler, batch, 1)
    assert not torch.equal(sampler.sample(batch)["indices"], expected)


def test_a_sampler_without_any_batch_has_an_empty_state():
    sampler = make_sampler()
    sampler.load_state_dict(through_a_file(sampler.state_dict()))
    assert sampler.state_dict() == {}
    assert len(train(sampler, Case().batch(), 2)) == 2


@pytest.mark.parametrize("resumed", [False, True])
def test_chains_on_images_that_are_gone_are_drawn_anew_and_the_others_stay(resumed):
    sampler = make_sampler(rays=200, uniform_fraction=0.2)
    train(sampler, Case().batch(), 4)
    before = copy(chains_of(sampler))
    if resumed:
        state = through_a_file(sampler.state_dict())
        sampler = make_sampler(rays=200, uniform_fraction=0.2)
        sampler.load_state_dict(state)
    rays = sampler.sample(other_cache())
    stays = torch.isin(before.image_index, other_cache()["image_idx"])
    assert 0 < stays.sum() < 160
    assert same(take(chains_of(sampler), stays), take(before, stays))
    assert torch.isin(chains_of(sampler).image_index, other_cache()["image_idx"]).all()
    assert (chains_of(sampler).density_ratio[~stays] > 0).all()
    assert_true_colours(other_cache(), rays)
    assert_true_colours(other_cache(), train(sampler, other_cache(), 3)[-1])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(drift=-1e-9), "drift"),
        (dict(drift=NAN), "drift"),
        (dict(noise=-1.0), "noise"),
        (dict(uniform_fraction=1.5), "uniform-fraction"),
        (dict(uniform_fraction=NAN), "uniform-fraction"),
        (dict(reinit_fraction=-0.1), "reinit-fraction"),
        (dict(reinit_fraction=1.1), "reinit-fraction"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(
        UserError, match=f"--pipeline.datamanager.pixel-sampler.langevin.{name} .*{next(iter(settings.values()))}"
    ):
        make_config(**settings)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(image=torch.zeros(0, 10, 14, 3), image_idx=torch.zeros(0).long()), "--data"),
        (dict(image=[], image_idx=torch.zeros(0).long()), "--data"),
        (dict(mask=torch.zeros(5, 10, 14, 1).bool()), "ignore-mask"),
        (dict(image=[torch.zeros(10, 14, c) for c in (3, 4, 3, 3, 3)], depth_image=None), "RGBA"),
    ],
    ids=["no images", "empty list", "empty masks", "mixed channels"],
)
def test_bad_images_are_named(change, word):
    batch = {key: value for key, value in (Case().batch() | change).items() if value is not None}
    if len(batch["image"]) == 0:
        del batch["depth_image"]
    with pytest.raises(UserError, match=word):
        make_sampler().sample(batch)


@pytest.mark.parametrize(("rays", "share"), [(4, 0.1), (1, 0.1), (8, 0.01), (1, 0.9), (16, 0.99)])
def test_a_batch_too_small_is_named_with_advice_that_helps(rays, share):
    sampler = make_sampler(rays, uniform_fraction=share, reinit_fraction=0.0)
    with pytest.raises(UserError, match=rf"train-num-rays-per-batch is {rays}.*") as error:
        sampler.sample(Case().batch())
    sampler.set_num_rays_per_batch(int(re.search(r"Set it to (\d+)", str(error.value))[1]))
    sampler.sample(Case().batch())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_no_rays_may_be_uniform(share):
    batch, sampler = Case().batch(), make_sampler(uniform_fraction=share, reinit_fraction=0.0)
    for rays in train(sampler, batch, 4):
        assert len(rays["indices"]) == 64 and rays[BATCH_KEY].num_uniform == 64 * share
    assert (rays[BATCH_KEY].density_ratio == 1).all() == bool(share)
    resumed = make_sampler(uniform_fraction=share, reinit_fraction=0.0, seed=5)
    resumed.load_state_dict(through_a_file(sampler.state_dict()))
    assert torch.equal(resumed.sample(batch)["indices"], sampler.sample(batch)["indices"])


def test_the_global_randomness_is_not_consumed_and_seeds_the_sampler():
    batches = []
    for seed in (0, 0, 1):
        sampler = make_sampler(seed=seed)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        batches.append(train(sampler, Case(masked=True).batch(), 3)[-1]["indices"])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_the_full_images_come_along_if_asked_for():
    batch = Case().batch()
    assert make_sampler(keep_full_image=True).sample(batch)["full_image"] is batch["image"]


@pytest.mark.parametrize("channels", [3, 4])
def test_image_gradient_is_that_of_the_bilinear_interpolation(channels):
    """Against finite differences of torch's own lookup, at every pixel of every image, borders included."""
    case = Case(sizes=SIZES, channels=channels)
    batch = case.batch()
    pixels = TrainingImages(batch, num_images=max(CACHED) + 1)
    for number, image in zip(CACHED, make_images(SIZES, channels), strict=True):
        height, width = image.shape[:2]
        centres = torch.cartesian_prod(torch.arange(height), torch.arange(width)) + 0.5
        count = len(centres)
        gradient = pixels.image_gradient(pixels.as_samples(torch.full((count,), number), centres))

        def lookup(place, image=image):
            grid = (2 * place / torch.tensor(image.shape[:2]) - 1).flip(-1)[None, None]
            options = {"align_corners": False, "padding_mode": "border"}
            return torch.nn.functional.grid_sample(image.permute(2, 0, 1)[None], grid, **options)[0, :, 0].T

        for axis, unit in enumerate(torch.eye(2)):
            difference = (lookup(centres + 0.25 * unit) - lookup(centres - 0.25 * unit)) / 0.5
            torch.testing.assert_close(gradient[..., axis], difference, atol=1e-4, rtol=1e-4)
