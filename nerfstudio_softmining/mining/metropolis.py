"""Metropolis-Hastings chains that follow the importance Q, by small steps and by starts from a known density.

Large and small steps come from Metropolis light transport (Veach and Guibas, SIGGRAPH 1997; Kelemen et al., Computer
Graphics Forum 2002).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def accepts(
    weight: Float[Tensor, "*n"], proposed_weight: Float[Tensor, "*n"], generator: torch.Generator | None = None
) -> Bool[Tensor, "*n"]:
    """Decide for each chain whether it moves to its proposal.

    The weight of a place is what the chain is to follow there, such as Q, over the density with which the place is
    proposed. Chains that decide so settle in proportion to what they are to follow, whatever the proposals. For steps
    that are as likely forth as back that density is the same everywhere.

    Args:
        weight: weight of the place of each chain. It may be an unbiased estimate that is kept until the chain moves
            (Andrieu and Roberts, Annals of Statistics 2009). A chain of weight 0 always moves.
        proposed_weight: weight of the proposals. A chain never moves to one that is NaN.
        generator: source of randomness on the chains' device; torch's own if None.

    >>> accepts(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor([True, True])
    """
    chance = torch.rand(weight.shape, generator=generator, device=weight.device)
    return chance * weight <= proposed_weight
