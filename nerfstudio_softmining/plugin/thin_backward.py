"""A backward pass through a part of the samples along the rays.

Most samples lie in empty space or behind a surface, and hardly change what a ray shows. The field is evaluated for all
samples without a graph. The backward pass evaluates it once more for those whose gradient is large, and for a few of
the others. Weights keep the mean of the parameters' gradient.

After Korhonen et al., "Efficient NeRF Optimization - Not All Samples Remain Equally Hard" (HSM), ECCV 2024, which takes
the samples of the largest gradient without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from nerfstudio.cameras.rays import RaySamples
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.fields.nerfacto_field import NerfactoField
from torch import Tensor

from nerfstudio_softmining.mining import thinning

Field = Callable[[RaySamples], dict[FieldHeadNames, Tensor]]
HEADS = (FieldHeadNames.DENSITY, FieldHeadNames.RGB)


def evaluate(field: Field, ray_samples: RaySamples, fraction: float) -> dict[FieldHeadNames, Tensor]:
    """Evaluate density and colour, with a backward pass through a fraction of the samples.

    The parameters of the field receive their gradients during the backward pass, as with `torch.utils.checkpoint`.

    Args:
        field: evaluates samples of any shape. Its density is an exponential, its colour a sigmoid.
        ray_samples: samples [rays, samples] along the rays.
        fraction: fraction of the samples that the backward pass goes through, in (0, 1).
    """
    frustums = ray_samples.frustums
    anchor = torch.zeros((), device=frustums.origins.device, requires_grad=True)
    outputs = _Thinned.apply(anchor, frustums.origins, frustums.directions, field, ray_samples, fraction)
    return dict(zip(HEADS, outputs, strict=True))  # pyright: ignore[reportArgumentType]


class _Thinned(torch.autograd.Function):
    """Evaluate a field without a graph, and again for some of the samples in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        origins: Tensor,
        directions: Tensor,
        field: Field,
        ray_samples: RaySamples,
        fraction: float,
    ) -> tuple[Tensor, ...]:
        """Return density [rays, samples, 1] and colour [rays, samples, 3] of the samples."""
        outputs = field(ray_samples)
        ctx.field, ctx.ray_samples, ctx.fraction = field, ray_samples, fraction
        # nerfstudio renders, but does not call backward(), within autocast
        ctx.precision = torch.autocast("cuda") if torch.is_autocast_enabled() else nullcontext()
        density, rgb = (outputs[head] for head in HEADS)
        ctx.save_for_backward(density, rgb)
        return density, rgb

    @staticmethod
    def backward(ctx: Any, of_density: Tensor, of_rgb: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        density, rgb = ctx.saved_tensors
        # before the activations, where exp' = exp and sigmoid' = s (1 - s)
        gradient = torch.cat((of_density * density, of_rgb * rgb * (1 - rgb)), dim=-1).float()
        score = gradient.square().sum(dim=-1).sqrt()
        count = max(1, round(ctx.fraction * score.numel()))
        index, weight = thinning.draw_kept(thinning.keep_probability(score.flatten(), count), count)
        place = (index // score.shape[1], index % score.shape[1])
        kept = ctx.ray_samples[place]
        moves = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        origins, directions = (
            part.detach().requires_grad_(moves) for part in (kept.frustums.origins, kept.frustums.directions)
        )
        with torch.enable_grad(), ctx.precision:
            frustums = replace(kept.frustums, origins=origins, directions=directions)
            outputs = ctx.field(replace(kept, frustums=frustums))
        torch.autograd.backward(
            [outputs[head] for head in HEADS], [of[place] * weight[:, None] for of in (of_density, of_rgb)]
        )
        of_rays = [None, None]
        if moves:
            nothing = density.new_zeros(*score.shape, 3)
            of_rays = [nothing.index_put(place, part.grad, accumulate=True) for part in (origins, directions)]
        return None, *of_rays, None, None, None


class ThinnedNerfactoField(NerfactoField):
    """nerfacto's field, whose backward pass goes through a part of the samples along the rays in training."""

    backward_fraction: float
    """Fraction of the samples."""

    def forward(self, ray_samples: RaySamples, compute_normals: bool = False) -> dict[FieldHeadNames, Tensor]:
        if self.training and torch.is_grad_enabled():
            return evaluate(super().forward, ray_samples, self.backward_fraction)
        return super().forward(ray_samples, compute_normals)


def thin(field: NerfactoField, fraction: float) -> None:
    """Let the backward pass of a field go through a fraction of the samples. Parameters and checkpoints stay."""
    field.__class__ = ThinnedNerfactoField
    cast(ThinnedNerfactoField, field).backward_fraction = fraction
