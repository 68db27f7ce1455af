"""The methods that `ns-train --help` lists."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification

from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManagerConfig
from nerfstudio_softmining.plugin.llff_dataparser import LLFFDataParserConfig
from nerfstudio_softmining.plugin.model import SoftMiningConfig
from nerfstudio_softmining.plugin.models import (
    SoftMiningDepthNerfactoModelConfig,
    SoftMiningMipNeRFModelConfig,
    SoftMiningNerfactoModelConfig,
    SoftMiningNeuSFactoModelConfig,
    SoftMiningNeuSModelConfig,
    SoftMiningNGPModelConfig,
    SoftMiningTensoRFModelConfig,
    SoftMiningVanillaNeRFModelConfig,
)
from nerfstudio_softmining.plugin.optimizer import FusedAdamOptimizerConfig
from nerfstudio_softmining.plugin.soft_mined import soft_mined
from nerfstudio_softmining.plugin.trainer import SoftMiningTrainer

EXACT_CAMERAS = {"camera_optimizer": CameraOptimizerConfig(mode="off"), "use_appearance_embedding": False}
"""Cameras and exposures as they are. The paper's two data sets have exact ones; a short training cannot mend them."""
BLENDER = {
    **EXACT_CAMERAS,
    "alpha": 0.6,
    "background_color": "white",
    "disable_scene_contraction": True,
    "proposal_initial_sampler": "uniform",
    "near_plane": 2.0,
    "far_plane": 6.0,
    "distortion_loss_mult": 0.0,
    "average_init_density": 1.0,
}
"""One object on white, as in NeRF Synthetic (section 4.2)."""
LLFF = {**EXACT_CAMERAS, "alpha": 0.8}
"""Forward-facing scenes, as in LLFF (section 4.2)."""
LITE = {
    **EXACT_CAMERAS,
    "average_init_density": 0.1,
    "backward_fraction": 0.25,
    "eval_num_rays_per_chunk": 1 << 12,
    "num_levels": 5,
    "features_per_level": 4,
    "max_res": 1024,
    "log2_hashmap_size": 17,
    "num_proposal_iterations": 1,
    "proposal_warmup": 500,  # then proposal networks learn in every fifth step; nerfacto's 5,000 never come
    "num_proposal_samples_per_ray": (32,),
    "num_nerf_samples_per_ray": 24,
    "proposal_net_args_list": [
        {"hidden_dim": 16, "log2_hashmap_size": 14, "num_levels": 3, "max_res": 64, "use_linear": False}
    ],
}
"""Grids and sample counts for two CPU cores. (Narrower networks than nerfacto's own would save little, and make the
result depend on their start.)"""


SOFT_MINED: dict[str, tuple[type[SoftMiningConfig], str]] = {
    "nerfacto-big": (SoftMiningNerfactoModelConfig, "Larger nerfacto, soft mined."),
    "nerfacto-huge": (SoftMiningNerfactoModelConfig, "Largest nerfacto, soft mined."),
    "depth-nerfacto": (SoftMiningDepthNerfactoModelConfig, "Nerfacto with depth supervision, soft mined."),
    "instant-ngp": (SoftMiningNGPModelConfig, "Instant-NGP for unbounded scenes, soft mined. Needs CUDA."),
    "instant-ngp-bounded": (SoftMiningNGPModelConfig, "Instant-NGP for bounded scenes, soft mined. Needs CUDA."),
    "vanilla-nerf": (SoftMiningVanillaNeRFModelConfig, "The original NeRF, soft mined. Slow."),
    "mipnerf": (SoftMiningMipNeRFModelConfig, "Mip-NeRF for bounded scenes, soft mined. Slow."),
    "tensorf": (SoftMiningTensoRFModelConfig, "TensoRF for bounded scenes, soft mined."),
    "neus": (SoftMiningNeuSModelConfig, "NeuS for surfaces, soft mined. Slow."),
    "neus-facto": (SoftMiningNeuSFactoModelConfig, "NeuS with proposal networks for surfaces, soft mined."),
}
"""nerfstudio's methods that are soft mined with all of their own settings: settings of the model, and a description."""


def __getattr__(name: str) -> MethodSpecification:
    """Make the specification of one of them, such as `softmining_tensorf`.

    nerfstudio asks for it while it lists all methods, after its own.
    """
    method = name.removeprefix("softmining_").replace("_", "-")
    if not name.startswith("softmining_") or method not in SOFT_MINED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nerfstudio.configs.method_configs import method_configs

    model, description = SOFT_MINED[method]
    config = soft_mined(method_configs[method], model, f"softmining-{method}")  # pyright: ignore[reportArgumentType]
    return MethodSpecification(config, description)


