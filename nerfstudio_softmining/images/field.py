"""An Instant-NGP style field of two dimensions: a multiresolution hash grid, and a small network behind it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.field_components.mlp import MLP
from torch import Tensor, nn

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.plugin import compat

HASH_PRIME = -1640531535
"""2654435761 of the spatial hash, as a 32-bit integer."""
FINEST = 1 << 24
"""Most cells along each side of a level, as 32-bit floating point tells no more places apart."""
INITIAL_RANGE = 1e-4
"""Entries start uniform between minus and plus this."""


class _Interpolation(torch.autograd.Function):
    """Bilinear interpolation of the entries of a table.

    By hand, as features come first in all arrays, so that torch's gather and scatter run along contiguous memory, and
    as the gradients need only what the forward pass has computed: several times as quick as autograd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        points: Tensor,
        index: Tensor,
        down: Tensor,
        across: Tensor,
        resolution: Tensor,
        num_moving: int | None,
    ) -> Tensor:
        """Return features [features, levels, n] interpolated between corners of cells.

        The table is [features, entries]. Corners are [4, levels, n]: top left, top right, bottom left, bottom right.
        Points [n, 2] are where `down` and `across` [levels, n] come from, and only matter to the gradient.
        """
        flat = index.view(1, -1).expand(len(table), -1)
        entries = table.gather(1, flat).view(len(table), *index.shape)
        top = torch.lerp(entries[:, 0], entries[:, 1], across)
        bottom = torch.lerp(entries[:, 2], entries[:, 3], across)
        ctx.shape, ctx.moving = table.shape, slice(num_moving)
        ctx.save_for_backward(flat, down, across, entries, top, bottom, resolution)
        return torch.lerp(top, bottom, down)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flat, down, across, entries, top, bottom, resolution = ctx.saved_tensors
        of_table = of_points = None
        if ctx.needs_input_grad[0]:
            of_bottom = gradient * down
            of_top = gradient - of_bottom
            of_corners = torch.empty_like(entries)
            torch.mul(of_top, across, out=of_corners[:, 1])
            torch.sub(of_top, of_corners[:, 1], out=of_corners[:, 0])
            torch.mul(of_bottom, across, out=of_corners[:, 3])
            torch.sub(of_bottom, of_corners[:, 3], out=of_corners[:, 2])
            of_table = torch.zeros(ctx.shape, dtype=gradient.dtype, device=gradient.device)
            of_table.scatter_add_(1, flat, of_corners.view(len(of_table), -1))
        if ctx.needs_input_grad[1]:
            of_points = torch.zeros(down.shape[1], 2, dtype=gradient.dtype, device=gradient.device)
            moving = (..., ctx.moving)
            gradient, entries, down = gradient[moving] * resolution, entries[moving], down[moving]
            left = torch.lerp(entries[:, 0], entries[:, 2], down)
            right = torch.lerp(entries[:, 1], entries[:, 3], down)
            of_points[ctx.moving, 0] = (gradient * (bottom[moving] - top[moving])).sum(dim=(0, 1))
            of_points[ctx.moving, 1] = (gradient * (right - left)).sum(dim=(0, 1))
        return of_table, of_points, None, None, None, None, None


