"""Soft-mine a regression problem of your own: nothing but torch and `nerfstudio_softmining.mining`.

A function on the unit cube is flat but for a narrow peak, and a network with a feature grid learns it. Chains walk to
where the error is. The loss is weighted so that the flat part is not forgotten.

    python examples/regression.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from nerfstudio_softmining.mining import importance as imp
from nerfstudio_softmining.mining import langevin
from nerfstudio_softmining.mining.langevin import ChainState


def target(x: Tensor) -> Tensor:
    """Return the function to learn, [n, 1], at points [n, 3] of the unit cube."""
    return torch.exp(-((x - 0.7) / 0.05).square().sum(dim=-1, keepdim=True))


class Network(nn.Module):
    """A grid of features, and a small network behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(1e-2 * torch.randn(1, 8, 24, 24, 24))
        self.head = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return values [n, 1] at points [n, 3]."""
        place = 2 * x.view(1, -1, 1, 1, 3) - 1
        return self.head(nn.functional.grid_sample(self.grid, place, align_corners=True)[0, :, :, 0, 0].T)


class Cube:
    """The unit cube as the domain of the chains."""

    def contains(self, chains: ChainState) -> Tensor:
        """Return whether each chain is inside."""
        return ((chains.position >= 0) & (chains.position <= 1)).all(dim=-1)

    def propose(self, count: int) -> ChainState:
        """Start chains uniformly."""
        return langevin.start(torch.zeros(count, dtype=torch.int64), torch.rand(count, 3), torch.ones(count))


def train(num_chains: int, steps: int, seed: int, batch: int = 128, alpha: float = 0.6) -> float:
    """Train a network, and return its mean squared error at uniform points."""
    torch.manual_seed(seed)
    network, cube = Network(), Cube()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    chains = cube.propose(num_chains)
    for step in range(steps):
        # 1. a batch: all chains, and some uniform points that explore
        uniform = cube.propose(batch - num_chains)
        x = torch.cat((chains.position, uniform.position)).requires_grad_()
        prediction, truth = network(x), target(x)

        # 2. error, importance and weight of each point (eq. 7 - 9). The density of a chain that has moved is that of Q
        q, error = imp.l1_importance(prediction, truth), imp.squared_error(prediction, truth)
        estimate = imp.density_ratio(q, q[num_chains:].mean())
        follows = torch.cat((chains.follows_importance, uniform.follows_importance))
        ratio = torch.where(follows, estimate, torch.cat((chains.density_ratio, uniform.density_ratio)))
        weighted = imp.soft_weights(ratio, imp.warmed_up(alpha, step, warmup=40)) * error
        weighted.retain_grad()
        optimizer.zero_grad()
        weighted.mean().backward()
        optimizer.step()
        schedule.step()

        # 3. the same backward pass moves the chains (eq. 10)
        assert x.grad is not None and weighted.grad is not None
        direction = langevin.grad_log_importance(x.grad, weighted.grad, weighted.detach())[:num_chains]
        chains, _ = langevin.step(chains, direction, q[:num_chains], cube, drift=5e-5, noise=1e-2, reinit_fraction=0.1)
    with torch.no_grad():
        x = torch.rand(50_000, 3, generator=torch.Generator().manual_seed(99))
        return float(imp.squared_error(network(x), target(x)).mean())


def main() -> None:
    """Compare uniform points with soft mining."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a comparison for each")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        uniform, mined = (train(num_chains, arguments.steps, seed) for num_chains in (0, 115))
        print(f"seed {seed}: mean squared error {uniform:.1e} with uniform points, {mined:.1e} with soft mining")


if __name__ == "__main__":
    main()
