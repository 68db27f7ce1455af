"""Laws of Metropolis-Hastings chains, against the density that they are to follow."""

from __future__ import annotations

import torch

from nerfstudio_softmining.mining.metropolis import accepts

TARGET = torch.tensor([1.0, 4.0, 0.0, 2.0, 3.0])


def settle(propose, noise: float = 0.0) -> torch.Tensor:
    """Move 20,000 chains 60 times. Return the fraction of them on each place."""
    generator = torch.Generator().manual_seed(0)
    place = torch.zeros(20_000, dtype=torch.int64)
    seen = torch.zeros(len(place))  # the target as each chain has seen it, over the density of its proposal
    for _ in range(60):
        proposed, density = propose(place, generator)
        estimate = TARGET[proposed] * (1 + noise * (2 * torch.rand(len(place), generator=generator) - 1))
        moves = accepts(seen, estimate / density, generator)
        place, seen = torch.where(moves, proposed, place), torch.where(moves, estimate / density, seen)
    return place.bincount(minlength=len(TARGET)) / len(place)


def step(place: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Propose the neighbour on the left or right, on a ring."""
    side = 2 * torch.randint(2, place.shape, generator=generator) - 1
    return (place + side) % len(TARGET), torch.ones(len(place))


def start(place: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Propose a place from a density of its own."""
    density = torch.tensor([0.4, 0.1, 0.2, 0.2, 0.1])
    proposed = torch.multinomial(density, len(place), replacement=True, generator=generator)
    return proposed, density[proposed]


def test_chains_settle_in_proportion_to_the_target_by_steps_and_by_starts():
    for propose in (step, start):
        assert (settle(propose) - TARGET / TARGET.sum()).abs().max() < 0.02


def test_a_noisy_estimate_of_the_target_is_as_good():
    assert (settle(start, noise=0.9) - TARGET / TARGET.sum()).abs().max() < 0.02


def test_a_chain_without_weight_moves_and_none_moves_to_what_is_not_a_number():
    weight, proposed = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, torch.nan])
    assert accepts(weight, proposed).tolist() == [True, True, False]
