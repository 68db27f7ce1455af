"""Laws of every way of choosing pixels, each against a brute-force reference."""

from __future__ import annotations

import copy
import math
import random
from typing import get_type_hints

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from sampler_cases import (
    BATCH_KEY,
    CASES,
    EACH_CASE,
    EACH_KIND,
    EACH_MAP,
    EACH_MINED,
    INF,
    MAPPED,
    MINED,
    NAN,
    ONE_SIZE,
    QUICK,
    SIZES,
    Case,
    assert_true_colours,
    density_of,
    feed,
    follows,
    grid,
    make_config,
    make_sampler,
    other_cache,
    q_of,
    seeded,
    through_a_file,
    train,
    wild,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining.priors import laplacian
from nerfstudio_softmining.plugin.pixel_sampler import SPECS, MiningPixelSampler, MiningPixelSamplerConfig
from nerfstudio_softmining.samplers import error_map
from nerfstudio_softmining.samplers.images import fill_invalid
from nerfstudio_softmining.settings import Interval

BYTE = math.log(2) * dens.OCTAVES / 254
"""Logarithm of the factor from one byte to the next."""
LARGE = Case(((32, 48), (40, 40), (64, 33)), masked=True, ids=(6, 1, 3))


def prepared(kind: str, case: Case, rays: int = 64, seed: int = 0, **changes) -> MiningPixelSampler:
    return make_sampler(rays, kind=kind, seed=seed, **QUICK.get(kind, {}) | case.settings | changes)


def step(sampler: MiningPixelSampler, batch: dict, applied: Tensor | bool = True) -> dict:
    """One step with an importance that depends on the pixel alone."""
    rays = sampler.sample(batch)
    sampler.update(feed(rays[BATCH_KEY], importance=q_of(rays["indices"])), applied)
    return rays


def trained(kind: str, case: Case, rays: int = 200, steps: int = 7, **changes) -> MiningPixelSampler:
    sampler, batch = prepared(kind, case, rays, **changes), case.batch()
    for _ in range(steps):
        step(sampler, batch)
    return sampler


def claimed(sampler: MiningPixelSampler, case: Case, mixed: bool = False) -> Tensor:
    """Probability that the map gives each pixel of the cache, in a row; mixed with the uniform share if asked for."""
    pixels, kept, images = case.pixels(), case.uniform() > 0, sampler.run.sampler.images
    relative = torch.zeros(len(pixels)).double()
    samples = images.as_samples(pixels[kept][:, 0], pixels[kept][:, 1:] + 0.5)
    relative[kept] = density_of(sampler).density_ratio(samples).double()
    share = getattr(sampler.run.sampler.config, "uniform_fraction", 0.0) if mixed else 0.0
    return (share + (1 - share) * relative) * case.uniform()


def assert_close(ours: Tensor, theirs: Tensor, steps: float) -> None:
    """Two densities are the same but for some steps of a byte."""
    assert torch.equal(ours > 0, theirs > 0)
    difference = (ours[ours > 0] / theirs[ours > 0]).log()
    assert difference.abs().max() < steps * BYTE


def tensors(thing, seen: set | None = None) -> list[Tensor]:
    """All tensors that something holds, images and masks apart."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        parts = [part for key, part in thing.items() if key not in ("values", "_mask", "context", "generator")]
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    else:
        return tensors(thing.__dict__, seen) if hasattr(thing, "__dict__") else []
    return [tensor for part in parts for tensor in tensors(part, seen)]


def same_tensors(first: dict, second: dict) -> bool:
    ours, theirs = tensors(first), tensors(second)
    return len(ours) == len(theirs) and all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(ours, theirs, strict=True)
    )


def nonsense(mining, seed: int):
    """Feedback that ranges from none to nonsense."""
    values = torch.tensor([0.0, 1e-30, 0.1, 1.0, 1e9, INF, NAN])
    count = len(mining.indices)
    feed(mining, wild(count, seed), values[torch.randint(len(values), (count,), generator=seeded(seed))], seed)
    return mining


@EACH_MINED
@EACH_CASE
def test_rays_stay_on_kept_pixels_and_show_their_colours_whatever_the_feedback(kind, case):
    batch, sampler, kept = case.batch(), prepared(kind, case), case.uniform() > 0
    for number in range(12):
        rays = sampler.sample(batch)
        assert len(rays["indices"]) == len(rays["image"]) == 64
        assert kept[case.place(rays["indices"])].all()
        assert_true_colours(case.batch(), rays)
        density = rays[BATCH_KEY].density_ratio
        assert (density > 0).all() and density.isfinite().all()
        assert kind == "langevin" or not rays[BATCH_KEY].follows_importance.any()
        applied = number % 3 > 0
        sampler.update(nonsense(rays[BATCH_KEY], number), torch.tensor(applied) if number % 2 else applied)


@EACH_MINED
@pytest.mark.parametrize("applied", [False, torch.tensor(False)])
def test_a_step_that_was_not_applied_teaches_nothing(kind, applied):
    changes = dict(reduction=1) if kind == "quadtree" else {}
    if kind in ("error-map", "detail", "mixture"):
        changes = dict(interval=3)
    sampler, batch = trained(kind, Case(), rays=20, steps=4, **changes), Case().batch()
    rays = sampler.sample(batch)
    before = copy.deepcopy(learnt(sampler))
    sampler.update(feed(rays[BATCH_KEY], 1.0), applied)
    assert same_tensors(before, learnt(sampler))
    if kind not in ("edge", "multinomial"):  # what these do does not depend on single rays
        sampler.update(rays[BATCH_KEY], True)
        assert not same_tensors(before, learnt(sampler))


def learnt(sampler) -> dict:
    """The state of a strategy, without starts that langevin has drawn in advance and errors that detail will ignore."""
    state = sampler.run.state_dict()
    fields = {name: value for name, value in state["state"].items() if name != "reserve"}
    fields |= fields.pop("map", {})
    pending = [part for part in fields.get("pending", []) if not part["error"].isnan().all()]
    return {**fields, "pending": pending, "by_image": state["by_image"]}


@EACH_MAP
@EACH_CASE
def test_rays_follow_the_density_that_they_say(kind, case):
    sampler = trained(kind, case)
    density = claimed(sampler, case, mixed=True)
    assert abs(density.sum() - 1) < 1e-4
    assert (density - case.uniform()).abs().sum() > 0.1  # or this would be no test
    rays = sampler.run.draw(20_000).pixels
    assert follows(case, rays.indices, density / density.sum())
    place = case.place(rays.indices)
    torch.testing.assert_close(rays.density_ratio.double(), (density / case.uniform())[place], rtol=1e-4, atol=0)


@EACH_CASE
def test_multinomial_rays_follow_importance_exactly(case):
    density = q_of(case.pixels()) * case.uniform()
    torch.testing.assert_close(claimed(trained("multinomial", case, steps=1), case), density / density.sum())


@pytest.mark.parametrize("name", ["list", "masked fisheye", "masked equirectangular list"])
def test_multinomial_cells_have_the_importance_of_one_pixel_each(name):
    case, asked = CASES[name], []
    evaluate = lambda indices: (asked.append(indices), q_of(indices))[1]  # noqa: E731
    sampler = prepared("multinomial", case, side=3, importance=evaluate)
    sampler.sample(case.batch())
    cells, kept = case.cells(3), case.uniform() > 0
    place = case.place(asked[0])
    assert kept[place].all() and sorted(cells[place].tolist()) == cells[kept].unique().tolist()
    of_cell = torch.zeros(int(cells.max()) + 1).double()
    of_cell[cells[place]] = q_of(asked[0]).double() * case.mass()[place]
    density = of_cell[cells] * kept
    torch.testing.assert_close(claimed(sampler, case), density / density.sum(), rtol=3e-4, atol=0)


def test_multinomial_evaluates_all_kept_pixels_at_each_refresh_and_nothing_between():
    case, asked = CASES["masked list"], []

    def evaluate(indices: Tensor) -> Tensor:
        asked.append((number, indices))
        return q_of(indices) + number

    sampler, batch = prepared("multinomial", case, refresh=4, importance=evaluate), case.batch()
    for number in range(13):  # noqa: B007
        step(sampler, batch)
    assert [when for when, _ in asked] == [0, 4, 8, 12]
    assert all(len(indices) == len(indices.unique(dim=0)) == (case.uniform() > 0).sum() for _, indices in asked)
    density = (q_of(case.pixels()) + 12) * case.uniform()
    torch.testing.assert_close(claimed(sampler, case), density / density.sum())


@pytest.mark.parametrize("value", [0.0, 1.0, NAN, INF])
def test_multinomial_survives_importance_that_is_none_or_nonsense(value):
    case = Case()
    sampler = prepared(
        "multinomial", case, importance=lambda indices: torch.where(indices[:, 2] < 7, q_of(indices), value)
    )
    rays = sampler.sample(case.batch())
    assert rays[BATCH_KEY].density_ratio.isfinite().all() and (rays[BATCH_KEY].density_ratio > 0).all()
    if not math.isfinite(value):
        density = q_of(case.pixels()) * (case.pixels()[:, 2] < 7)
        torch.testing.assert_close(claimed(sampler, case), (density / density.sum()).double())
    sampler = prepared("multinomial", case, importance=lambda indices: torch.full((len(indices),), value))
    assert (sampler.sample(case.batch())[BATCH_KEY].density_ratio == 1).all()


def edge_law(case: Case, shift: int) -> Tensor:
    """How likely each pixel is to be an edge pixel shifted at random, up to a factor."""
    laws = []
    for image in case.shown():
        grey = (image[..., :3].mean(dim=-1) * 255).round().to(torch.uint8).numpy()
        edges = cv2.Canny(grey, 100, 200) > 0
        if image.shape[-1] == 4:
            edges |= cv2.Canny((image[..., 3] * 255).round().to(torch.uint8).numpy(), 100, 200) > 0
        law = torch.zeros(image.shape[:2]).double()
        shifts = range(-shift, shift + 1)
        for row, column in zip(*edges.nonzero(), strict=True):
            for down in shifts:
                for right in shifts:
                    if 0 <= row + down < law.shape[0] and 0 <= column + right < law.shape[1]:
                        law[row + down, column + right] += 1
        laws.append(law.flatten() / len(shifts) ** 2)
    return torch.cat(laws)


@pytest.mark.parametrize(("side", "shift"), [(1, 2), (2, 2), (2, 0), (3, 1)])
@EACH_CASE
def test_edge_rays_follow_shifted_canny_edges(case, side, shift):
    sampler = trained("edge", case, steps=1, cell_size=side, shift=shift)
    assert_close(claimed(sampler, case), case.evened(edge_law(case, shift), side), 0.1)


@EACH_KIND
@pytest.mark.parametrize("name", ["masked list", "masked fisheye"])
def test_colours_that_are_hidden_do_not_matter(kind, name):
    """Black behind a mask, or around the circle of a fisheye lens, is no edge."""
    case = CASES[name]
    shown, repainted = case.batch(), case.batch()
    for image, valid in zip(repainted["image"], case.per_slot(case.mass() > 0), strict=True):
        image[~valid] = torch.rand(3, generator=seeded(1)).round()
    drawn = []
    for batch in (shown, repainted):
        sampler = prepared(kind, case)
        drawn.append([step(sampler, batch)["indices"] for _ in range(7)])
    assert all(torch.equal(*pair) for pair in zip(*drawn, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.02, 0.5, 1.0])
def test_hidden_pixels_have_the_colour_of_the_nearest_valid_one(seed, fraction):
    valid = torch.rand(12, 19, generator=seeded(seed)) < fraction
    valid[3, 4] = True
    places = torch.tensor(grid(12, 19))
    filled = fill_invalid(places.view(12, 19, 2), valid).view(-1, 2)
    assert torch.equal(filled[valid.flatten()], places[valid.flatten()])
    assert valid[filled[:, 0], filled[:, 1]].all()
    distance = torch.cdist(places.double(), places[valid.flatten()].double()).min(dim=1).values
    assert ((filled - places).double().norm(dim=1) <= 1.05 * distance).all()


@EACH_MINED
@pytest.mark.parametrize("importance_weighted", [False, True])
def test_rays_are_weighted_by_their_density_if_the_settings_say_so(kind, importance_weighted):
    assert (
        prepared(kind, Case(), importance_weighted=importance_weighted)
        .sample(Case().batch())[BATCH_KEY]
        .importance_weighted
        == importance_weighted
    )


def test_the_uniform_fraction_is_that_of_the_settings():
    for share, number in ((0.0, 0), (0.25, 16), (1.0, 64)):
        for kind in ("edge", "multinomial", "langevin"):
            mining = trained(kind, Case(), 64, 1, uniform_fraction=share).sample(Case().batch())[BATCH_KEY]
            assert mining.num_uniform == number
            bound = 1 / share if share else INF
            assert not (mining.density_ratio > bound + 1e-3).any()


def error_map_law(case: Case, side: int, told: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Density of the pixels after (indices, error over density) of an interval, by loops."""
    rows, columns = (min(side, *lengths) for lengths in zip(*case.sizes, strict=True))
    size = dict(zip(case.ids, case.sizes, strict=True))
    error = {i: np.full((rows, columns), 1e-30) for i in case.ids}
    for indices, values in told:
        for (i, row, column), value in zip(indices.tolist(), values.tolist(), strict=True):
            if math.isfinite(value):
                place = (row + 0.5) / size[i][0] * rows - 0.5, (column + 0.5) / size[i][1] * columns - 0.5
                place = [min(max(x, 0), count - 1) for x, count in zip(place, (rows, columns), strict=True)]
                for r in range(rows):
                    for c in range(columns):
                        error[i][r, c] += max(0, 1 - abs(place[0] - r)) * max(0, 1 - abs(place[1] - c)) * value
    everything, kept, cells = sum(map(np.sum, error.values())), (case.uniform() > 0).tolist(), []
    chances: dict[tuple, float] = {}
    for i, row, column in case.pixels().tolist():
        r, c = row * rows // size[i][0], column * columns // size[i][1]
        of_chart = 0.9 * error[i].sum() / everything + 0.1 / len(error)
        of_row = 0.99 * error[i][r].sum() / error[i].sum() + 0.01 / rows
        chances[i, r, c] = of_chart * of_row * (0.99 * error[i][r, c] / error[i][r].sum() + 0.01 / columns)
        cells.append((i, r, c))
    count = {cell: 0 for cell in chances}
    for cell, keep in zip(cells, kept, strict=True):
        count[cell] += keep
    law = torch.tensor([chances[cell] / count[cell] if keep else 0.0 for cell, keep in zip(cells, kept, strict=True)])
    return law.double() / law.double().sum()


@pytest.mark.parametrize("name", ["one size", "single", "list", "masked list", "masked fisheye", "equirectangular"])
def test_error_maps_hold_the_error_of_the_last_interval(name):
    case = CASES[name]
    sampler, batch, told, lengths = prepared("error-map", case, 30, interval=3), case.batch(), [], []
    for number in range(3 + 4 + 6):
        rays = sampler.sample(batch)
        mining, before = rays[BATCH_KEY], density_of(sampler)
        assert (before is None) == (number < 3) and ((mining.density_ratio == 1).all() or number >= 3)
        feed(mining, importance=q_of(rays["indices"]))
        mining.error[number] = (NAN, INF)[number % 2]
        sampler.update(mining, number % 3 > 0)
        if number % 3 > 0:
            told.append((mining.indices, mining.error.double() / mining.density_ratio))
        if density_of(sampler) is not before:
            lengths.append(number + 1 - sum(lengths))
            side = int((lengths[-1] * 30 / len(case.ids)) ** 0.25 * 3.5)
            torch.testing.assert_close(claimed(sampler, case), error_map_law(case, side, told), rtol=1e-3, atol=1e-7)
            told = []
    assert lengths == [3, 4, 6]


def test_error_map_cells_are_small_where_all_their_pixels_are_looked_at():
    """So that memory is bounded where there are masks."""
    batch = {"image": torch.zeros(1, 20, 900, 3), "image_idx": torch.tensor([0]), "mask": torch.ones(1, 20, 900, 1)}
    sampler = prepared("error-map", Case(), 4, interval=1)
    step(sampler, batch)
    assert density_of(sampler).grid.cell_size <= error_map.MAX_CELL_SIZE
    del batch["mask"]
    sampler = prepared("error-map", Case(), 4, interval=1)
    step(sampler, batch)
    assert density_of(sampler).grid.cell_size > error_map.MAX_CELL_SIZE


def detail_law(case: Case, side: int, told: list[tuple[Tensor, Tensor]], trust: float, power: float) -> Tensor:
    """Density of the pixels of cells of a side after (indices, importance) since the start, by loops over tiles."""
    static = torch.cat([laplacian(image).flatten().double() for image in case.shown()]) + 0.003
    cells, kept = case.cells(side), case.uniform() > 0
    sums = torch.zeros(int(cells.max()) + 1).double().index_add_(0, cells, static * case.mass()) / side**2
    count = torch.zeros(len(sums)).double().index_add_(0, cells, kept.double())
    place = torch.cat([case.place(indices) for indices, _ in told])
    importance, expected = torch.cat([q for _, q in told]).double(), sums.sqrt()[cells[place]]
    expected *= importance.sum() / expected.sum()
    ratio, size = torch.ones(len(cells)).double(), dict(zip(case.ids, case.sizes, strict=True))
    for tile_side in (32, 16, 8, 4):
        tiles: dict[tuple, list[int]] = {}
        for number, (i, *at) in enumerate(case.pixels().tolist()):
            in_cells = [x * math.ceil(length / side) // length for x, length in zip(at, size[i], strict=True)]
            tiles.setdefault((i, *(x // tile_side for x in in_cells)), []).append(number)
        for members in map(torch.tensor, tiles.values()):
            mine = torch.isin(place, members)
            error, trusted = importance[mine].sum(), trust * importance.mean()
            ratio[members] = (error + trusted * ratio[members[0]]) / (expected[mine].sum() + trusted)
    law = torch.where(kept, (sums / count)[cells] * ratio**power, 0.0)
    return law / law.sum()


@pytest.mark.parametrize("side", [1, 2])
@EACH_CASE
def test_detail_rays_follow_detail_and_then_the_error_of_tiles(case, side):
    settings = dict(cell_size=side, interval=3, prior_strength=2.0, error_exponent=1.5)
    sampler, batch, told = prepared("detail", case, 100, **settings), case.batch(), []
    static, kept = case.detail(side), case.uniform() > 0
    for number in range(3):
        rays = sampler.sample(batch)
        if number == 0:
            assert_close(claimed(sampler, case), static, 1.1)
        mining = feed(rays[BATCH_KEY], importance=q_of(rays["indices"]) ** 2)
        mining.importance[number] = (NAN, INF)[number % 2]
        told.append((mining.indices, mining.importance))
        sampler.update(mining, True)
    told = [(indices[q.isfinite()], q[q.isfinite()]) for indices, q in told]
    law = detail_law(case, side, told, trust=2.0, power=1.5)
    assert (law / static)[kept].log().std() > 0.1  # or this would be no test
    assert_close(claimed(sampler, case), law, 2)


def test_corrections_of_detail_have_growing_intervals_and_forget():
    case = Case(((40, 40),), ids=(0,))
    sampler, batch, lengths = prepared("detail", case, 400, interval=4, cell_size=1), case.batch(), []
    left = case.pixels()[:, 2] < 20
    for number in range(60):
        rays, before = sampler.sample(batch), density_of(sampler)
        bright = (rays["indices"][:, 2] < 20) == (number < 20)
        sampler.update(feed(rays[BATCH_KEY], importance=torch.where(bright, 0.5, 0.1)), True)
        if density_of(sampler) is not before:
            lengths.append(number + 1 - sum(lengths))
            share = claimed(sampler, case)[left].sum()
            assert share > 0.6 or number > 20
    assert lengths[:6] == [4, 5, 6, 7, 8, 10] and share < 0.4


def test_every_batch_of_detail_has_its_share_of_each_part_of_the_images():
    """Although the batches until the next correction are drawn together, and whatever their size."""
    case = Case(((60, 40),), ids=(0,))
    sampler, batch = prepared("detail", case, interval=8, cell_size=1, tile=4), case.batch()
    sizes, seen = [200] * 5 + [101] * 3 + [200] * 10, []
    for count in sizes:
        sampler.set_num_rays_per_batch(count)
        rays, density = sampler.sample(batch), claimed(sampler, case)
        for top in (20, 40):
            share = density[case.pixels()[:, 1] < top].sum()
            by_map = rays["indices"][: count - rays[BATCH_KEY].num_uniform]
            assert abs((by_map[:, 1] < top).sum() - share * len(by_map)) < 3
        known = (0.1 + 0.9 * density / case.uniform())[case.place(rays["indices"])]
        torch.testing.assert_close(rays[BATCH_KEY].density_ratio.double(), known, rtol=0.02, atol=0)
        seen.append(rays["indices"])
        sampler.update(feed(rays[BATCH_KEY], importance=q_of(rays["indices"])), True)
    assert not torch.equal(seen[0], seen[1])


FOREST = Case(((64, 64), (32, 96), (80, 40)), ids=(2, 0, 1))


def leaf(case: Case, depth: Tensor) -> list[tuple]:
    """The leaf of each pixel: image, depth, row and column."""
    size = dict(zip(case.ids, case.sizes, strict=True))
    return [
        (i, d, row * 2**d // size[i][0], column * 2**d // size[i][1])
        for (i, row, column), d in zip(case.pixels().tolist(), depth.tolist(), strict=True)
    ]


def rates(case: Case, depth: Tensor, settled: float) -> Tensor:
    """Density of each pixel of trees of the given depths, up to a factor, where there is no contrast."""
    parts = []
    for part, (height, width) in zip(case.per_slot(depth), case.sizes, strict=True):
        rate = (settled / (height * width / 4.0**part)).clamp_max(1)
        parts.append(torch.where(part == part.max(), 1.0, rate).flatten())
    return torch.cat(parts).double()


def importance_of_corner(indices: Tensor) -> Tensor:
    """High in the top left of image 2 and in the bottom right of image 0, low elsewhere."""
    image, row, column = indices.unbind(-1)
    high = (image == 2) & (row < 24) & (column < 40) | (image == 0) & (row > 10) & (column > 50)
    return torch.where(high, 0.5, 0.01)


def test_quadtrees_divide_leaves_of_high_error_and_draw_the_others_rarely():
    options = dict(initial_depth=1, reduction=8, threshold=0.1, settled_rays=2.0, contrast_fraction=0.0)
    sampler, batch = prepared("quadtree", FOREST, 500, **options), FOREST.batch()
    depth = torch.ones(len(FOREST.pixels())).long()
    deepest = torch.cat([torch.full((h * w,), int(math.log2(min(h, w) // 8))) for h, w in FOREST.sizes])
    sums: dict[tuple, list[float]] = {}
    rays_of_epoch, epochs = 0, 0
    for number in range(12):
        rays = sampler.sample(batch)
        importance = importance_of_corner(rays["indices"])
        if number >= 3:  # what has settled by then stays so
            importance[:] = 0.5
        importance[:3] = NAN
        applied = number % 4 > 0
        sampler.update(feed(rays[BATCH_KEY], importance=importance), applied)
        leaves, place = leaf(FOREST, depth), FOREST.place(rays["indices"]).tolist()
        for number_of_ray, p in enumerate(place):
            if number_of_ray >= 3 and applied:
                sums.setdefault(leaves[p], []).append(importance[number_of_ray].item())
        rays_of_epoch += 500
        if rays_of_epoch >= len(depth) / 8:
            level = torch.cat([part.max().expand(part.numel()) for part in FOREST.per_slot(depth)])
            divide = [sum(sums.get(key, [0])) / len(sums.get(key, [0])) > 0.1 for key in leaves]
            depth = depth + (torch.tensor(divide) & (depth == level) & (depth < deepest))
            sums, rays_of_epoch, epochs = {}, 0, epochs + 1
        law = rates(FOREST, depth, 2.0 * 8)
        assert_close(claimed(sampler, FOREST), law / law.sum(), 1.01)
    assert epochs >= 3 and set(depth.tolist()) == {1, 2, 3}


def deviation(image: Tensor) -> Tensor:
    """Standard deviation of the colours in the 3 x 3 pixels around each, by loops."""
    padded = np.pad(image.double().numpy(), ((1, 1), (1, 1), (0, 0)), mode="edge")
    result = torch.empty(image.shape[:2]).double()
    for row, column in np.ndindex(*image.shape[:2]):
        around = padded[row : row + 3, column : column + 3].reshape(9, -1)
        result[row, column] = math.sqrt(around.var(axis=0).mean())
    return result


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_within_a_leaf_quadtree_rays_follow_contrast(share):
    case = Case(((32, 32), (16, 48)), ids=(2, 0), masked=True)
    sampler = prepared("quadtree", case, initial_depth=1, contrast_fraction=share)
    sampler.sample(case.batch())
    kept, cells = (case.uniform() > 0).double(), case.cells(2)
    contrast = torch.cat([deviation(image).flatten() for image in case.shown()]) * kept

    def mean_of(groups: Tensor, values: Tensor) -> Tensor:
        sums, count = (torch.zeros(int(groups.max()) + 1).double().index_add_(0, groups, v) for v in (values, kept))
        return (sums / count)[groups]

    numbers = {key: n for n, key in enumerate(dict.fromkeys(leaf(case, torch.ones(len(kept)).long())))}
    leaves = torch.tensor([numbers[key] for key in leaf(case, torch.ones(len(kept)).long())])
    law = ((1 - share) + share * mean_of(cells, contrast) / mean_of(leaves, contrast)) * kept
    law = torch.where(kept > 0, law, 0.0)
    assert_close(claimed(sampler, case), law / law.sum(), 1.3)


@EACH_MAP
def test_where_nothing_stands_out_rays_are_nearly_uniform(kind):
    case = Case(((70, 70),) * 2, ids=(0, 1))
    batch = case.batch() | {"image": torch.full((2, 70, 70, 3), 0.3)}
    changes = {"error-map": dict(interval=20)}.get(kind, {})
    sampler = prepared(kind, case, 1000, importance=lambda indices: torch.full((len(indices),), 0.5), **changes)
    for _ in range(22):
        rays = sampler.sample(batch)
        sampler.update(feed(rays[BATCH_KEY], importance=torch.full((1000,), 0.5)))
        density = rays[BATCH_KEY].density_ratio
    if kind == "error-map":  # as noisy as the number of rays in its cells
        assert (density - 1).abs().mean() < 0.25 and density.max() < 2
    else:
        torch.testing.assert_close(density, torch.ones(1000))


@EACH_MINED
@pytest.mark.parametrize("first", [1, 3, 4])
def test_a_resumed_run_continues_bit_for_bit_in_the_middle_of_anything(kind, first):
    case, changes = (LARGE, dict(initial_depth=0, threshold=0.3)) if kind == "quadtree" else (CASES["masked list"], {})
    sampler, batch = prepared(kind, case, 100, **changes), case.batch()
    train(sampler, batch, first)
    state = through_a_file(sampler.state_dict())
    expected = train(sampler, batch, 6, first=first)
    other = prepared(kind, case, 100, seed=99, **changes)
    other.load_state_dict(state)
    assert same_tensors(other.state_dict(), state)
    resumed = train(other, case.batch(), 6, first=first)
    for ours, theirs in zip(resumed, expected, strict=True):
        assert torch.equal(ours["indices"], theirs["indices"]) and torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours[BATCH_KEY].density_ratio, theirs[BATCH_KEY].density_ratio)
    assert same_tensors(other.state_dict(), sampler.state_dict())


@EACH_MINED
@pytest.mark.parametrize("factors", [(1, 2), (2, 1)], ids=["larger", "smaller"])
def test_a_run_goes_on_at_another_resolution(kind, factors):
    cases = [Case(tuple((f * height, f * width) for height, width in SIZES), masked=True) for f in factors]
    before, after = (prepared(kind, case, 100) for case in cases)
    train(before, cases[0].batch(), 5)
    after.load_state_dict(through_a_file(before.state_dict()))
    size = {i: torch.tensor(size) for i, size in zip(cases[1].ids, cases[1].sizes, strict=True)}
    for rays in train(after, cases[1].batch(), 6):
        assert all((torch.tensor(pixel) < size[i]).all() for i, *pixel in rays["indices"].tolist())


def test_a_run_resumed_with_another_uniform_fraction_draws_by_it_at_once():
    sampler, case = prepared("detail", Case(), 3000, uniform_fraction=0.1), Case()
    train(sampler, case.batch(), 1)
    other = prepared("detail", Case(), 3000, uniform_fraction=0.5)
    other.load_state_dict(through_a_file(sampler.state_dict()))
    width = case.sizes[0][1]

    def flat_fraction(rays: dict) -> float:  # images are flat in the left third
        return float((rays["indices"][:, 2] < width / 4).float().mean())

    assert flat_fraction(sampler.sample(case.batch())) < 0.07
    assert 0.1 < flat_fraction(other.sample(case.batch())) < 0.2


@EACH_KIND
def test_a_checkpoint_of_another_kind_is_left_and_said_so(kind, capsys):
    batch, other = Case().batch(), "edge" if kind != "edge" else "quadtree"
    state = through_a_file(trained(other, Case(), 64, 2).state_dict())
    capsys.readouterr()
    sampler, fresh = prepared(kind, Case()), prepared(kind, Case())
    sampler.load_state_dict(state)
    said = capsys.readouterr().out.strip()
    assert other in said and kind in said and ".kind" in said
    torch.manual_seed(0)
    ours = train(sampler, batch, 2)
    torch.manual_seed(0)
    theirs = train(fresh, batch, 2)
    assert torch.equal(ours[-1]["indices"], theirs[-1]["indices"])


@EACH_MINED
def test_the_cache_may_change(kind):
    case, other = Case(), Case(ONE_SIZE[:4], ids=(5, 8, 0, 7))
    sampler = prepared(kind, case)
    batches = {True: (case, case.batch()), False: (other, other_cache())}
    for number in range(12):
        which, batch = batches[number % 4 < 2]
        rays = step(sampler, batch)
        which.place(rays["indices"])
        assert_true_colours(batch, rays)
        if kind in MAPPED and density_of(sampler) is not None:
            assert abs(claimed(sampler, which).sum() - 1) < 1e-4


@pytest.mark.parametrize("resumed", [False, True])
def test_quadtrees_of_images_that_come_back_are_as_they_were(resumed):
    options = dict(initial_depth=1, reduction=8, threshold=0.1)
    sampler = prepared("quadtree", FOREST, 500, **options)
    batch, other = FOREST.batch(), {"image": torch.rand(1, 64, 64, 3), "image_idx": torch.tensor([7])}
    for _ in range(6):
        rays = sampler.sample(batch)
        sampler.update(feed(rays[BATCH_KEY], importance=importance_of_corner(rays["indices"])))
    before, depth = claimed(sampler, FOREST), sampler.run.state.depth.clone()
    step(sampler, other)
    assert (sampler.run.state.depth == 1).all() and depth.max() > 1
    if resumed:
        state = through_a_file(sampler.state_dict())
        sampler = prepared("quadtree", FOREST, 500, **options)
        sampler.load_state_dict(state)
        sampler.sample(other)
    sampler.sample(FOREST.batch())
    assert torch.equal(claimed(sampler, FOREST), before) and torch.equal(sampler.run.state.depth, depth)


@pytest.mark.parametrize("resumed", [False, True])
def test_tiles_of_images_that_come_back_are_as_they_were(resumed):
    case, other = Case(), other_cache()
    sampler = trained("detail", case, 64, 6)
    before, seen = claimed(sampler, case), sampler.run.state.seen.clone()
    assert seen.any() and density_of(sampler).table.factors.std() > 0
    assert_true_colours(other, sampler.sample(other))
    if resumed:
        state = through_a_file(sampler.state_dict())
        sampler = prepared("detail", case)
        sampler.load_state_dict(state)
    sampler.sample(case.batch())
    assert torch.equal(claimed(sampler, case), before) and (sampler.run.state.seen >= seen).all()
    assert_true_colours(case.batch(), sampler.sample(case.batch()))


@EACH_MINED
def test_the_batch_size_may_change_every_step(kind):
    case = CASES["masked list"]
    sampler, batch = prepared(kind, case), case.batch()
    for number in (64, 10, 300, 11, 64, 200, 12, 13):
        sampler.set_num_rays_per_batch(number)
        rays = step(sampler, batch)
        assert len(rays["indices"]) == len(rays["image"]) == len(rays[BATCH_KEY].density_ratio) == number
    if kind in MAPPED:
        indices, density = sampler.run.draw(5000).pixels.indices, claimed(sampler, case, True)
        assert follows(case, indices, density / density.sum())


@pytest.mark.parametrize("training", [True, False])
@EACH_CASE
def test_the_uniform_kind_is_the_sampler_of_nerfstudio(case, training):
    batches = []
    for sampler in (PixelSamplerConfig(num_rays_per_batch=64, **case.settings).setup(), prepared("uniform", case)):
        sampler.training = training
        torch.manual_seed(3)
        random.seed(3)
        try:
            batches.append([sampler.sample(case.batch()) for _ in range(3)])
        except IndexError:
            assert case.masked and case.sizes == SIZES and not batches
            pytest.skip("nerfstudio itself fails where images of different sizes have masks")
    for theirs, ours in zip(*batches, strict=True):
        mining = ours.pop(BATCH_KEY, None)
        assert (mining is not None) == training
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        if mining is not None:
            assert mining.num_uniform == 64 and (mining.density_ratio == 1).all() and mining.image_gradient is None


@EACH_MINED
def test_the_global_randomness_is_not_consumed_and_seeds_every_kind(kind):
    case, batches = CASES["masked list"], []
    for seed in (0, 0, 1):
        sampler = prepared(kind, case, seed=seed)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        batches.append(train(sampler, case.batch(), 5)[-1]["indices"])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


@pytest.mark.parametrize("kind", ["edge", "langevin", "quadtree", "detail"])
@pytest.mark.parametrize("name", ["one size", "masked list"])
def test_cells_become_larger_where_memory_is_scarce(kind, name, capsys):
    case = CASES[name]
    num_pixels = len(case.pixels())
    budget = num_pixels / 8
    sampler = trained(kind, case, steps=3, map_memory=budget / 1e9)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("map_memory") == 1 and "instead of 2 x 2" in said
    density = sampler.run.sampler.start_density if kind == "langevin" else density_of(sampler)
    side = density.grid.cell_size
    per_cell = 3.0 if kind == "detail" else dens.bytes_per_entry(2 if kind == "quadtree" else 1)
    assert num_pixels / side**2 * per_cell <= budget < num_pixels / (side - 1) ** 2 * per_cell
    if kind == "langevin":
        samples, law = density.draw(20_000), case.edges(side)
    else:
        samples, law = sampler.run.draw(20_000).pixels, claimed(sampler, case, mixed=True)
    assert abs(law.sum() - 1) < 1e-4
    assert follows(case, samples.indices, law / law.sum())


@pytest.mark.parametrize("kind", ["edge", "langevin", "error-map", "quadtree", "detail", "mixture"])
@pytest.mark.parametrize("masked", [False, True])
def test_maps_take_less_than_a_byte_a_pixel(kind, masked):
    # the pool of mixture grows with the batch alone: small beside its map only where the images are larger
    (height, width), rays = ((600, 800), 100) if kind == "mixture" else ((300, 400), 500)
    batch = {"image": torch.rand(2, height, width, 3, generator=seeded()), "image_idx": torch.tensor([0, 1])}
    if masked:
        batch["mask"] = torch.rand(2, height, width, 1, generator=seeded()) < 0.5
    sampler = prepared(kind, Case(), rays=rays)
    for _ in range(5):
        step(sampler, batch)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(sampler.run)}
    assert sum(storages.values()) > 0
    assert sum(storages.values()) / (2 * height * width) < 1


class Made(TorchDispatchMode):
    """Counts the elements that operations make."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given_in = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given_in:
                self.count += tensor.numel()
        return result


@EACH_MINED
def test_a_step_costs_the_same_on_larger_images(kind):
    """Beside what is amortised: evaluations and epochs."""
    changes = {"multinomial": dict(refresh=99, side=2), "quadtree": dict(reduction=1)}
    counts = []
    for side in (48, 240):  # whose trees of sums have the same depth
        batch = {"image": torch.rand(2, side, side, 3, generator=seeded()), "image_idx": torch.tensor([0, 1])}
        sampler = prepared(kind, Case(), 100, **changes.get(kind, {}))
        for _ in range(3):
            step(sampler, batch)
        with Made() as made:
            step(sampler, batch)
        counts.append(made.count)
    assert 0 < counts[1] < 1.1 * counts[0]


def bad_settings():
    """Values out of the bounds of every setting of every kind."""
    for kind, spec in SPECS.items():
        for name, hint in get_type_hints(spec.config, include_extras=True).items():
            for bounds in getattr(hint, "__metadata__", ()):
                assert isinstance(bounds, Interval)
                values = [-1, *([0] if bounds.low == 1 or bounds.excludes_low else []), *([1.5] * (bounds.high == 1))]
                yield from ((kind, name, bad) for bad in (*values, *([NAN] if hint.__origin__ is float else [])))


def test_all_numbers_have_bounds():
    for spec in SPECS.values():
        for name, hint in get_type_hints(spec.config).items():
            assert hint not in (int, float) or any((spec.name, name) == bad[:2] for bad in bad_settings())


@pytest.mark.parametrize(("kind", "name", "value"), bad_settings())
def test_every_setting_out_of_range_is_named(kind, name, value):
    flag = rf"--pipeline.datamanager.pixel-sampler.{kind}.{name.replace('_', '-')} is {value}"
    with pytest.raises(UserError, match=flag):
        make_config(kind, **{name: value})
    with pytest.raises(UserError, match=flag):  # whichever kind is used
        MiningPixelSamplerConfig(kind="uniform", **{SPECS[kind].field: SPECS[kind].config(**{name: value})})


@pytest.mark.parametrize(
    ("name", "value"), [("cell_size", 0), ("cell_size", -1), ("map_memory", 0.0), ("map_memory", NAN)]
)
def test_every_setting_of_the_sampler_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=f"pixel-sampler.{name.replace('_', '-')} is {value}"):
        make_config(**{name: value})


@st.composite
def caches(draw) -> tuple[dict, list]:
    """Images of any size and number, with or without masks that keep a pixel."""
    num, low = draw(st.integers(1, 4)), 1
    size = st.tuples(st.integers(low, 20), st.integers(low, 20))
    sizes = [draw(size)] * num if draw(st.booleans()) else [draw(size) for _ in range(num)]
    generator, dtype = seeded(draw(st.integers(0, 99))), draw(st.sampled_from([torch.float32, torch.float64]))
    channels = draw(st.sampled_from([3, 4]))
    images = [torch.rand(*shape, channels, generator=generator).to(dtype) for shape in sizes]
    masks = [torch.rand(*shape, 1, generator=generator) < 0.5 for shape in sizes]
    masks[-1][-1, -1] = True
    as_list = len(set(sizes)) > 1 or draw(st.booleans())
    batch = {"image": images if as_list else torch.stack(images), "image_idx": torch.randperm(num, generator=generator)}
    if draw(st.booleans()):
        batch["mask"] = masks if as_list else torch.stack(masks)
    return batch, masks if "mask" in batch else [torch.ones_like(mask) for mask in masks]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(caches(), st.sampled_from(MINED), st.integers(1, 70), st.integers(1, 5), st.booleans())
def test_any_cache_can_be_drawn_from(cache, kind, rays, side, panorama):
    batch, masks = cache
    changes = dict(uniform_fraction=0.0) if kind in ("edge", "langevin", "multinomial", "detail") else {}
    changes |= dict(side=side) if kind == "multinomial" else {}
    rays = max(rays, 6) if kind == "mixture" else rays  # each of its three parts needs a ray
    sampler = make_sampler(
        rays, 4, kind=kind, cell_size=side, is_equirectangular=panorama, **QUICK.get(kind, {}) | changes
    )
    slot = {i: n for n, i in enumerate(batch["image_idx"].tolist())}
    for number in range(6):
        drawn = sampler.sample(batch)
        assert len(drawn["indices"]) == rays
        assert all(masks[slot[i]][row, column] for i, row, column in drawn["indices"].tolist())
        assert_true_colours(batch, drawn)
        assert (drawn[BATCH_KEY].density_ratio > 0).all()
        sampler.update(feed(drawn[BATCH_KEY], wild(rays, number), seed=number))
