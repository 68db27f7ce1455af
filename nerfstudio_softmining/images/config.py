"""Settings of image fitting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nerfstudio_softmining.errors import naming_flags
from nerfstudio_softmining.settings import Fraction, Interval, PositiveCount, PositiveFraction, check


@dataclass
class FitConfig:
    """How a field is fitted to a photograph; batch and steps of the decay are the paper's (section 4.1)."""

    batch: PositiveCount = 4096
    """Points of a training step."""
    alpha: Fraction | None = None
    """Softness of eq. 9, in [0, 1]: 0 hard mining, 1 importance sampling; None is the sampler's own, or else 0.6."""
    weight_by: Literal["density", "importance"] = "density"
    """Weight a point by the density it was drawn with, which is Q only for the chains, or any point by its Q."""
    learning_rate: PositiveFraction = 0.005
    """Learning rate of Adam."""
    decay_at: tuple[int, ...] = (20_000, 30_000)
    """Training steps at which the learning rate is multiplied by 0.33."""
    levels: Annotated[int, Interval(1, 32)] = 16
    """Levels of the hash grid."""
    features: Annotated[int, Interval(1, 16)] = 2
    """Features of each entry of the hash grid."""
    log2_hashmap_size: Annotated[int, Interval(1, 24)] = 19
    """Logarithm to the base of 2 of the most entries that a level has."""
    base_resolution: PositiveCount = 16
    """Cells along each side of the coarsest level."""
    growth: Annotated[float, Interval(1, 4)] = 1.5
    """Cells of a level over those of the level before, along each side; as in tiny-cuda-nn's own sample settings."""
    width: Annotated[int, Interval(1, 4096)] = 64
    """Neurons of each of the two hidden layers."""
    implementation: Literal["auto", "tcnn", "torch"] = "auto"
    """tiny-cuda-nn or torch; auto takes tiny-cuda-nn on CUDA where it is installed."""

    def __post_init__(self) -> None:
        with naming_flags(lambda name: f"--{name.replace('_', '-')}"):
            check(self)
