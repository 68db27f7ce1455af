"""Edge strength of an image: where re-initialised chains start (section 4.1)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def sobel(image: Float[Tensor, "h w c"]) -> Float[Tensor, "h w"]:
    """Sobel gradient magnitude over all channels, in [0, 1] for values in [0, 1].

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
