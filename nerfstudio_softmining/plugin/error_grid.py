"""Where in space the error is, and where rays end: a coarse grid that rays are added to while training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SIDE = 64
"""Voxels along each side."""
DECAY = 0.98
"""Factor on all sums when rays are added, as the model learns."""
FEWEST_RAYS = 1e-3
"""Rays, after decay, below which a place counts as never seen."""


class ErrorGrid:
    """Sums of importance and of rays at the places where rays end.

    Args:
        sums: sums [2, side, side, side] to go on from; zeros if None.
    """

    def __init__(self, sums: Float[Tensor, "2 side side side"] | None = None) -> None:
        self.sums = torch.zeros(2, SIDE, SIDE, SIDE) if sums is None else sums

    def add(self, positions: Float[Tensor, "n 3"], importance: Float[Tensor, " n"]) -> None:
        """Add rays that end at positions in [0, 1]^3."""
        self.sums = self.sums.to(positions.device).mul_(DECAY)
        voxel = (positions * SIDE).long().clamp(0, SIDE - 1)
        index = (voxel[:, 2] * SIDE + voxel[:, 1]) * SIDE + voxel[:, 0]
        self.sums.view(2, -1).index_add_(1, index, torch.stack((importance, torch.ones_like(importance))))

    def look_up(self, positions: Float[Tensor, "n 3"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Interpolate the mean importance at positions in [0, 1]^3, and the rays there over the mean where rays end."""
        self.sums = self.sums.to(positions.device)
        places = (2 * positions - 1)[None, None, None]
        found = F.grid_sample(self.sums[None], places, padding_mode="border", align_corners=False)
        importance, rays = found[0, :, 0, 0]
        is_seen = self.sums[1] > FEWEST_RAYS
        mean_rays = self.sums[1].sum() / is_seen.sum().clamp_min(1)
        seen = torch.where(rays > FEWEST_RAYS, importance / rays, 0.0)
        return seen, rays / mean_rays.clamp_min(FEWEST_RAYS)
