"""Laws of the error, the importance and the weights (eq. 5-9)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerfstudio_softmining.mining import importance as imp

LAW = settings(max_examples=30, deadline=None, derandomize=True)
ALPHAS = st.floats(0, 1)


@st.composite
def colours(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction and the truth, both [n, c]."""
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    prediction, truth = torch.rand(2, *shape, dtype=dtype, generator=generator)
    return prediction, truth


def weights_of(q: torch.Tensor, alpha: float) -> torch.Tensor:
    return imp.soft_weights(imp.density_ratio(q, q.mean()), alpha)


@LAW
@given(colours())
def test_error_and_importance_are_channel_means(pair):
    prediction, truth = pair
    error, q = imp.squared_error(prediction, truth), imp.l1_importance(prediction, truth)
    for i, (row, true_row) in enumerate(zip(prediction.tolist(), truth.tolist(), strict=True)):
        differences = [a - b for a, b in zip(row, true_row, strict=True)]
        assert math.isclose(error[i], sum(d * d for d in differences) / len(row), rel_tol=1e-5, abs_tol=1e-9)
        assert math.isclose(q[i], sum(abs(d) for d in differences) / len(row), rel_tol=1e-5, abs_tol=1e-9)
    torch.testing.assert_close(error.mean(), torch.nn.functional.mse_loss(prediction, truth))
    assert error.dtype == q.dtype == prediction.dtype


@LAW
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=9))
def test_hard_mining_weighs_every_sample_exactly_one(density):
    assert (imp.soft_weights(torch.tensor(density), alpha=0.0) == 1).all()


@LAW
@given(st.floats(1e-6, 1e3), st.integers(1, 9), ALPHAS)
def test_uniform_error_has_unit_weights(error, count, alpha):
    torch.testing.assert_close(weights_of(torch.full((count,), error), alpha), torch.ones(count))


@LAW
@given(ALPHAS, st.integers(0, 99))
def test_weight_is_the_inverse_density_to_the_power_of_alpha(alpha, seed):
    density = 10 ** (torch.rand(50, generator=torch.Generator().manual_seed(seed)) * 7 - 5.5)
    expected = torch.tensor([(1 / p) ** alpha for p in density.tolist()])
    torch.testing.assert_close(imp.soft_weights(density, alpha), expected)


@LAW
@given(st.floats(0.01, 1), st.lists(st.floats(1e-5, 1e5), min_size=2, max_size=9))
def test_weights_fall_with_the_density(alpha, density):
    ordered = torch.tensor(sorted(density))
    weights = imp.soft_weights(ordered, alpha)
    assert (weights.diff() <= 0).all()
    assert (weights.diff()[ordered[1:] > 1.1 * ordered[:-1]] < 0).all()


@LAW
@given(st.integers(1, 9), st.floats(0.1, 100))
def test_the_density_ratio_integrates_to_one_over_uniform_draws_and_ignores_the_scale(count, scale):
    q = torch.rand(count, generator=torch.Generator().manual_seed(count)) + 0.01
    density = imp.density_ratio(q, q.mean())
    torch.testing.assert_close(density.mean(), torch.tensor(1.0))
    torch.testing.assert_close(imp.density_ratio(scale * q, (scale * q).mean()), density)


def test_alpha_one_with_the_true_density_is_an_unbiased_uniform_loss():
    """In expectation over all pixels, and by Monte Carlo with draws from p; alpha below 1 is biased upwards."""
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(500, generator=generator).pow(3) + 0.01
    error = q * (0.2 + torch.rand(500, generator=generator))
    exact, p = error.mean(), q / q.sum()
    torch.testing.assert_close((p * weights_of(q, 1.0) * error).sum(), exact)
    assert (p * weights_of(q, 0.8) * error).sum() > 1.1 * exact

    drawn = torch.multinomial(p, 100_000, replacement=True, generator=generator)
    estimates = imp.soft_weights(imp.density_ratio(q[drawn], q.mean()), alpha=1.0) * error[drawn]
    standard_error = estimates.std() / math.sqrt(len(drawn))
    assert standard_error < 0.003 * exact
    assert (estimates.mean() - exact).abs() < 4 * standard_error


@pytest.mark.parametrize("q", [[0.0, 0.5], [0.0, 0.0], [1e-45, 1.0], [0.0, 1e-30]])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_samples_without_error_have_finite_weights_and_gradients(q, alpha):
    truth = torch.zeros(2, 3)
    prediction = torch.tensor(q)[:, None].expand(2, 3).clone().requires_grad_()
    weights = weights_of(imp.l1_importance(prediction, truth), alpha)
    (weights * imp.squared_error(prediction, truth)).mean().backward()
    assert weights.isfinite().all() and (weights > 0).all()
    assert prediction.grad.isfinite().all()


@LAW
@given(colours(), ALPHAS)
def test_no_gradient_flows_through_importance_and_weights(pair, alpha):
    prediction, truth = pair
    prediction.requires_grad_()
    weights = weights_of(imp.l1_importance(prediction, truth), alpha)
    assert not weights.requires_grad
    (plain,) = torch.autograd.grad(imp.squared_error(prediction, truth).sum(), prediction)
    (weighted,) = torch.autograd.grad((weights * imp.squared_error(prediction, truth)).sum(), prediction)
    torch.testing.assert_close(weighted, weights[:, None] * plain)


@LAW
@given(ALPHAS, st.integers(1, 5000), st.integers(0, 5000))
def test_softness_warms_up_linearly_from_zero(alpha, warmup, step):
    assert imp.warmed_up(alpha, 0, warmup) == 0
    assert imp.warmed_up(alpha, warmup, warmup) == imp.warmed_up(alpha, warmup + step, warmup) == alpha
    inside = min(step, warmup)
    assert math.isclose(imp.warmed_up(alpha, inside, warmup), alpha * inside / warmup, abs_tol=1e-12)
    assert imp.warmed_up(alpha, step, warmup=0) == alpha
