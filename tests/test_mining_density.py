"""Laws of the exact draws from a table, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerfstudio_softmining.mining import density as dens

LAW = settings(max_examples=40, deadline=None, derandomize=True)
BYTES = st.lists(st.sampled_from([0, 0, 1, 2, 100, 254, 255]), min_size=1, max_size=200)
COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 1000, 2**31 - 1]), min_size=1, max_size=200)
DTYPES = pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(values, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def brute_force(weights: torch.Tensor) -> torch.Tensor:
    """The probability of each index, from the formulas that the documentation gives."""
    if weights.dtype == torch.int32:
        weights = weights.double()
    else:
        weights = torch.where(weights > 0, (dens.LARGEST * 2 ** (24 / 254 * (weights.double() - 255))).round(), 0.0)
    return weights / weights.sum()


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
    return torch.special.gammaincc(torch.tensor(max(len(expected) - 1, 1)).double() / 2, statistic / 2).item()


def spread(n: int, *marks: tuple[int, int], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    weights = torch.zeros(n, dtype=dtype)
    for index, value in marks:
        weights[index] = value
    return weights


DENSITIES = {
    "one index": weights_of([3]),
    "fewer than a block": torch.arange(20, dtype=torch.uint8) + 200,
    "one block": torch.arange(32, dtype=torch.uint8) + 200,
    "a block and one": torch.arange(33, dtype=torch.uint8) + 200,
    "a block of blocks": torch.randint(190, 256, (1024,), generator=seeded(), dtype=torch.uint8),
    "a block of blocks and one": torch.randint(190, 256, (1025,), generator=seeded(), dtype=torch.uint8),
    "not whole blocks": torch.randint(256, (333,), generator=seeded(), dtype=torch.uint8),
    "three levels": torch.randint(200, 256, (3333,), generator=seeded(), dtype=torch.uint8),
    "zero blocks": torch.cat([torch.zeros(130), torch.arange(70) + 180, torch.zeros(2000), torch.ones(9) * 250]).to(
        torch.uint8
    ),
    "first only": spread(200, (0, 9)),
    "last only": spread(200, (-1, 255)),
    "first and last": spread(193, (0, 250), (-1, 255)),
    "block borders": spread(3000, (31, 240), (32, 245), (63, 250), (64, 255), (1023, 252), (1024, 247)),
    "mask": (torch.rand(301, generator=seeded()) < 0.3).view(torch.uint8),
    "strided mask": (torch.rand(301, 3, generator=seeded()) < 0.3)[:, 1].view(torch.uint8),
    "counts": torch.randint(50, (1100,), generator=seeded(), dtype=torch.int32),
    "large counts": spread(1100, (0, 2**31 - 1), (31, 2**30), (32, 3 * 2**29), (-1, 2**31 - 1), dtype=torch.int32),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_follow_the_density(name):
    weights = DENSITIES[name]
    index, probability = dens.draw(dens.from_weights(weights), 200_000, seeded(1))
    expected = brute_force(weights)
    assert p_value(torch.bincount(index, minlength=len(weights)), expected) > 1e-4
    torch.testing.assert_close(probability, expected[index].float())


def test_draws_are_independent():
    weights = weights_of([240, 250, 0, 255])
    pairs = dens.draw(dens.from_weights(weights), 200_000, seeded()).index.view(-1, 2)
    expected = torch.outer(brute_force(weights), brute_force(weights)).flatten()
    assert p_value(torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16), expected) > 1e-4


def test_draws_are_exact_beyond_2_to_the_24_entries():
    n = 2**24 + 1000
    places = torch.tensor([0, 32 * dens.CHUNK - 1, 32 * dens.CHUNK, 2**24 - 1, 2**24, 2**24 + 1, n - 2, n - 1])
    values = torch.tensor([235, 240, 242, 245, 247, 250, 252, 255], dtype=torch.uint8)
    weights = torch.zeros(n, dtype=torch.uint8).index_copy_(0, places, values)
    index, probability = dens.draw(dens.from_weights(weights), 200_000, seeded())
    place = torch.searchsorted(places, index)
    assert torch.equal(places[place], index)
    assert p_value(torch.bincount(place, minlength=8), brute_force(values)) > 1e-4
    torch.testing.assert_close(probability, brute_force(values)[place].float())

    full = dens.from_weights(weights.fill_(255))  # a total above 2^54
    assert float(dens.total(full)) == n * dens.LARGEST
    index, probability = dens.draw(full, 200_000, seeded())
    torch.testing.assert_close(probability, torch.full_like(probability, 1 / n), atol=0, rtol=1e-6)
    for bins, place in ((64, index % 64), (50, index * 50 // n)):
        assert p_value(torch.bincount(place, minlength=bins), torch.full((bins,), 1 / bins)) > 1e-4


@DTYPES
@LAW
@given(st.data(), st.integers(0, 99))
def test_what_has_no_weight_is_never_drawn_and_probabilities_sum_to_one(dtype, data, seed):
    weights = weights_of(data.draw(BYTES if dtype == torch.uint8 else COUNTS), dtype)
    density = dens.from_weights(weights)
    assert dens.total(density) == sum(dens.integer_weight(weights).tolist())
    if dens.total(density) == 0:
        return
    index, probability = dens.draw(density, 300, seeded(seed))
    assert (weights[index] > 0).all()
    assert torch.equal(probability, dens.probability(density, index))
    everywhere = dens.probability(density, torch.arange(len(weights)))
    torch.testing.assert_close(everywhere, brute_force(weights).float())
    torch.testing.assert_close(everywhere.sum(), torch.tensor(1.0))


@DTYPES
def test_an_empty_density_has_nothing_to_draw(dtype):
    assert dens.total(dens.from_weights(torch.zeros(0, dtype=dtype))) == 0
    assert dens.total(dens.from_weights(torch.zeros(70, dtype=dtype))) == 0
    assert len(dens.draw(dens.from_weights(weights_of([1, 2], dtype)), 0, seeded()).index) == 0


def test_draws_are_those_of_the_given_generator():
    density = dens.from_weights(DENSITIES["not whole blocks"])
    before = torch.get_rng_state()
    draws = [dens.draw(density, 500, seeded(seed)).index for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@LAW
@given(
    st.lists(st.floats(0, 1, width=32) | st.floats(2**-26, 2**-18, width=32), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_bytes_are_monotone_and_within_a_few_per_cent(weights, dtype):
    exact = torch.tensor(sorted(weights), dtype=dtype)
    weights = dens.encode(exact)
    assert weights.dtype == torch.uint8 and weights.shape == exact.shape
    assert (weights.int().diff() >= 0).all()
    assert torch.equal(weights == 0, exact == 0)
    low = (exact > 0) & (exact < 2**-24)
    assert (weights[low] <= 1).all()
    within = exact >= 2**-24
    scale = 2 ** (24 / 254 * (weights[within].double() - 255))
    assert ((scale / exact[within] - 1).abs() <= 0.034).all()


def test_weights_double_every_254_over_24_bytes_and_are_positive_integers():
    weights = dens.integer_weight(torch.arange(256, dtype=torch.uint8))
    assert weights.dtype == torch.int64
    assert weights[0] == 0 and weights[1] == dens.LARGEST >> 24 and weights[255] == dens.LARGEST
    assert (weights.diff() > 0).all()
    torch.testing.assert_close(weights[128:].double(), weights[1:129].double() * 2**12, rtol=0.01, atol=0)


def test_what_is_encoded_from_the_weight_of_a_byte_is_that_byte():
    weights = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(dens.encode(dens.integer_weight(weights).to(dtype) / dens.LARGEST), weights)


def test_bytes_saturate_and_keep_the_shape():
    assert dens.encode(torch.tensor([[-1.0, 0.0], [1.0, 7.0]])).tolist() == [[0, 0], [255, 255]]
    assert dens.integer_weight(torch.zeros(2, 3, dtype=torch.uint8)).shape == (2, 3)


@LAW
@given(COUNTS)
def test_counts_are_weights_as_they_are(values):
    weights = weights_of(values, torch.int32)
    assert dens.integer_weight(weights).tolist() == values
    assert dens.total(dens.from_weights(weights)) == sum(values)


@st.composite
def tables(draw) -> dens.TiledDensity:
    """Random tiles with entries of no weight, tiles of none at all, and factors."""
    shape, random = (draw(st.integers(1, 40)), draw(st.integers(1, 70))), seeded(draw(st.integers(0, 99)))
    weights = torch.rand(shape, generator=random) ** 3
    weights *= (torch.rand(shape, generator=random) < 0.7) * (torch.rand(shape[0], 1, generator=random) < 0.7)
    weights[-1, -1] = draw(st.sampled_from((1.0, 1e-6)))
    table = dens.from_weights(dens.encode(weights))
    if draw(st.booleans()):
        table = dens.with_factors(table, torch.rand(shape[0], generator=random) * 9 + 0.01)
    return table


def law_of(table: dens.TiledDensity) -> torch.Tensor:
    """Probability of each index, by brute force."""
    weights = dens.integer_weight(table.weights).double() * table.factors[:, None]
    return (weights / weights.sum()).flatten()


DRAWS = pytest.mark.parametrize("draw", [dens.draw, dens.draw_stratified])


@DRAWS
@LAW
@given(tables(), st.integers(0, 99))
def test_draws_follow_the_weights_and_the_factors_of_their_tiles(draw, table, seed):
    law = law_of(table)
    index, probability = draw(table, 20_000, seeded(seed))
    if (law > 0).sum() == 1:
        assert (law[index] == 1).all()
    else:
        assert p_value(torch.bincount(index, minlength=len(law)).double(), law) > 1e-5
    torch.testing.assert_close(probability.double(), law[index], rtol=1e-5, atol=0)
    torch.testing.assert_close(dens.probability(table, torch.arange(len(law))).double(), law, rtol=1e-5, atol=0)


@LAW
@given(tables(), st.integers(0, 99), st.integers(1, 3000))
def test_stratified_draws_give_tiles_as_many_as_they_should_have(table, seed, count):
    """Any row of tiles, but for the two strata that it cuts."""
    index, _ = dens.draw_stratified(table, count, seeded(seed))
    size = table.weights.shape[1]
    counts = torch.bincount(index // size, minlength=len(table.sums)).double().cumsum(0)
    assert (counts - count * law_of(table).view(-1, size).sum(dim=1).cumsum(0)).abs().max() < 2 + 1e-6


def test_each_stratified_draw_by_itself_follows_the_density():
    table = dens.from_weights(dens.encode(torch.rand(5, 3, generator=seeded(0))))
    for number in (0, 2):
        index = torch.stack([dens.draw_stratified(table, 3, seeded(seed)).index[number] for seed in range(2000)])
        assert p_value(torch.bincount(index, minlength=15).double(), law_of(table)) > 1e-4


@LAW
@given(tables(), st.integers(0, 99))
def test_factors_replace_each_other(table, seed):
    factors = torch.rand(2, len(table.sums), generator=seeded(seed)) + 0.1
    twice = dens.with_factors(dens.with_factors(table, factors[0]), factors[1])
    assert all(map(torch.equal, twice, dens.with_factors(table, factors[1])))


@DTYPES
def test_memory_of_a_large_density_is_what_is_said(dtype):
    density = dens.from_weights(torch.zeros(3_000_001, dtype=dtype))
    real = sum(part.untyped_storage().nbytes() for part in density)
    assert real / 3_000_001 == pytest.approx(dens.bytes_per_entry(density.weights.element_size()), rel=1e-3)
