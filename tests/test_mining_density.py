"""Laws of the exact draws and of the tree that they are made from, against brute force."""

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
BORDERS = [0, 1, 31, 32, 33, 1023, 1024, 1025, 32767, 32768, 32769, 40_000, 40_031]
"""Of blocks of 32 entries, of 32 of those and of 32 of those, in a density of 40,032 entries."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes_of(values, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def brute_force(codes: torch.Tensor) -> torch.Tensor:
    """The probability of each entry, from the formulas that the documentation gives."""
    if codes.dtype == torch.int32:
        weights = codes.double()
    else:
        weights = torch.where(codes > 0, (dens.LARGEST * 2 ** (24 / 254 * (codes.double() - 255))).round(), 0.0)
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


def same(a: dens.DiscreteDensity, b: dens.DiscreteDensity) -> bool:
    pairs = zip((a.codes, *a.sums), (b.codes, *b.sums), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def spread(n: int, *marks: tuple[int, int], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    codes = torch.zeros(n, dtype=dtype)
    for index, value in marks:
        codes[index] = value
    return codes


DENSITIES = {
    "one entry": codes_of([3]),
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
    codes = DENSITIES[name]
    entry, probability = dens.draw(dens.tabulate(codes), 200_000, seeded(1))
    expected = brute_force(codes)
    assert p_value(torch.bincount(entry, minlength=len(codes)), expected) > 1e-4
    torch.testing.assert_close(probability, expected[entry].float())


def test_draws_are_independent():
    codes = codes_of([240, 250, 0, 255])
    pairs = dens.draw(dens.tabulate(codes), 200_000, seeded()).entry.view(-1, 2)
    expected = torch.outer(brute_force(codes), brute_force(codes)).flatten()
    assert p_value(torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16), expected) > 1e-4


def test_draws_are_exact_beyond_2_to_the_24_entries():
    n = 2**24 + 1000
    places = torch.tensor([0, dens.CHUNK - 1, dens.CHUNK, 2**24 - 1, 2**24, 2**24 + 1, n - 2, n - 1])
    values = torch.tensor([235, 240, 242, 245, 247, 250, 252, 255], dtype=torch.uint8)
    codes = torch.zeros(n, dtype=torch.uint8).index_copy_(0, places, values)
    entry, probability = dens.draw(dens.tabulate(codes), 200_000, seeded())
    place = torch.searchsorted(places, entry)
    assert torch.equal(places[place], entry)
    assert p_value(torch.bincount(place, minlength=8), brute_force(values)) > 1e-4
    torch.testing.assert_close(probability, brute_force(values)[place].float())

    full = dens.tabulate(codes.fill_(255))  # a total above 2^54
    assert dens.total(full) == n * dens.LARGEST
    entry, probability = dens.draw(full, 200_000, seeded())
    torch.testing.assert_close(probability, torch.full_like(probability, 1 / n), atol=0, rtol=1e-6)
    for bins, place in ((64, entry % 64), (50, entry * 50 // n)):
        assert p_value(torch.bincount(place, minlength=bins), torch.full((bins,), 1 / bins)) > 1e-4


def test_draws_are_uniform_up_to_the_largest_total():
    """From the sums alone of three equal blocks, too large for entries that fit here: which block an entry is in."""
    for total in (2**62, 2**62 * 2 // 3, 2**61 + 2**60, 2**60 // 7 * 6):
        sums = torch.tensor([total // 3] * 3 + [0] * (dens.BRANCHES - 3))
        entry = dens.draw(dens.DiscreteDensity(torch.ones(96, dtype=torch.int32), (sums,)), 50_000, seeded()).entry
        assert p_value(torch.bincount(entry // dens.BRANCHES, minlength=3), torch.full((3,), 1 / 3)) > 1e-4


@DTYPES
@LAW
@given(st.data(), st.integers(0, 99))
def test_what_has_no_weight_is_never_drawn_and_probabilities_sum_to_one(dtype, data, seed):
    codes = codes_of(data.draw(BYTES if dtype == torch.uint8 else COUNTS), dtype)
    density = dens.tabulate(codes)
    assert dens.total(density) == sum(dens.weight(codes).tolist())
    if dens.total(density) == 0:
        return
    entry, probability = dens.draw(density, 300, seeded(seed))
    assert (codes[entry] > 0).all()
    assert torch.equal(probability, dens.probability(density, entry))
    everywhere = dens.probability(density, torch.arange(len(codes)))
    torch.testing.assert_close(everywhere, brute_force(codes).float())
    torch.testing.assert_close(everywhere.sum(), torch.tensor(1.0))


@DTYPES
def test_an_empty_density_has_nothing_to_draw(dtype):
    assert dens.total(dens.tabulate(torch.zeros(0, dtype=dtype))) == 0
    assert dens.total(dens.tabulate(torch.zeros(70, dtype=dtype))) == 0
    assert len(dens.draw(dens.tabulate(codes_of([1, 2], dtype)), 0, seeded()).entry) == 0


def test_draws_are_those_of_the_given_generator():
    density = dens.tabulate(DENSITIES["not whole blocks"])
    before = torch.get_rng_state()
    draws = [dens.draw(density, 500, seeded(seed)).entry for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@LAW
@given(
    st.lists(st.floats(0, 1, width=32) | st.floats(2**-26, 2**-18, width=32), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_bytes_are_monotone_and_within_a_few_per_cent(weights, dtype):
    exact = torch.tensor(sorted(weights), dtype=dtype)
    codes = dens.encode(exact)
    assert codes.dtype == torch.uint8 and codes.shape == exact.shape
    assert (codes.int().diff() >= 0).all()
    assert torch.equal(codes == 0, exact == 0)
    low = (exact > 0) & (exact < 2**-24)
    assert (codes[low] <= 1).all()
    within = exact >= 2**-24
    scale = 2 ** (24 / 254 * (codes[within].double() - 255))
    assert ((scale / exact[within] - 1).abs() <= 0.034).all()


def test_weights_double_every_254_over_24_bytes_and_are_positive_integers():
    weights = dens.weight(torch.arange(256, dtype=torch.uint8))
    assert weights.dtype == torch.int64
    assert weights[0] == 0 and weights[1] == dens.LARGEST >> 24 and weights[255] == dens.LARGEST
    assert (weights.diff() > 0).all()
    torch.testing.assert_close(weights[128:].double(), weights[1:129].double() * 2**12, rtol=0.01, atol=0)


def test_what_is_encoded_from_the_weight_of_a_byte_is_that_byte():
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(dens.encode(dens.weight(codes).to(dtype) / dens.LARGEST), codes)


def test_bytes_saturate_and_keep_the_shape():
    assert dens.encode(torch.tensor([[-1.0, 0.0], [1.0, 7.0]])).tolist() == [[0, 0], [255, 255]]
    assert dens.weight(torch.zeros(2, 3, dtype=torch.uint8)).shape == (2, 3)


@LAW
@given(COUNTS)
def test_counts_are_weights_as_they_are(values):
    codes = codes_of(values, torch.int32)
    assert dens.weight(codes).tolist() == values
    assert dens.total(dens.tabulate(codes)) == sum(values)


@LAW
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.floats(2**-30, 2**30))
def test_scaling_multiplies_the_weights_within_the_scale(values, factor):
    codes = codes_of(values)
    scaled = dens.scale(codes, factor)
    assert scaled.dtype == torch.uint8
    assert torch.equal(scaled == 0, codes == 0)
    weights = dens.weight(codes).double() / dens.LARGEST
    for old, code, new in zip(weights.tolist(), scaled.tolist(), dens.weight(scaled).tolist(), strict=True):
        expected = old * factor
        if old and code == 1:
            assert expected <= 2**-24 * 1.04
        elif old and code == 255:
            assert expected >= 1 / 1.04
        elif old:
            assert abs(new / dens.LARGEST / expected - 1) < 0.05  # half a byte, and integers
    assert torch.equal(dens.scale(codes, 1.0), codes)


@st.composite
def changes(draw) -> tuple[list[int], list[tuple[list[int], int]]]:
    """Entries of a few calls, borders among them and some more than once, and a seed for the codes of each call."""
    n = draw(st.sampled_from([1, 5, 31, 32, 33, 64, 200, 1024, 1025, 2000, 40_032]))
    near = st.sampled_from([index for index in BORDERS if index < n] + [n - 1])
    calls = st.lists(near | st.integers(0, n - 1), max_size=12)
    return n, draw(st.lists(st.tuples(calls, st.integers(0, 99)), min_size=1, max_size=5))


@DTYPES
@LAW
@given(changes(), st.booleans())
def test_after_any_changes_the_tree_is_that_of_its_codes(dtype, case, empty):
    n, calls = case
    top = 256 if dtype == torch.uint8 else 2**31 - 1
    codes = torch.zeros(n, dtype=dtype) if empty else torch.randint(top, (n,), generator=seeded(), dtype=dtype)
    density, expected = dens.tabulate(codes), [{value} for value in codes.tolist()]
    for index, seed in calls:
        new = torch.randint(top, (len(index),), generator=seeded(seed), dtype=dtype)
        dens.replace(density, torch.tensor(index, dtype=torch.int64), new)
        for entry in set(index):
            expected[entry] = {code for i, code in zip(index, new.tolist(), strict=True) if i == entry}
    assert all(code in allowed for code, allowed in zip(density.codes.tolist(), expected, strict=True))
    assert same(density, dens.tabulate(density.codes.clone()))


@DTYPES
def test_draws_follow_what_was_replaced(dtype):
    """From nothing to something, and from something to nothing, also where one block changes as a whole."""
    codes = torch.randint(230, 256, (1100,), generator=seeded(), dtype=dtype)
    codes[64:96] = 0
    density = dens.tabulate(codes)
    index = torch.cat((torch.arange(32), torch.arange(64, 96), torch.tensor([1023, 1024, 1099, 1099])))
    new = torch.cat((torch.zeros(32), torch.full((36,), 255))).to(dtype)
    dens.replace(density, index, new)
    wanted = torch.randint(230, 256, (1100,), generator=seeded(), dtype=dtype)
    wanted[:32], wanted[64:96], wanted[1023:1025], wanted[1099] = 0, 255, 255, 255
    entry, probability = dens.draw(density, 200_000, seeded(2))
    assert p_value(torch.bincount(entry, minlength=1100), brute_force(wanted)) > 1e-4
    torch.testing.assert_close(probability, brute_force(wanted)[entry].float())


def test_sums_hold_what_is_promised():
    """2^32 entries of the largest weight are within the integers that targets are drawn from, and those in 64 bits."""
    assert 2**32 * dens.LARGEST <= 2**62 < torch.iinfo(torch.int64).max
    assert dens.weight(torch.arange(256, dtype=torch.uint8)).max() == dens.LARGEST
    many = dens.tabulate(codes_of([255]).expand(2**26 + 1))
    assert dens.total(many) == (2**26 + 1) * dens.LARGEST
    counts = dens.tabulate(codes_of([2**31 - 1], torch.int32).expand(2**20 + 1))
    assert dens.total(counts) == (2**20 + 1) * (2**31 - 1)


@DTYPES
def test_memory_of_a_large_density_is_what_is_said(dtype):
    codes = torch.zeros(3_000_001, dtype=dtype)
    density = dens.tabulate(codes)
    assert density.codes.data_ptr() == codes.data_ptr()
    real = sum(part.untyped_storage().nbytes() for part in (density.codes, *density.sums))
    assert real / len(codes) == pytest.approx(dens.bytes_per_entry(codes.element_size()), rel=1e-3)
    assert len(density.sums[-1]) <= dens.BRANCHES
