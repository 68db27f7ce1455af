"""What a sampler hands to the training step with a batch, and what the step hands back."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

BATCH_KEY = "mining"
"""Key of the [MiningBatch][] in nerfstudio's ray batch."""


@dataclass
class MiningBatch:
    """A batch of training rays as the sampler, the datamanager, the model and the backward pass see it, in this
    order."""

    indices: Int64[Tensor, "rays 3"]
    """Image (as counted by the data set), row and column of each ray."""
    density: Float[Tensor, " rays"]
    """Density p / u that each ray was drawn with; NaN where it follows the importance."""
    num_uniform: int
    """The last rays of the batch, this many, were drawn uniformly."""
    reweighted: bool = True
    """Whether rays are weighed by their density (eq. 9)."""
    alpha_warmup: int = 0
    """Training steps over which alpha rises from 0."""
    image_gradient: Float[Tensor, "rays channels 2"] | None = None
    """Change of each ray's true colour along rows and columns, per pixel, if the sampler asks for a gradient."""
    step: int = 0
    """Training step; set by the datamanager."""
    coords: Float[Tensor, "rays 2"] | None = None
    """Row and column that the rays were made from, in pixels: the leaf whose gradient drives the chains; set by the
    datamanager if the sampler asks for a gradient."""
    importance: Float[Tensor, " rays"] | None = None
    """Q of each ray; set by the model."""
    error: Float[Tensor, " rays"] | None = None
    """Squared error of each ray; set by the model."""
    weighted_error: Float[Tensor, " rays"] | None = None
    """Weighted squared error of each ray, whose gradient is kept if there are coords; set by the model."""
