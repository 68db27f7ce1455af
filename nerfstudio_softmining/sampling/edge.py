"""Edge-guided ray allocation: EGRA-NeRF (Gai et al., Image and Vision Computing 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.strategy import CellDensity, MapStrategy, StrategyConfig


@dataclass
class EdgeConfig(StrategyConfig):
    """Rays on and around Canny edges (EGRA-NeRF)."""

    uniform_share: float = 0.5
    """Share of each batch that is drawn uniformly over all images, in [0, 1]."""
    low_threshold: float = 100.0
    """Canny's lower threshold on the gradient of an 8-bit grey image."""
    high_threshold: float = 200.0
    """Canny's upper threshold on the gradient of an 8-bit grey image."""
    shift: int = 2
    """Rays lie up to this many pixels beside an edge, so that both of its sides are seen."""
    reweighted: bool = False
    """Weigh rays by their density (eq. 9); the original does not."""


class EdgeStrategy(MapStrategy):
    """Draws an edge pixel and shifts it at random, beside a share of uniform rays.

    The law of the shifted edge pixels is tabulated when images are cached: 0.32 bytes a pixel in cells of 2 x 2.
    """

    config: EdgeConfig

    def cache(self, pixels: CachedPixels) -> None:
        super().cache(pixels)
        grid = self.make_grid("edges", dens.bytes_per_entry())
        self.map = CellDensity.of_weights(grid, self._weights, "Finding edges")
        if self.map.is_empty():
            self.map = None

    def _weights(self, slot: int) -> Float[Tensor, "h w"]:
        edges = canny(self.pixels.image(slot), self.config.low_threshold, self.config.high_threshold)
        width = 2 * self.config.shift + 1
        return F.avg_pool2d(edges[None], width, stride=1, padding=self.config.shift)[0]


def canny(image: Float[Tensor, "h w c"], low: float, high: float) -> Float[Tensor, "h w"]:
    """Canny's edges, 1 or 0, of the grey version of an image in [0, 1]; of the alpha channel where there is one."""
    grey = (image[..., :3].mean(dim=-1) * 255).round().to(torch.uint8).cpu().numpy()
    edges = torch.from_numpy(cv2.Canny(grey, low, high))
    if image.shape[-1] == 4:
        alpha = (image[..., 3] * 255).round().to(torch.uint8).cpu().numpy()
        edges = edges | torch.from_numpy(cv2.Canny(alpha, low, high))
    return (edges > 0).float().to(image.device)
