"""nerfstudio's contraction of unbounded space, but quicker."""

from __future__ import annotations

import math
from typing import Any

import torch
from nerfstudio.field_components.spatial_distortions import SceneContraction
from torch import Tensor, nn


class QuickContraction(SceneContraction):
    """Contract positions to a cube of side 4, with nerfstudio's values bit for bit.

    torch's norm along a dimension of three takes 25 times as long on a CPU as the maximum, which it equals here.
    """

    def forward(self, positions: Any) -> Any:
        """Contract positions [*n, 3]; Gaussians go nerfstudio's way."""
        if not isinstance(positions, Tensor):
            return super().forward(positions)
        norm = positions.abs().amax(dim=-1, keepdim=True)
        return torch.where(norm < 1, positions, (2 - (1 / norm)) * (positions / norm))


def quicken_contractions(model: nn.Module) -> None:
    """Let all of a model's contractions to a cube run by [QuickContraction][]."""
    for module in model.modules():
        if type(module) is SceneContraction and module.order == math.inf:
            module.__class__ = QuickContraction
