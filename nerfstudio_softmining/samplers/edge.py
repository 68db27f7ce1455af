"""Edge-guided rays: EGRA-NeRF (Gai et al., Image and Vision Computing 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import cv2
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.samplers.base import Ahead, DensitySampler, SamplerConfig, SamplerContext, Samples
from nerfstudio_softmining.samplers.cells import PixelDensity
from nerfstudio_softmining.samplers.images import TrainingImages
from nerfstudio_softmining.samplers.registry import register
from nerfstudio_softmining.settings import Fraction, Interval

MOST_AHEAD = 8
"""Batches drawn together, which costs less than one by one."""
CannyThreshold = Annotated[float, Interval(0, 2040)]
"""A threshold on the gradient of an 8-bit image, which is at most 8 * 255."""


@dataclass
class EdgeConfig(SamplerConfig):
    """Settings of the sampler edge."""

    importance_weighted: bool = False
    """Weight rays by their density (eq. 9); the original does not."""
    uniform_fraction: Fraction = 0.5
    """Fraction of each batch that is drawn uniformly over all images, in [0, 1]."""
    low_threshold: CannyThreshold = 100.0
    """Canny's lower threshold on the gradient of an 8-bit grey image."""
    high_threshold: CannyThreshold = 200.0
    """Canny's upper threshold on the gradient of an 8-bit grey image."""
    shift: Annotated[int, Interval(0, 32)] = 2
    """Rays lie up to this many pixels beside an edge, so that both of its sides are seen."""


class EdgeState(NamedTuple):
    """The batches drawn in advance."""

    ahead: Ahead | None
    """Batches that are drawn and not used yet."""


@register
class Edge(DensitySampler[EdgeConfig, EdgeState]):
    """Draw on and around Canny edges (EGRA-NeRF).

    An edge pixel is shifted at random, and a fraction of the rays is uniform. The density of shifted edge pixels is
    tabulated when images are cached: 0.33 bytes a pixel in cells of 2 x 2. Batches of some steps are drawn together.
    """

    config_class = EdgeConfig
    state_class = EdgeState

    def __init__(self, config: EdgeConfig, context: SamplerContext, images: TrainingImages) -> None:
        super().__init__(config, context, images)
        grid = self.make_grid("edges", dens.bytes_per_entry())
        self._density = PixelDensity.from_weights(grid, self._weights, "Finding edges")

    def init(self, previous: EdgeState | None = None) -> EdgeState:
        return EdgeState(None)

    def density(self, state: EdgeState) -> PixelDensity | None:
        return self._density

    def draw(self, state: EdgeState, count: int) -> tuple[Samples, EdgeState]:
        num_uniform = self.num_uniform(state, count)
        batch, ahead = self.next_batch(state, state.ahead, MOST_AHEAD, count - num_uniform, num_uniform)
        return self.mix(batch, num_uniform), EdgeState(ahead)

    def _weights(self, cache_index: int) -> Float[Tensor, "h w"]:
        edges = canny(self.images.image(cache_index), self.config.low_threshold, self.config.high_threshold)
        width = 2 * self.config.shift + 1
        return F.avg_pool2d(edges[None], width, stride=1, padding=self.config.shift)[0]


def canny(image: Float[Tensor, "h w c"], low: float, high: float) -> Float[Tensor, "h w"]:
    """Find Canny's edges, 1 or 0, in the grey version of an image in [0, 1] and in its alpha channel, if any."""
    grey = (image[..., :3].mean(dim=-1) * 255).round().to(torch.uint8).cpu().numpy()
    edges = torch.from_numpy(cv2.Canny(grey, low, high))
    if image.shape[-1] == 4:
        alpha = (image[..., 3] * 255).round().to(torch.uint8).cpu().numpy()
        edges = edges | torch.from_numpy(cv2.Canny(alpha, low, high))
    return (edges > 0).float().to(image.device)
