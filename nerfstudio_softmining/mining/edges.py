"""Edge strength of an image: where re-initialised chains start (section 4.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def sobel(image: Float[Tensor, "h w c"]) -> Float[Tensor, "h w"]:
    """Sobel gradient magnitude over all channels, in [0, 1] for values in [0, 1].

    The border is replicated, so that it is no edge by itself.

    >>> step = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4)[..., None]
    >>> sobel(step)[0]
    tensor([0.0000, 0.7071, 0.7071, 0.0000])
    """
    smooth, difference = image.new_tensor([1.0, 2.0, 1.0]) / 4, image.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack((torch.outer(smooth, difference), torch.outer(difference, smooth)))[:, None]
    channels = image.permute(2, 0, 1)[:, None]
    gradient = F.conv2d(F.pad(channels, (1, 1, 1, 1), mode="replicate"), kernels)
    return (gradient.square().sum(dim=(0, 1)) / (2 * len(channels))).sqrt()
