"""Soft-mine a nerfstudio method of your own.

Your model needs two things: its reconstruction loss is `self.rgb_loss(truth, prediction)`, and a nerfstudio ray sampler
among its modules draws the samples of its field. nerfacto and most methods derived from it are such models.

Try it without installing anything, from this folder:

    export PYTHONPATH=. NERFSTUDIO_METHOD_CONFIGS="my-softmined=soft_mined_method:my_softmined"
    ns-train my-softmined --data <folder>

In a package of your own, register `my_softmined` under the entry points `nerfstudio.method_configs` instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification

from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManagerConfig
from nerfstudio_softmining.plugin.model import SoftMiningConfig, SoftMiningMixin


class MyModel(NerfactoModel):
    """Stands for a model of yours."""


# 1. The mixin before your model, and its settings before those of your model.
class MySoftMinedModel(SoftMiningMixin, MyModel):
    """Your model, soft mined."""


@dataclass
class MySoftMinedModelConfig(SoftMiningConfig, NerfactoModelConfig):
    """Settings of your model, and of soft mining."""

    _target: type = field(default_factory=lambda: MySoftMinedModel)


# 2. The datamanager that tells the sampler about the loss.
my_softmined = MethodSpecification(
    TrainerConfig(
        method_name="my-softmined",
        max_num_iterations=30000,
        mixed_precision=True,
        pipeline=VanillaPipelineConfig(
            datamanager=SoftMiningDataManagerConfig(dataparser=NerfstudioDataParserConfig()),
            model=MySoftMinedModelConfig(alpha=0.8),
        ),
        optimizers={
            "proposal_networks": {"optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": None},
            "fields": {"optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": None},
            "camera_opt": {"optimizer": AdamOptimizerConfig(lr=1e-3, eps=1e-15), "scheduler": None},
        },
    ),
    description="My method, soft mined.",
)
