"""Soft-mined nerfacto."""

from __future__ import annotations

from dataclasses import dataclass, field

from nerfstudio.cameras.rays import RaySamples
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig

from nerfstudio_softmining.plugin.model import SoftMiningConfig, SoftMiningMixin


@dataclass
class SoftMiningNerfactoModelConfig(SoftMiningConfig, NerfactoModelConfig):
    """Nerfacto's settings and those of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningNerfactoModel)
    """Target class to instantiate."""


class SoftMiningNerfactoModel(SoftMiningMixin, NerfactoModel):
    """Nerfacto, trained by soft mining."""

    config: SoftMiningNerfactoModelConfig  # pyright: ignore[reportIncompatibleVariableOverride] # as in nerfstudio

    def uses_position_gradient(self, ray_samples: RaySamples) -> bool:
        frustums = ray_samples.frustums
        return frustums.origins.requires_grad or frustums.directions.requires_grad or self.config.predict_normals
