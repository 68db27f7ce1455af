"""Settings of image fitting."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from nerfstudio_softmining.errors import UserError


@dataclass
class FitConfig:
    """How a field is fitted to a photograph; the defaults are the paper's (section 4.1) but for `detail`'s softness."""

    batch: int = 4096
    """Points of a training step."""
    alpha: float | None = None
    """Softness of eq. 9, in [0, 1]: 0 hard mining, 1 importance sampling; None is 0.3 for detail, else 0.6."""
    weight_by: Literal["density", "importance"] = "density"
    """Weigh a point by the density it was drawn with, which is Q only for the chains, or any point by its Q."""
    photo_gradient: bool = True
    """Let the photograph's own gradient take part in that of log Q, which drives the chains."""
    learning_rate: float = 0.01
    """Learning rate of Adam."""
    decay_at: tuple[int, ...] = (20_000, 30_000)
    """Training steps at which the learning rate is multiplied by 0.33."""
    levels: int = 16
    """Levels of the hash grid."""
    features: int = 2
    """Features of each entry of the hash grid."""
    log2_hashmap_size: int = 20
    """Logarithm to the base of 2 of the most entries that a level has."""
    base_resolution: int = 16
    """Cells along each side of the coarsest level; the finest has as many as the longer side has pixels."""
    width: int = 64
    """Neurons of each of the two hidden layers."""
    implementation: Literal["auto", "tcnn", "torch"] = "auto"
    """tiny-cuda-nn or torch; auto takes tiny-cuda-nn on CUDA where it is installed."""

    def __post_init__(self) -> None:
        for name in ("batch", "levels", "features", "log2_hashmap_size", "base_resolution", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} is {getattr(self, name)}: it is a whole number of 1 or more.")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha is {self.alpha}: it lies in [0, 1]. The paper uses 0.6.")
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate is {self.learning_rate}: it is above 0, such as 0.01.")
        if self.log2_hashmap_size > 24:
            raise UserError(
                f"--log2-hashmap-size is {self.log2_hashmap_size}: it is at most 24, which takes gigabytes."
            )


def flag(name: str) -> str:
    """The flag of a field, as the command line has it."""
    assert name in {field.name for field in fields(FitConfig)}
    return "--" + name.replace("_", "-")
