"""Laws of thinning: the weighted sum of what is kept has the whole sum as its mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerfstudio_softmining.mining.thinning import draw_kept, keep_probability


def skewed(seed: int, size: int, power: float) -> torch.Tensor:
    """Return scores of which a few are far larger than the others."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** power


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(2, 500), st.floats(0, 12), st.floats(0.01, 0.99))
def test_probabilities_are_the_scores_capped_at_1(seed, size, power, fraction):
    scores, count = skewed(seed, size, power), max(1, round(fraction * (size - 1)))
    probability = keep_probability(scores, count)
    assert ((probability > 0) & (probability <= 1)).all()
    assert probability.sum() <= count * 1.001
    capped = probability == 1
    if (~capped).any():
        ratio = probability[~capped] / (scores + 1e-6 * scores.mean())[~capped]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.floats(0, 6), st.sampled_from([0.1, 0.25, 0.6]))
def test_the_weighted_sum_has_the_whole_sum_as_its_mean(seed, power, fraction):
    scores, random = skewed(seed, 100, power), torch.Generator().manual_seed(seed)
    terms = torch.stack((scores, scores * scores.flip(0), scores.sqrt()), dim=-1)
    count = round(fraction * len(scores))
    probability, sums = keep_probability(scores, count), []
    for _ in range(2000):
        index, weight = draw_kept(probability, count, random)
        assert len(index) == count and (index.diff() >= 0).all()
        sums.append((terms[index] * weight[:, None]).sum(dim=0))
    sums = torch.stack(sums)
    error = sums.std(dim=0) / len(sums) ** 0.5
    assert ((sums.mean(dim=0) - terms.sum(dim=0)).abs() < 5 * error + 1e-3 * terms.sum(dim=0)).all()


def test_large_terms_are_always_kept():
    scores = torch.cat((torch.full((990,), 1e-3), torch.full((10,), 100.0)))
    for _ in range(20):
        index, weight = draw_kept(keep_probability(scores, 20), 20)
        assert set(range(990, 1000)) <= set(index.tolist())
        torch.testing.assert_close(weight[-10:], torch.ones(10), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scores", [torch.zeros(8), torch.full((8,), 3e-40), torch.tensor([0.0] * 7 + [1.0])])
def test_scores_of_zero_are_kept_alike(scores):
    probability = keep_probability(scores, 4)
    index, weight = draw_kept(probability, 4)
    assert probability.isfinite().all() and weight.isfinite().all() and (probability > 0).all()
    assert len(index.unique()) == 4


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_do_not_crash(score):
    """Mixed precision finds an overflow in the gradients, and skips the step."""
    index, weight = draw_kept(keep_probability(torch.tensor([1.0, score, 2.0, 1.0]), 2), 2)
    assert ((index >= 0) & (index < 4)).all() and not weight.isfinite().all()
