"""Laws of ratios that are shrunk towards those of larger tiles."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerfstudio_softmining.mining.shrinkage import shrunk_ratio


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.floats(0.01, 100))
def test_ratios_lie_between_what_was_observed_and_that_of_the_parent(seed, strength):
    random = torch.Generator().manual_seed(seed)
    seen = (torch.rand(16, generator=random) < 0.5).float()
    seen[3] = 1
    predicted = seen * torch.rand(16, generator=random)
    observed = predicted * torch.rand(16, generator=random) * 5
    ratio = shrunk_ratio(observed, predicted, [torch.arange(16) // 4, torch.arange(4) // 4], strength)
    overall = observed.sum() / predicted.sum()
    of_quarter = [part.sum() for part in observed.split(4)], [part.sum() for part in predicted.split(4)]
    top = (observed.sum() + strength * overall) / (predicted.sum() + strength)
    for tile in range(16):
        quarter = tile // 4
        between = (of_quarter[0][quarter] + strength * top) / (of_quarter[1][quarter] + strength)
        torch.testing.assert_close(ratio[tile], (observed[tile] + strength * between) / (predicted[tile] + strength))
        if not seen[quarter * 4 : quarter * 4 + 4].any():
            torch.testing.assert_close(ratio[tile], overall)
