"""Laws of the Langevin chains (eq. 10) and of their re-initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nerfstudio_softmining.mining import langevin
from nerfstudio_softmining.mining.langevin import ChainState
from nerfstudio_softmining.mining.records import concatenate, take, where

LAW = settings(max_examples=30, deadline=None, derandomize=True)
DIMENSIONS = pytest.mark.parametrize("d", [1, 2, 3])
NAN = float("nan")


@dataclass
class Box:
    """A domain |x| < half; its proposals are all at one place, on image 7 and with density 3."""

    d: int = 2
    half: float = math.inf

    def contains(self, chains: ChainState) -> Tensor:
        return (chains.position.isfinite() & (chains.position.abs() < self.half)).all(dim=-1)

    def propose(self, count: int) -> ChainState:
        return langevin.start(torch.full((count,), 7), torch.full((count, self.d), 0.125), torch.full((count,), 3.0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chains_at(position: Tensor) -> ChainState:
    return langevin.start(torch.arange(len(position)), position, torch.ones(len(position)))


def run(chains: ChainState, log_q: Callable[[Tensor], Tensor], steps: int, **options) -> ChainState:
    """Move chains by the exact gradient of a known log Q, without any re-initialisation."""
    options = dict(drift=0.0, noise=0.0, reinit_fraction=0.0, generator=seeded()) | options
    box = Box(chains.position.shape[1])
    for _ in range(steps):
        x = chains.position.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_q(x).sum(), x)
        chains, info = langevin.step(chains, gradient, torch.ones(len(x)), box, **options)
        assert not info.is_outside.any() and not info.is_lowest.any()
    return chains


def normal_cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x.double())


def p_value(samples: Tensor, cdf: Callable[[Tensor], Tensor], bins: int = 40) -> float:
    """Of a chi-square test on bins of equal probability."""
    counts = torch.histc(cdf(samples), bins, 0, 1)
    statistic = (counts - len(samples) / bins).square().sum() / (len(samples) / bins)
    return torch.special.gammaincc(torch.tensor((bins - 1) / 2).double(), statistic / 2).item()


def same(a: ChainState, b: ChainState) -> bool:
    """Bit for bit."""
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@DIMENSIONS
def test_without_noise_chains_climb_to_the_mode(d):
    mode, precision = torch.linspace(-1, 2, d), torch.linspace(1, 3, d)

    def log_q(x):
        return -0.5 * ((x - mode).square() * precision).sum(-1)

    start = chains_at(torch.randn(20, d, generator=seeded()) * 3)
    once = run(start, log_q, 1, drift=0.1)
    torch.testing.assert_close(once.position, start.position + 0.1 * precision * (mode - start.position))
    assert (log_q(once.position) > log_q(start.position)).all()
    torch.testing.assert_close(run(start, log_q, 150, drift=0.1).position, mode.expand(20, d), atol=1e-4, rtol=0)
    assert torch.equal(once.image_index, start.image_index)


@DIMENSIONS
@pytest.mark.parametrize("steps", [1, 9])
def test_without_drift_chains_diffuse_isotropically(d, steps):
    """Normally, with a standard deviation of noise * sqrt(steps)."""
    start = chains_at(torch.full((20_000, d), 5.0))
    moved = run(start, lambda x: -1e3 * x.square().sum(-1), steps, noise=0.3).position - start.position
    scaled = moved / (0.3 * math.sqrt(steps))
    for axis in scaled.unbind(-1):
        assert p_value(axis, normal_cdf) > 1e-4
    assert (torch.cov(scaled.T).reshape(d, d) - torch.eye(d)).abs().max() < 0.04


def test_step_sizes_can_differ_from_chain_to_chain():
    gradient, size = torch.ones(4, 2), torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    options = dict(importance=torch.ones(4), domain=Box(), reinit_fraction=0.0)
    drifted, _ = langevin.step(chains_at(torch.zeros(4, 2)), gradient, drift=size, noise=0.0, **options)
    torch.testing.assert_close(drifted.position, size * gradient)
    shaken = [
        langevin.step(chains_at(torch.zeros(4, 2)), gradient, drift=0.0, noise=b, generator=seeded(), **options)[
            0
        ].position
        for b in (size, 1.0)
    ]
    torch.testing.assert_close(shaken[0], size * shaken[1])


MEANS, DEVIATIONS, FRACTIONS = torch.tensor([-0.9, 0.9]), torch.tensor([0.5, 0.7]), torch.tensor([0.35, 0.65])


def mixture_log_q(x: Tensor) -> Tensor:
    """A mixture of two normal densities along the first axis, normal along the others; up to a constant."""
    z = (x[:, :1] - MEANS) / DEVIATIONS
    return (FRACTIONS.log() - DEVIATIONS.log() - z.square() / 2).logsumexp(-1) - (x[:, 1:] / 0.6).square().sum(-1) / 2


def mixture_cdf(x: Tensor) -> Tensor:
    return (FRACTIONS * normal_cdf((x[:, None] - MEANS) / DEVIATIONS)).sum(-1)


@pytest.mark.parametrize("d", [1, 2])
def test_chains_come_to_follow_q(d):
    """With drift = noise^2 / 2, from a uniform start. A drift that is 15 % off fails."""
    start = chains_at(torch.rand(20_000, d, generator=seeded()) * 6 - 3)
    end = run(start, mixture_log_q, 700, drift=0.14**2 / 2, noise=0.14).position
    assert p_value(start.position[:, 0], mixture_cdf) < 1e-100
    assert p_value(end[:, 0], mixture_cdf) > 1e-4
    for axis in end[:, 1:].unbind(-1):
        assert p_value(axis / 0.6, normal_cdf) > 1e-4


@DIMENSIONS
@pytest.mark.parametrize("repeats", [1, 5])
@pytest.mark.parametrize("scale", [1.0, 2.0**16, 3e-4])
def test_drift_direction_is_the_gradient_of_log_q(d, repeats, scale):
    """Of one channel, whatever the batch size, the loss scale and the weights."""
    x = torch.rand(40, d, generator=seeded())
    weights = torch.rand(40, generator=seeded(1)) * 9 + 0.1

    def difference(x):
        return (x * torch.arange(1, d + 1)).sum(-1).sin() - 1.5 * x[:, 0].square() - 1.2

    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(difference(leaf).abs().log().sum(), leaf)
    leaf = x.detach().repeat(repeats, 1).requires_grad_()
    error = weights.repeat(repeats) * difference(leaf).square()
    error.retain_grad()
    (scale * error.mean()).backward()
    result = langevin.grad_log_importance(leaf.grad, error.grad, error.detach())
    torch.testing.assert_close(result, expected.repeat(repeats, 1), rtol=1e-4, atol=1e-5)


def test_drift_direction_of_several_channels_is_that_of_the_l2_norm():
    x = torch.rand(30, 2, generator=seeded()).requires_grad_()
    difference = torch.stack((x[:, 0].sin() + 1, x.prod(-1) - 2, x[:, 1].exp()), dim=-1)
    (expected,) = torch.autograd.grad(difference.norm(dim=-1).log().sum(), x, retain_graph=True)
    error = 3.0 * difference.square().mean(-1)
    error.retain_grad()
    error.mean().backward()
    torch.testing.assert_close(langevin.grad_log_importance(x.grad, error.grad, error.detach()), expected)


@LAW
@given(st.lists(st.integers(0, 5) | st.floats(0, 5, width=32), min_size=1, max_size=50), st.floats(0, 1))
def test_lowest_marks_the_fraction_of_lowest_importance(values, fraction):
    q = torch.tensor(values, dtype=torch.float32)
    mark = langevin.lowest(q, fraction)
    assert mark.sum() == round(fraction * len(values))
    if mark.any() and not mark.all():
        assert q[mark].max() <= q[~mark].min()


@DIMENSIONS
@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_those_that_leave_or_are_low_start_anew_and_only_those(d, fraction):
    position = torch.rand(40, d, generator=seeded()) * 1.6 - 0.8
    gradient = torch.randn(40, d, generator=seeded(1))
    gradient[3], gradient[4, 0], gradient[5, -1], gradient[6] = NAN, math.inf, -math.inf, 1e30
    q = torch.rand(40, generator=seeded(2))
    start, box = chains_at(position), Box(d, half=1.0)
    moved = position + 0.1 * gradient + 0.2 * torch.empty(40, d).normal_(generator=seeded(3))
    result, info = langevin.step(
        start, gradient, q, box, drift=0.1, noise=0.2, reinit_fraction=fraction, generator=seeded(3)
    )
    left = ~(moved.abs() < 1).all(-1)
    low = torch.zeros(40).bool().index_fill_(0, q.argsort()[: round(fraction * 40)], True)
    assert left[3:7].all() and (fraction == 1 or 0 < (left | low).sum() < 40)
    assert torch.equal(info.is_outside, left) and torch.equal(info.is_lowest, low)
    stayed = start._replace(position=moved, follows_importance=torch.ones(40, dtype=torch.bool))
    for old, new, part in zip(stayed, box.propose(40), result, strict=True):
        chosen = (left | low).view(-1, *[1] * (old.dim() - 1))
        torch.testing.assert_close(part, torch.where(chosen, new, old), equal_nan=True)


@pytest.mark.parametrize("count", [3, 50, 5000])
@pytest.mark.parametrize("leaving", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_chains_that_start_anew_do_so_at_places_of_their_own_unless_most_leave(count, leaving, fraction):
    drawn: list[ChainState] = []

    class Line(Box):
        def propose(self, count: int) -> ChainState:
            drawn.append(chains_at(0.01 * torch.rand(count, 1, generator=seeded(7))))
            return drawn[-1]

    position = torch.full((count, 1), 0.5)
    position[: round(leaving * count)] = 2.0
    result, info = langevin.step(
        chains_at(position),
        torch.zeros(count, 1),
        torch.rand(count),
        Line(1, 1.0),
        drift=0.0,
        noise=0.0,
        reinit_fraction=fraction,
    )
    anew = result.position[info.is_outside | info.is_lowest]
    assert len(drawn) == 1 and len(drawn[0].image_index) <= max(count, 0.3 * count + 100)
    assert torch.isin(anew, drawn[0].position).all()
    if leaving < 1 or count < 64:
        assert len(anew.unique()) == len(anew)
    else:
        assert len(drawn[0].image_index) < 0.3 * count + 100 and len(anew.unique()) == min(
            len(anew), len(drawn[0].image_index)
        )


def test_a_step_changes_neither_its_chains_nor_the_global_randomness():
    chains = chains_at(torch.rand(9, 2, generator=seeded()))
    before, state = ChainState(*(part.clone() for part in chains)), torch.get_rng_state()
    options = dict(
        importance=torch.rand(9, generator=seeded()), domain=Box(), drift=0.1, noise=0.1, reinit_fraction=0.5
    )
    results = [langevin.step(chains, torch.ones(9, 2), generator=seeded(seed), **options)[0] for seed in (1, 1, 2)]
    assert same(chains, before) and torch.equal(torch.get_rng_state(), state)
    assert same(results[0], results[1]) and not same(results[0], results[2])


@DIMENSIONS
def test_where_takes_each_chain_as_a_whole(d):
    a, b = chains_at(torch.rand(5, d, generator=seeded())), Box(d).propose(5)
    assert same(where(torch.tensor(True), a, b), a)
    assert same(where(torch.tensor(False), a, b), b)
    mixed = where(torch.tensor([True, False, True, False, False]), a, b)
    for i, source in enumerate((a, b, a, b, b)):
        assert same(take(mixed, i), take(source, i))
    assert same(take(concatenate(a, b), slice(5, None)), b)
