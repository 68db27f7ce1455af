"""The methods that `ns-train --help` lists."""

from __future__ import annotations

from copy import deepcopy

from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification

from nerfstudio_softmining import compat
from nerfstudio_softmining.data.datamanager import SoftMiningDataManagerConfig
from nerfstudio_softmining.data.llff_dataparser import LLFFDataParserConfig
from nerfstudio_softmining.errors import hide_traceback_of_user_errors
from nerfstudio_softmining.models.nerfacto import SoftMiningNerfactoModelConfig

compat.allow_numpy_scalars_in_checkpoints()
hide_traceback_of_user_errors()


def _nerfacto() -> TrainerConfig:
    """Nerfacto's own settings, soft mined."""
    decay = ExponentialDecaySchedulerConfig(lr_final=0.0001, max_steps=200000)
    return TrainerConfig(
        method_name="softmining-nerfacto",
        steps_per_eval_batch=500,
        steps_per_save=2000,
        max_num_iterations=30000,
        mixed_precision=True,
        machine=MachineConfig(device_type=compat.device_type()),
        pipeline=VanillaPipelineConfig(
            datamanager=SoftMiningDataManagerConfig(
                dataparser=NerfstudioDataParserConfig(), train_num_rays_per_batch=4096, eval_num_rays_per_batch=4096
            ),
            model=SoftMiningNerfactoModelConfig(
                eval_num_rays_per_chunk=1 << 15,
                average_init_density=0.01,
                camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"),
                implementation=compat.implementation(),
            ),
        ),
        optimizers={
            "proposal_networks": {"optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": decay},
            "fields": {"optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": decay},
            "camera_opt": {
                "optimizer": AdamOptimizerConfig(lr=1e-3, eps=1e-15),
                "scheduler": ExponentialDecaySchedulerConfig(lr_final=1e-4, max_steps=5000),
            },
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer+tensorboard",
    )


def _lite() -> TrainerConfig:
    """Soft-mined nerfacto for two CPU cores: smaller grids, networks, sample counts and batches."""
    config = _nerfacto()
    config.method_name = "softmining-nerfacto-lite"
    config.max_num_iterations = 1000
    config.steps_per_save = 500
    config.viewer.num_rays_per_chunk = 1 << 12
    config.pipeline.datamanager.train_num_rays_per_batch = 1024
    config.pipeline.datamanager.eval_num_rays_per_batch = 1024
    model = config.pipeline.model
    model.eval_num_rays_per_chunk = 1 << 12
    model.num_levels, model.features_per_level, model.max_res, model.log2_hashmap_size = 5, 4, 256, 16
    model.hidden_dim = model.hidden_dim_color = 32
    model.num_proposal_iterations, model.num_proposal_samples_per_ray, model.num_nerf_samples_per_ray = 1, (32,), 24
    model.proposal_net_args_list = [
        {"hidden_dim": 16, "log2_hashmap_size": 14, "num_levels": 3, "max_res": 64, "use_linear": False}
    ]
    # a step size that falls within the few iterations makes the result depend less on the seed
    for group in ("proposal_networks", "fields"):
        config.optimizers[group]["scheduler"] = ExponentialDecaySchedulerConfig(lr_final=1e-3, max_steps=1000)
    return config


def _preset(config: TrainerConfig, name: str, dataparser: DataParserConfig, alpha: float) -> TrainerConfig:
    """What the paper's two data sets have in common: exact cameras, one exposure."""
    config = deepcopy(config)
    config.method_name = f"{config.method_name}-{name}"
    config.pipeline.datamanager.dataparser = dataparser
    model = config.pipeline.model
    model.alpha = alpha
    model.camera_optimizer.mode = "off"
    model.use_appearance_embedding = False
    return config


def _blender(config: TrainerConfig) -> TrainerConfig:
    """One object on white, as in NeRF Synthetic (section 4.2)."""
    config = _preset(config, "blender", BlenderDataParserConfig(), alpha=0.6)
    model = config.pipeline.model
    model.background_color = "white"
    model.disable_scene_contraction = True
    model.proposal_initial_sampler = "uniform"
    model.near_plane, model.far_plane = 2.0, 6.0
    model.distortion_loss_mult = 0.0
    return config


def _llff(config: TrainerConfig) -> TrainerConfig:
    """A forward-facing scene, as in LLFF (section 4.2)."""
    return _preset(config, "llff", LLFFDataParserConfig(), alpha=0.8)


softmining_nerfacto = MethodSpecification(_nerfacto(), "Nerfacto, soft mined: trains on the pixels that are still wrong.")
softmining_nerfacto_blender = MethodSpecification(
    _blender(_nerfacto()), "Soft-mined nerfacto for one object on white, such as NeRF Synthetic."
)
softmining_nerfacto_llff = MethodSpecification(
    _llff(_nerfacto()), "Soft-mined nerfacto for forward-facing scenes, such as LLFF."
)
softmining_nerfacto_lite = MethodSpecification(_lite(), "Soft-mined nerfacto for a laptop without a GPU.")
softmining_nerfacto_lite_blender = MethodSpecification(
    _blender(_lite()), "softmining-nerfacto-lite for one object on white, such as NeRF Synthetic."
)
softmining_nerfacto_lite_llff = MethodSpecification(
    _llff(_lite()), "softmining-nerfacto-lite for forward-facing scenes, such as LLFF."
)
