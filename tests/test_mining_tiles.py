"""Laws of a density that is fixed within tiles and changes tile by tile."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import p_value

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import tiles

LAW = settings(max_examples=40, deadline=None, derandomize=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def densities(draw) -> tiles.TiledDensity:
    """Random tiles with entries of no weight, and tiles of none at all."""
    shape, random = (draw(st.integers(1, 40)), draw(st.integers(1, 70))), seeded(draw(st.integers(0, 99)))
    weights = torch.rand(shape, generator=random) ** 3
    weights *= (torch.rand(shape, generator=random) < 0.7) * (torch.rand(shape[0], 1, generator=random) < 0.7)
    weights[-1, -1] = draw(st.sampled_from((1.0, 1e-6)))
    return tiles.tabulate(dens.encode(weights))


def probabilities(density: tiles.TiledDensity) -> torch.Tensor:
    """By brute force."""
    every = torch.arange(density.codes.numel())
    weights = tiles.weight(density, every).double().view_as(density.codes) * density.factors[:, None]
    return (weights / weights.sum()).flatten()


@LAW
@given(densities())
def test_weights_are_those_that_bytes_stand_for(density):
    """But for what is rounded where a tile's sum has 31 bits; and only 0 has no weight."""
    weights = tiles.weight(density, torch.arange(density.codes.numel())).double().view_as(density.codes)
    unit = density.codes.shape[1] / (2**31 - 1)
    assert ((weights - dens.weight(density.codes).double() / dens.LARGEST).abs() <= weights * 1e-6 + unit).all()
    assert torch.equal(weights > 0, density.codes > 0)
    torch.testing.assert_close(density.sums.double(), weights.sum(dim=1), rtol=1e-5, atol=0)


@LAW
@given(densities(), st.integers(0, 99), st.booleans())
def test_draws_follow_the_weights_and_the_factors_of_their_tiles(density, seed, corrected):
    if corrected:
        density = tiles.corrected(density, torch.rand(len(density.sums), generator=seeded(seed)) * 9 + 0.01)
    law = probabilities(density)
    entry, probability = tiles.draw(density, 20_000, seeded(seed))
    if (law > 0).sum() == 1:
        assert (law[entry] == 1).all()
    else:
        assert p_value(torch.bincount(entry, minlength=len(law)).double(), law) > 1e-5
    torch.testing.assert_close(probability.double(), law[entry], rtol=1e-5, atol=0)
    every = torch.arange(len(law))
    torch.testing.assert_close(tiles.probability(density, every).double(), law, rtol=1e-5, atol=0)


@LAW
@given(densities(), st.integers(0, 99), st.integers(1, 3000))
def test_tiles_have_as_many_draws_as_they_should(density, seed, count):
    """Any row of tiles, but for the two parts that it cuts."""
    entry, _ = tiles.draw(density, count, seeded(seed))
    size = density.codes.shape[1]
    counts = torch.bincount(entry // size, minlength=len(density.sums)).double().cumsum(0)
    assert (counts - count * probabilities(density).view(-1, size).sum(dim=1).cumsum(0)).abs().max() < 2 + 1e-6


def test_each_draw_by_itself_follows_the_density():
    density = tiles.tabulate(dens.encode(torch.rand(5, 3, generator=seeded(0))))
    for number in (0, 2):
        entry = torch.stack([tiles.draw(density, 3, seeded(seed)).entry[number] for seed in range(2000)])
        assert p_value(torch.bincount(entry, minlength=15).double(), probabilities(density)) > 1e-4


@LAW
@given(densities(), st.integers(0, 99))
def test_corrections_replace_each_other(density, seed):
    factors = torch.rand(2, len(density.sums), generator=seeded(seed)) + 0.1
    twice = tiles.corrected(tiles.corrected(density, factors[0]), factors[1])
    once = tiles.corrected(density, factors[1])
    assert all(torch.equal(a, b) for a, b in zip(twice, once, strict=True))


def test_a_large_table_is_drawn_from_everywhere():
    """Also past the 2^24 entries that torch.multinomial ends at."""
    codes = torch.zeros(300_000, 64, dtype=torch.uint8)
    codes[[0, 150_000, -1], [0, 5, -1]] = 255
    entry, probability = tiles.draw(tiles.tabulate(codes), 300, seeded(0))
    assert entry.unique().tolist() == [0, 150_000 * 64 + 5, 300_000 * 64 - 1]
    torch.testing.assert_close(probability, torch.full((300,), 1 / 3))


@LAW
@given(st.integers(0, 99), st.floats(0.01, 100))
def test_ratios_lie_between_what_was_seen_and_what_is_above(seed, trust):
    random = seeded(seed)
    seen = (torch.rand(16, generator=random) < 0.5).float()
    seen[3] = 1
    expected = seen * torch.rand(16, generator=random)
    error = expected * torch.rand(16, generator=random) * 5
    above = [torch.arange(16) // 4, torch.arange(4) // 4]
    ratio = tiles.borrowed(error, expected, above, trust)
    overall = error.sum() / expected.sum()
    of_quarter = [part.sum() for part in error.split(4)], [part.sum() for part in expected.split(4)]
    top = (error.sum() + trust * overall) / (expected.sum() + trust)
    for tile in range(16):
        quarter = tile // 4
        between = (of_quarter[0][quarter] + trust * top) / (of_quarter[1][quarter] + trust)
        torch.testing.assert_close(ratio[tile], (error[tile] + trust * between) / (expected[tile] + trust))
        if not seen[quarter * 4 : quarter * 4 + 4].any():
            torch.testing.assert_close(ratio[tile], overall)
