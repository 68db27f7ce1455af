"""nerfstudio's ray-based models, soft mined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.model_components.losses import DepthLossType
from nerfstudio.models.depth_nerfacto import DepthNerfactoModel, DepthNerfactoModelConfig
from nerfstudio.models.instant_ngp import InstantNGPModelConfig, NGPModel
from nerfstudio.models.mipnerf import MipNerfModel
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.models.neus import NeuSModel, NeuSModelConfig
from nerfstudio.models.neus_facto import NeuSFactoModel, NeuSFactoModelConfig
from nerfstudio.models.tensorf import TensoRFModel, TensoRFModelConfig
from nerfstudio.models.vanilla_nerf import NeRFModel, VanillaModelConfig
from nerfstudio.utils import comms
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat, thin_backward
from nerfstudio_softmining.plugin.model import SoftMiningConfig, SoftMiningMixin
from nerfstudio_softmining.plugin.tensor_encoding import make_differentiable
from nerfstudio_softmining.settings import PositiveFraction

# Configurations annotate `config` anew, as nerfstudio's own models do.
# pyright: reportIncompatibleVariableOverride=false


@dataclass
class SoftMiningNerfactoModelConfig(SoftMiningConfig, NerfactoModelConfig):
    """Nerfacto's settings and those of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningNerfactoModel)
    """Target class to instantiate."""
    backward_fraction: PositiveFraction = 1.0
    """Fraction of the samples along the rays that the backward pass goes through, in (0, 1]: those that change the
    field most, and some of the others. Less than 1 saves time, and adds noise to the gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backward_fraction < 1 and self.predict_normals:
            raise UserError(
                f"--pipeline.model.backward-fraction is {self.backward_fraction}, and normals need a backward pass "
                "through all samples. Set it to 1, or --pipeline.model.predict-normals to False."
            )


class SoftMiningNerfactoModel(SoftMiningMixin, NerfactoModel):
    """Nerfacto, trained by soft mining."""

    config: SoftMiningNerfactoModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        if self.config.backward_fraction == 1:
            return
        if comms.get_world_size() > 1:  # a gradient that is found within the backward pass is not awaited
            CONSOLE.print("[yellow]On several GPUs --pipeline.model.backward-fraction is 1.[/yellow]")
        else:
            thin_backward.thin(self.field, self.config.backward_fraction)

    def uses_position_gradient(self, ray_samples: RaySamples) -> bool:
        return _are_differentiable(ray_samples) or self.config.predict_normals


@dataclass
class SoftMiningDepthNerfactoModelConfig(SoftMiningNerfactoModelConfig, DepthNerfactoModelConfig):
    """Settings of depth-nerfacto and of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningDepthNerfactoModel)
    """Target class to instantiate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth_loss_type == DepthLossType.SPARSENERF_RANKING:
            raise UserError(
                "--pipeline.model.depth-loss-type is SPARSENERF_RANKING: it compares neighbouring rays, and soft "
                "mining chooses single ones. Use DS_NERF or URF, or nerfstudio's own depth-nerfacto."
            )


class SoftMiningDepthNerfactoModel(SoftMiningNerfactoModel, DepthNerfactoModel):
    """Nerfacto with a loss of depth, trained by soft mining. The loss of depth is left as it is."""

    config: SoftMiningDepthNerfactoModelConfig

    def get_extra_state(self) -> dict:
        return super().get_extra_state() | {"depth_sigma": self.depth_sigma.clone()}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.depth_sigma = state.get("depth_sigma", self.depth_sigma).cpu()


@dataclass
class SoftMiningNGPModelConfig(SoftMiningConfig, InstantNGPModelConfig):
    """Settings of instant-ngp and of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningNGPModel)
    """Target class to instantiate."""


class SoftMiningNGPModel(SoftMiningMixin, NGPModel):
    """Instant-NGP, trained by soft mining."""

    config: SoftMiningNGPModelConfig

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        outputs = super().get_outputs(ray_bundle)
        if not self.training:  # `ns-render dataset` stores pictures, which have floats and channels
            outputs["num_samples_per_ray"] = outputs["num_samples_per_ray"][:, None].float()
        return outputs

    def uses_position_gradient(self, ray_samples: RaySamples) -> bool:
        return _are_differentiable(ray_samples)


@dataclass
class SoftMiningVanillaNeRFModelConfig(SoftMiningConfig, VanillaModelConfig):
    """Settings of vanilla NeRF and of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningVanillaNeRFModel)
    """Target class to instantiate."""


class SoftMiningVanillaNeRFModel(SoftMiningMixin, NeRFModel):
    """NeRF of a coarse and a fine network, trained by soft mining."""

    config: SoftMiningVanillaNeRFModelConfig
    num_losses = 2


@dataclass
class SoftMiningMipNeRFModelConfig(SoftMiningConfig, VanillaModelConfig):
    """Settings of mip-NeRF and of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningMipNeRFModel)
    """Target class to instantiate."""


class SoftMiningMipNeRFModel(SoftMiningMixin, MipNerfModel):
    """Mip-NeRF, trained by soft mining."""

    config: SoftMiningMipNeRFModelConfig
    num_losses = 2


@dataclass
class SoftMiningTensoRFModelConfig(SoftMiningConfig, TensoRFModelConfig):
    """Settings of TensoRF and of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningTensoRFModel)
    """Target class to instantiate."""


class SoftMiningTensoRFModel(SoftMiningMixin, TensoRFModel):
    """TensoRF, trained by soft mining."""

    config: SoftMiningTensoRFModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        self._encodings += make_differentiable(self)

    def uses_position_gradient(self, ray_samples: RaySamples) -> bool:
        # not that of a camera optimizer, which nerfstudio cuts off
        return self._has_pixel_gradient


@dataclass
class SoftMiningNeuSModelConfig(SoftMiningConfig, NeuSModelConfig):
    """Settings of NeuS and of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningNeuSModel)
    """Target class to instantiate."""


class _Surface(SoftMiningMixin):
    """What models of surfaces have in common: their depth is along the camera's axis, their grid of tiny-cuda-nn."""

    def populate_modules(self) -> None:
        with compat.sdf_grid_in_torch():
            super().populate_modules()

    def ray_length(self, outputs: dict[str, Any]) -> Tensor:
        return outputs["depth"] * outputs["directions_norm"]


class SoftMiningNeuSModel(_Surface, NeuSModel):
    """NeuS, trained by soft mining."""

    config: SoftMiningNeuSModelConfig


@dataclass
class SoftMiningNeuSFactoModelConfig(SoftMiningConfig, NeuSFactoModelConfig):
    """Settings of neus-facto and of soft mining."""

    _target: type = field(default_factory=lambda: SoftMiningNeuSFactoModel)
    """Target class to instantiate."""


class SoftMiningNeuSFactoModel(_Surface, NeuSFactoModel):
    """NeuS with proposal networks, trained by soft mining."""

    config: SoftMiningNeuSFactoModelConfig


def _are_differentiable(ray_samples: RaySamples) -> bool:
    frustums = ray_samples.frustums
    return frustums.origins.requires_grad or frustums.directions.requires_grad
