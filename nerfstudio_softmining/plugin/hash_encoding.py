"""nerfstudio's hash encoding in torch, but quicker: one look-up of all corners, and one accumulation.

Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", SIGGRAPH 2022. nerfstudio's
own torch implementation looks up each of the eight corners on its own, and adds up eight gradients of the size of the
table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from nerfstudio.field_components.encodings import HashEncoding
from torch import Tensor, nn

from nerfstudio_softmining.errors import UserError

PRIMES = (1, -1640531535, 805459861)
"""Factors of the hash as 32-bit integers; the second is 2654435761. Overflows keep the low bits, which are all used."""


class _WeightedRows(torch.autograd.Function):
    """Sum rows of a table by weights, as `embedding_bag`, whose gradient would sort all indices."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Sum rows of a table [rows, features] at indices [n, corners] by weights [n, corners]."""
        ctx.save_for_backward(table, index, weights)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, index, weights = ctx.saved_tensors
        of_table = of_weights = None
        if ctx.needs_input_grad[0]:
            of_table = torch.zeros_like(table)
            _add_weighted(of_table, index, weights, gradient)
        if ctx.needs_input_grad[2]:
            rows = table.index_select(0, index.flatten()).view(*index.shape, -1)
            of_weights = torch.bmm(rows, gradient[..., None])[..., 0]
        return of_table, None, of_weights


def _add_weighted(table: Tensor, index: Tensor, weights: Tensor, gradient: Tensor) -> None:
    """Add gradients [n, features] times weights [n, corners] to rows [n, corners] of a table [rows, features]."""
    if table.device.type != "cpu" or table.shape[1] % 2:
        table.index_add_(0, index.flatten(), (weights[..., None] * gradient[:, None]).flatten(0, 1))
        return
    # pairs of features as complex numbers in one dimension: several times as quick as rows, and always in one order
    target, pairs = (torch.view_as_complex(part.view(len(part), -1, 2)) for part in (table, gradient.contiguous()))
    place = index.flatten().long()
    for feature in range(target.shape[1]):
        target[:, feature].scatter_add_(0, place, (weights * pairs[:, feature, None]).flatten())


class QuickHashEncoding(HashEncoding):
    """nerfstudio's torch hash encoding with the same parameters and values, up to rounding."""

    table_starts: Tensor
    """First row of each level's table, [levels], 32 bit."""
    follows_positions: bool = True
    """Whether positions receive a gradient. nerfacto's field asks for one in every step, though only normals, pixel
    gradients and camera optimizers use it."""

    def pytorch_fwd(self, in_tensor: Tensor) -> Tensor:
        """Encode positions [*n, 3] as features [*n, levels * features]."""
        positions = in_tensor.reshape(-1, 3)
        if not self.follows_positions:
            positions = positions.detach()
        scaled = positions.t()[:, :, None] * self.scalings  # [3, n, levels]
        low = scaled.detach().floor()
        index = self._corners(low, scaled.detach().ceil())
        weights = _corner_weights(self.interpolated(scaled - low))
        index = (index + self.table_starts).view(8, -1).t().contiguous()
        features = _WeightedRows.apply(self.hash_table, index, weights.view(8, -1).t().contiguous())
        return features.reshape(*in_tensor.shape[:-1], -1)  # pyright: ignore[reportOptionalMemberAccess]

    def interpolated(self, offset: Tensor) -> Tensor:
        """Return the part in [0, 1] of the higher corner at offsets within a cell: linear here."""
        return offset

    def _corners(self, low: Tensor, high: Tensor) -> Tensor:
        """Hash the corners of cells between [3, n, levels] and [3, n, levels], as [2, 2, 2, n, levels]."""
        x, y, z = (torch.stack(ends).int() * prime for *ends, prime in zip(low, high, PRIMES, strict=True))
        return (x[:, None, None] ^ y[:, None] ^ z) & (self.hash_table_size - 1)


class SDFGrid(QuickHashEncoding):
    """The grid of nerfstudio's SDF field in torch. nerfstudio has it in tiny-cuda-nn alone.

    Args:
        n_input_dims: 3.
        encoding_config: settings of a `HashGrid` of tiny-cuda-nn.
    """

    def __init__(self, n_input_dims: int, encoding_config: dict[str, Any]) -> None:
        if encoding_config["otype"] != "HashGrid":
            raise UserError(
                "--pipeline.model.sdf-field.use-hash is False: a dense grid needs tiny-cuda-nn, which is not "
                "installed (`softmining doctor` says how). Set it to True."
            )
        levels, features = encoding_config["n_levels"], encoding_config["n_features_per_level"]
        growth, side = encoding_config["per_level_scale"], encoding_config["base_resolution"]
        super().__init__(
            num_levels=levels,
            min_res=side,
            max_res=round(side * growth ** (levels - 1)),
            log2_hashmap_size=encoding_config["log2_hashmap_size"],
            features_per_level=features,
            hash_init_scale=1e-4,  # tiny-cuda-nn's
            implementation="torch",
        )
        self.n_output_dims = levels * features
        self.is_smooth = encoding_config["interpolation"] == "Smoothstep"

    def interpolated(self, offset: Tensor) -> Tensor:
        return offset.square() * (3 - 2 * offset) if self.is_smooth else offset


def _corner_weights(offset: Tensor) -> Tensor:
    """Compute the trilinear weights [2, 2, 2, n, levels] of the corners around offsets [3, n, levels] in [0, 1)."""
    x, y, z = torch.stack((1 - offset, offset), dim=1)
    return x[:, None, None] * y[:, None] * z


def quicken(model: nn.Module) -> list[QuickHashEncoding]:
    """Let all of a model's torch hash encodings run by [QuickHashEncoding][]; parameters and checkpoints stay.

    Returns:
        The encodings.
    """
    found = [module for module in model.modules() if isinstance(module, HashEncoding) and module.tcnn_encoding is None]
    for encoding in found:
        if not isinstance(encoding, QuickHashEncoding):
            encoding.__class__ = QuickHashEncoding
        scalings = encoding.__dict__.pop("scalings")  # as a buffer it moves to the device once, not in every step
        encoding.register_buffer("scalings", scalings, persistent=False)
        encoding.register_buffer("table_starts", encoding.hash_offset.int(), persistent=False)
    return found  # pyright: ignore[reportReturnType]
