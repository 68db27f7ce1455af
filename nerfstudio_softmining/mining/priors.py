"""Edges, contrast and detail of an image: where to expect error before any is known."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

BAND = 1 << 18
"""Pixels processed at a time, which fit a processor's caches."""


def _by_rows(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply a function of 3 x 3 neighbourhoods to some rows at a time, which bounds its memory and saves time."""

    @functools.wraps(function)
    def applied(image: Tensor) -> Tensor:
        height, width, _ = image.shape
        rows = max(1, BAND // width)
        if height <= rows:
            return function(image)
        parts = []
        for start in range(0, height, rows):
            first, end = max(0, start - 1), min(height, start + rows + 1)
            parts.append(function(image[first:end])[start - first :][:rows])
        return torch.cat(parts)

    return applied


@_by_rows
def sobel(image: Float[Tensor, "h w c"]) -> Float[Tensor, "h w"]:
    """Compute the Sobel gradient magnitude over all channels (section 4.1), in [0, 1] for values in [0, 1].

    The border is replicated, so that it is no edge by itself.

    >>> import torch
    >>> step = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4)[..., None]
    >>> sobel(step)[0]
    tensor([0.0000, 0.7071, 0.7071, 0.0000])
    """
    channels = image.permute(2, 0, 1)[:, None]
    padded = F.pad(channels, (1, 1, 1, 1), mode="replicate")[:, 0]
    # the difference first, so that equal pixels have exactly none
    across = padded[:, :, 2:] - padded[:, :, :-2]
    down = padded[:, 2:] - padded[:, :-2]
    across = (across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]) / 4
    down = (down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]) / 4
    return ((across.square() + down.square()).sum(dim=0) / (2 * len(padded))).sqrt()


@_by_rows
def local_deviation(image: Float[Tensor, "h w c"]) -> Float[Tensor, "h w"]:
    """Compute the standard deviation of the colours in 3 x 3 pixels, in [0, 0.5] for values in [0, 1].

    This is the prior of Zhang et al., "Fast Learning Radiance Fields by Shooting Much Fewer Rays", TIP 2023. The border
    is replicated.

    >>> import torch
    >>> step = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4)[..., None]
    >>> local_deviation(step)[0]
    tensor([0.0000, 0.4714, 0.4714, 0.0000])
    """
    height, width, _ = image.shape
    channels = image.permute(2, 0, 1)
    padded = F.pad(channels[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    first, second = torch.zeros_like(channels), torch.zeros_like(channels)
    for down in range(3):
        for right in range(3):
            # relative to the middle, so that equal pixels have exactly none
            difference = padded[:, down : down + height, right : right + width] - channels
            first += difference
            second += difference.square_()
    return (second / 9 - (first / 9).square_()).clamp_min_(0).mean(dim=0).sqrt()


@_by_rows
def laplacian(image: Float[Tensor, "h w c"] | UInt8[Tensor, "h w c"]) -> Float[Tensor, "h w"]:
    """Compute the detail of each pixel: its absolute difference from the mean of the 3 x 3 pixels around it.

    The mean over channels is taken, in [0, 8/9] for values in [0, 1]. Bytes stand for 255 times that, and take a third
    of the time. The border is replicated, so that it is no detail by itself.

    >>> import torch
    >>> step = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4)[..., None]
    >>> laplacian(step)[0]
    tensor([0.0000, 0.3333, 0.3333, 0.0000])
    """
    is_bytes = image.dtype == torch.uint8
    values = image.short() if is_bytes else image  # 16 bits hold the sum of 18 bytes, of either sign
    rows = torch.cat((values[:1], values, values[-1:]))
    sums = rows[:-2] + rows[1:-1] + rows[2:]
    sums = torch.cat((sums[:, :1], sums, sums[:, -1:]), dim=1)
    sums = sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:]
    difference = sums.sub_(values, alpha=9).abs_()
    # channel by channel, as a mean over few neighbours in memory is slow
    total = functools.reduce(torch.add, difference.unbind(-1))
    return total.float() / (9 * image.shape[-1] * (255 if is_bytes else 1))
