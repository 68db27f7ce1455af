"""Laws of the exact draws, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerfstudio_softmining.mining import density as dens

LAW = settings(max_examples=40, deadline=None, derandomize=True)
BYTES = st.lists(st.sampled_from([0, 0, 1, 2, 100, 254, 255]), min_size=1, max_size=200)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def roots_of(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def brute_force(roots: torch.Tensor) -> torch.Tensor:
    return roots.double().square() / roots.double().square().sum()


def p_value(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """Of a chi-square test; 0 where something impossible was counted. Rare outcomes are taken together."""
    if counts[probability == 0].any():
        return 0.0
    expected = probability.double() * counts.sum()
    rare = expected < 10
    observed = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor(max(len(expected) - 1, 1)) / 2.0, statistic / 2).item()


def spread(n: int, *marks: tuple[int, int]) -> torch.Tensor:
    roots = torch.zeros(n, dtype=torch.uint8)
    for index, value in marks:
        roots[index] = value
    return roots


DENSITIES = {
    "one entry": roots_of([3]),
    "fewer than a block": torch.arange(40, dtype=torch.uint8),
    "one block": torch.arange(64, dtype=torch.uint8) + 100,
    "a block and one": torch.arange(65, dtype=torch.uint8) + 5,
    "not whole blocks": torch.randint(256, (333,), generator=seeded(), dtype=torch.uint8),
    "zero blocks": torch.cat([torch.zeros(130), torch.arange(70), torch.zeros(200), torch.ones(9) * 70]).to(
        torch.uint8
    ),
    "first only": spread(200, (0, 9)),
    "last only": spread(200, (-1, 255)),
    "first and last": spread(193, (0, 1), (-1, 2)),
    "block borders": spread(192, (63, 3), (64, 4), (127, 5), (128, 6)),
    "mask": (torch.rand(301, generator=seeded()) < 0.3).view(torch.uint8),
    "strided mask": (torch.rand(301, 3, generator=seeded()) < 0.3)[:, 1].view(torch.uint8),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_follow_the_density(name):
    roots = DENSITIES[name]
    index, probability = dens.draw(dens.tabulate(roots), 200_000, seeded(1))
    expected = brute_force(roots)
    assert p_value(torch.bincount(index, minlength=len(roots)), expected) > 1e-4
    torch.testing.assert_close(probability, expected[index].float())


def test_draws_are_independent():
    roots = roots_of([1, 2, 0, 3])
    pairs = dens.draw(dens.tabulate(roots), 200_000, seeded()).entry.view(-1, 2)
    expected = torch.outer(brute_force(roots), brute_force(roots)).flatten()
    assert p_value(torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16), expected) > 1e-4


def test_draws_are_exact_beyond_2_to_the_24_entries():
    n = 2**24 + 1000
    places = torch.tensor([0, dens.CHUNK - 1, dens.CHUNK, 2**24 - 1, 2**24, 2**24 + 1, n - 2, n - 1])
    values = torch.tensor([9, 10, 11, 12, 13, 14, 15, 255], dtype=torch.uint8)
    roots = torch.zeros(n, dtype=torch.uint8).index_copy_(0, places, values)
    index, probability = dens.draw(dens.tabulate(roots), 200_000, seeded())
    place = torch.searchsorted(places, index)
    assert torch.equal(places[place], index)
    assert p_value(torch.bincount(place, minlength=8), brute_force(values)) > 1e-4
    torch.testing.assert_close(probability, brute_force(values)[place].float())

    full = dens.tabulate(roots.fill_(255))  # a total of 2^40
    assert full.total == n * 255**2
    index, probability = dens.draw(full, 200_000, seeded())
    torch.testing.assert_close(probability, torch.full_like(probability, 1 / n), atol=0, rtol=1e-6)
    for bins, place in ((64, index % 64), (50, index * 50 // n)):
        assert p_value(torch.bincount(place, minlength=bins), torch.full((bins,), 1 / bins)) > 1e-4


@LAW
@given(BYTES, st.integers(0, 99))
def test_what_has_no_weight_is_never_drawn_and_probabilities_sum_to_one(values, seed):
    roots = roots_of(values)
    density = dens.tabulate(roots)
    assert density.total == sum(value**2 for value in values)
    if density.total == 0:
        return
    index, probability = dens.draw(density, 300, seeded(seed))
    assert (roots[index] > 0).all()
    assert torch.equal(probability, dens.probability(density, index))
    everywhere = dens.probability(density, torch.arange(len(roots)))
    torch.testing.assert_close(everywhere, brute_force(roots).float())
    torch.testing.assert_close(everywhere.sum(), torch.tensor(1.0))


def test_an_empty_density_has_nothing_to_draw():
    assert dens.tabulate(torch.zeros(0, dtype=torch.uint8)).total == 0
    assert len(dens.draw(dens.tabulate(roots_of([1, 2])), 0, seeded()).entry) == 0


@LAW
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_bytes_are_monotone_and_their_squares_proportional_to_the_weights(weights, dtype):
    weight = torch.tensor(sorted(weights), dtype=dtype)
    roots = dens.encode(weight)
    assert roots.dtype == torch.uint8 and roots.shape == weight.shape
    assert (roots.int().diff() >= 0).all()
    assert torch.equal(roots == 0, weight == 0)
    exact = 255 * weight.double().sqrt()
    assert (roots >= exact - 1e-4).all() and (roots < exact + 1 + 1e-4).all()


def test_bytes_saturate_and_keep_the_shape():
    assert dens.encode(torch.tensor([[-1.0, 0.0], [1.0, 7.0]])).tolist() == [[0, 0], [255, 255]]


def test_draws_are_those_of_the_given_generator():
    density = dens.tabulate(DENSITIES["not whole blocks"])
    before = torch.get_rng_state()
    draws = [dens.draw(density, 500, seeded(seed)).entry for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
