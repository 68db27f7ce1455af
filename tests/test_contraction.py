"""The quick contraction is nerfstudio's: values and gradients, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from nerfstudio.field_components.spatial_distortions import SceneContraction
from torch import nn

from nerfstudio_softmining.plugin.contraction import QuickContraction, quicken_contractions


def test_values_and_gradients_are_nerfstudios():
    inside_and_outside = 3 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    edges = torch.cartesian_prod(*[torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])] * 3)  # with several largest coordinates
    results = []
    for contraction in (SceneContraction(order=math.inf), QuickContraction(order=math.inf)):
        positions = torch.cat((inside_and_outside, edges)).view(25, -1, 3).requires_grad_()
        contracted = contraction(positions)
        (contracted * torch.arange(1.0, 4.0)).sum().backward()
        results.append((contracted.detach(), positions.grad))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs.nan_to_num(7.0), ours.nan_to_num(7.0)) and theirs.abs().nansum() > 100


@pytest.mark.parametrize("order, quick", [(math.inf, True), (None, False), (2, False)])
def test_only_contractions_to_a_cube_are_replaced(order, quick):
    model = nn.Sequential(SceneContraction(order=order))
    quicken_contractions(model)
    assert isinstance(model[0], QuickContraction) == quick