class HashGrid(nn.Module):
    """Multiresolution hash encoding of points in the unit square, in torch.

    Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", SIGGRAPH 2022. That of
    nerfstudio is for three dimensions, and would look up twice the corners. Levels that fit their table are not hashed.

    Args:
        levels: number of levels.
        features: features of each entry.
        log2_size: logarithm to the base of 2 of the most entries that a level has.
        coarsest: cells along each side of the first level.
        growth: cells of a level over those of the level before, along each side.
    """

    resolution: Tensor
    stride: Tensor
    start: Tensor

    def __init__(self, levels: int, features: int, log2_size: int, coarsest: int, growth: float) -> None:
        super().__init__()
        resolutions = [round(min(coarsest * growth**level, FINEST)) for level in range(levels)]
        sizes = [min((resolution + 2) ** 2, 1 << log2_size) for resolution in resolutions]
        self.num_direct = sum((resolution + 2) ** 2 <= 1 << log2_size for resolution in resolutions)
        """Levels, the first, that are not hashed."""
        self.mask = (1 << log2_size) - 1
        self.register_buffer("resolution", torch.tensor(resolutions, dtype=torch.float32)[:, None], persistent=False)
        self.register_buffer("stride", torch.tensor(resolutions, dtype=torch.int32)[:, None] + 2, persistent=False)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).int()
        self.register_buffer("start", starts[:, None], persistent=False)
        self.table = nn.Parameter(torch.empty(features, sum(sizes)).uniform_(-INITIAL_RANGE, INITIAL_RANGE))
        self.num_features = levels * features

    def forward(self, points: Float[Tensor, "n 2"], num_moving: int | None = None) -> Float[Tensor, "n f"]:
        """Return the features of points (row, column) in [0, 1]^2, bilinear within the cells of each level.

        Args:
            points: the points.
            num_moving: number of the first points whose own gradient is computed, while that of the others is 0; None
                for all of them.
        """
        row, column = (part * self.resolution for part in points.detach().unbind(dim=1))  # [levels, n]
        top, left = row.int(), column.int()
        features = _Interpolation.apply(
            self.table, points, self._corners(top, left), row - top, column - left, self.resolution, num_moving
        )
        return features.reshape(self.num_features, -1).t()  # pyright: ignore[reportOptionalMemberAccess]

    def _corners(self, top: Tensor, left: Tensor) -> Tensor:
        """Return the indices [4, levels, n] of the corners of cells; 64-bit, as torch's gather needs."""
        direct = top[: self.num_direct] * self.stride[: self.num_direct] + left[: self.num_direct]
        below = direct + self.stride[: self.num_direct]
        corners = torch.stack((direct, direct + 1, below, below + 1))
        if self.num_direct < len(self.stride):
            top, left = top[self.num_direct :], left[self.num_direct :]
            first, second, bottom = left * HASH_PRIME, left * HASH_PRIME + HASH_PRIME, top + 1
            hashed = torch.stack((top ^ first, top ^ second, bottom ^ first, bottom ^ second)) & self.mask
            corners = torch.cat((corners, hashed), dim=1)
        return (corners + self.start).long()


class Field(nn.Module):
    """A hash grid and a network behind it, by torch or tiny-cuda-nn.

    Args:
        config: the settings.
        channels: channels of the photograph.
        device: device of the field.

    Raises:
        UserError: if tiny-cuda-nn is chosen and cannot be used.
    """

    def __init__(self, config: FitConfig, channels: int, device: torch.device) -> None:
        super().__init__()
        self.implementation = compat.implementation() if config.implementation == "auto" else config.implementation
        if self.implementation == "tcnn":
            if compat.implementation() != "tcnn":
                raise UserError(
                    "--implementation is tcnn, which is not installed or has no GPU here (`softmining doctor` shows "
                    "which). Set it to auto."
                )
            self.network = _tiny_cuda_nn(config, channels)
        else:
            self.encoding = HashGrid(
                config.levels, config.features, config.log2_hashmap_size, config.base_resolution, config.growth
            )
            self.network = MLP(self.encoding.num_features, 3, config.width, channels, activation=nn.ReLU())
        self.to(device)

    def forward(self, points: Float[Tensor, "n 2"], num_moving: int | None = None) -> Float[Tensor, "n c"]:
        """Return the values at points (row, column) of the unit square.

        Args:
            points: the points.
            num_moving: number of the first points whose own gradient is needed; None for all of them.
        """
        encoded = points if self.implementation == "tcnn" else self.encoding(points, num_moving)
        return self.network(encoded).float()


def _tiny_cuda_nn(config: FitConfig, channels: int) -> nn.Module:
    import tinycudann  # pyright: ignore[reportMissingImports]

    grid = {
        "otype": "HashGrid",
        "n_levels": config.levels,
        "n_features_per_level": config.features,
        "log2_hashmap_size": config.log2_hashmap_size,
        "base_resolution": config.base_resolution,
        "per_level_scale": config.growth,
    }
    network = {
        "otype": "FullyFusedMLP" if config.width in (16, 32, 64, 128) else "CutlassMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": config.width,
        "n_hidden_layers": 2,
    }
    return tinycudann.NetworkWithInputEncoding(2, channels, grid, network)