@dataclass
class DecayingTrainerConfig(TrainerConfig):
    """Settings of a training whose learning rates fall over all of its iterations, however many these are."""

    decay_steps: int | None = None
    """Iterations over which learning rates fall; None: all of this training. Set it where training is resumed later."""

    def setup(self, **kwargs: Any) -> Any:
        """Make the trainer."""
        for group in self.optimizers.values():
            group["scheduler"].max_steps = self.decay_steps or self.max_num_iterations
        return super().setup(**kwargs)


def _nerfacto(
    name: str, dataparser: DataParserConfig, trainer: type[TrainerConfig] = TrainerConfig, **model: Any
) -> TrainerConfig:
    """Make nerfacto's own settings, soft mined."""
    decay = ExponentialDecaySchedulerConfig(lr_final=0.0001, max_steps=200000)
    defaults = {
        "eval_num_rays_per_chunk": 1 << 15,
        "average_init_density": 0.01,
        "camera_optimizer": CameraOptimizerConfig(mode="SO3xR3"),
        "implementation": compat.implementation(),
    }
    return trainer(
        _target=SoftMiningTrainer,
        method_name=name,
        steps_per_eval_batch=500,
        steps_per_save=2000,
        max_num_iterations=30000,
        mixed_precision=True,
        machine=MachineConfig(device_type=compat.device_type()),
        pipeline=VanillaPipelineConfig(
            datamanager=SoftMiningDataManagerConfig(
                dataparser=dataparser, train_num_rays_per_batch=4096, eval_num_rays_per_batch=4096
            ),
            model=SoftMiningNerfactoModelConfig(**deepcopy(defaults | model)),
        ),
        optimizers={
            "proposal_networks": {"optimizer": FusedAdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": decay},
            "fields": {"optimizer": FusedAdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": decay},
            "camera_opt": {
                "optimizer": FusedAdamOptimizerConfig(lr=1e-3, eps=1e-15),
                "scheduler": ExponentialDecaySchedulerConfig(lr_final=1e-4, max_steps=5000),
            },
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer+tensorboard",
    )


def _lite(name: str, dataparser: DataParserConfig, **model: Any) -> TrainerConfig:
    """Make the same for a laptop: a small model, small batches, few iterations."""
    config = _nerfacto(name, dataparser, DecayingTrainerConfig, **(LITE | model))
    config.max_num_iterations = 3000
    config.steps_per_save = 1000
    config.viewer.num_rays_per_chunk = 1 << 12
    assert isinstance(config.pipeline.datamanager, SoftMiningDataManagerConfig)
    config.pipeline.datamanager.train_num_rays_per_batch = 512
    config.pipeline.datamanager.eval_num_rays_per_batch = 1024
    for group in ("proposal_networks", "fields"):
        config.optimizers[group]["scheduler"] = ExponentialDecaySchedulerConfig(lr_final=4e-3)
    return config


softmining_nerfacto = MethodSpecification(
    _nerfacto("softmining-nerfacto", NerfstudioDataParserConfig()),
    "Nerfacto, soft mined: trains on the pixels that are still wrong.",
)
softmining_nerfacto_blender = MethodSpecification(
    _nerfacto("softmining-nerfacto-blender", BlenderDataParserConfig(), **BLENDER),
    "Soft-mined nerfacto for one object on white, such as NeRF Synthetic.",
)
softmining_nerfacto_llff = MethodSpecification(
    _nerfacto("softmining-nerfacto-llff", LLFFDataParserConfig(), **LLFF),
    "Soft-mined nerfacto for forward-facing scenes, such as LLFF.",
)
softmining_nerfacto_lite = MethodSpecification(
    _lite("softmining-nerfacto-lite", NerfstudioDataParserConfig()),
    "Soft-mined nerfacto for a laptop without a GPU.",
)
softmining_nerfacto_lite_blender = MethodSpecification(
    _lite("softmining-nerfacto-lite-blender", BlenderDataParserConfig(), **BLENDER, max_res=256, log2_hashmap_size=16),
    "softmining-nerfacto-lite for one object on white, such as NeRF Synthetic.",
)
softmining_nerfacto_lite_llff = MethodSpecification(
    _lite("softmining-nerfacto-lite-llff", LLFFDataParserConfig(), **LLFF),
    "softmining-nerfacto-lite for forward-facing scenes, such as LLFF.",
)
