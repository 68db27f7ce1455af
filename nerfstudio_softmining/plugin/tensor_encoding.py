"""nerfstudio's encodings of TensoRF, whose features can have a gradient with respect to positions.

Chen et al., "TensoRF: Tensorial Radiance Fields", ECCV 2022. nerfstudio cuts this gradient off. The drift of Langevin
chains needs it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nerfstudio.field_components.encodings import TensorCPEncoding, TensorVMEncoding, TriplaneEncoding
from torch import Tensor, nn

PLANES = ((0, 1), (0, 2), (1, 2))
"""Coordinates of each plane."""
LINES = (2, 1, 0)
"""Coordinate of the line that goes with it."""


class DifferentiableVMEncoding(TensorVMEncoding):
    """Products of planes and lines."""

    follows_positions: bool = False
    """Whether positions receive a gradient."""

    def forward(self, in_tensor: Tensor) -> Tensor:
        """Encode positions [*n, 3] in [-1, 1] as features [*n, 3 * components]."""
        if not self.follows_positions:
            return super().forward(in_tensor)
        features = _on_planes(self.plane_coef, in_tensor) * _on_lines(self.line_coef, in_tensor)
        return features.flatten(0, 1).t().reshape(*in_tensor.shape[:-1], -1)


class DifferentiableCPEncoding(TensorCPEncoding):
    """Products of three lines."""

    follows_positions: bool = False
    """Whether positions receive a gradient."""

    def forward(self, in_tensor: Tensor) -> Tensor:
        """Encode positions [*n, 3] in [-1, 1] as features [*n, components]."""
        if not self.follows_positions:
            return super().forward(in_tensor)
        return _on_lines(self.line_coef, in_tensor).prod(dim=0).t().reshape(*in_tensor.shape[:-1], -1)


class DifferentiableTriplaneEncoding(TriplaneEncoding):
    """Products or sums of three planes."""

    follows_positions: bool = False
    """Whether positions receive a gradient."""

    def forward(self, in_tensor: Tensor) -> Tensor:
        """Encode positions [*n, 3] in [-1, 1] as features [*n, components]."""
        if not self.follows_positions:
            return super().forward(in_tensor)
        planes = _on_planes(self.plane_coef, in_tensor)
        features = planes.prod(dim=0) if self.reduce == "product" else planes.sum(dim=0)
        return features.t().reshape(*in_tensor.shape[:-1], -1)


DIFFERENTIABLE: dict[type[nn.Module], type[nn.Module]] = {
    TensorVMEncoding: DifferentiableVMEncoding,
    TensorCPEncoding: DifferentiableCPEncoding,
    TriplaneEncoding: DifferentiableTriplaneEncoding,
}


def make_differentiable(model: nn.Module) -> list[nn.Module]:
    """Let positions have a gradient in all of a model's encodings; values, parameters and checkpoints stay.

    Returns:
        The encodings. The gradient is there while their `follows_positions` is set.
    """
    found = [module for module in model.modules() if type(module) in DIFFERENTIABLE]
    for module in found:
        module.__class__ = DIFFERENTIABLE[type(module)]
    return found


def _on_planes(table: Tensor, positions: Tensor) -> Tensor:
    """Look positions [*n, 3] up in planes [3, components, side, side], as [3, components, n]."""
    x = positions.reshape(-1, 3).unbind(dim=-1)
    return _look_up(table, torch.stack([torch.stack((x[row], x[column]), dim=-1) for row, column in PLANES]))


def _on_lines(table: Tensor, positions: Tensor) -> Tensor:
    """Look positions [*n, 3] up in lines [3, components, side, 1], as [3, components, n]."""
    x = positions.reshape(-1, 3).unbind(dim=-1)
    along = torch.stack([x[axis] for axis in LINES])
    return _look_up(table, torch.stack((torch.zeros_like(along), along), dim=-1))


def _look_up(table: Tensor, places: Tensor) -> Tensor:
    return F.grid_sample(table, places[:, :, None], align_corners=True)[..., 0]
