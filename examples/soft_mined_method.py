"""Soft-mine a nerfstudio method of your own: a mixin before its model, and one call for its settings.

Your model needs two things: its reconstruction loss is `self.rgb_loss(truth, prediction)`, an MSELoss or L1Loss, and a
nerfstudio ray sampler among its modules draws the samples of its field. docs/own_method.md says more.

Try it without installing anything, from this folder:

    export PYTHONPATH=. NERFSTUDIO_METHOD_CONFIGS="my-softmined=soft_mined_method:my_softmined"
    ns-train my-softmined --data <folder>

In a package of your own, register `my_softmined` under the entry points `nerfstudio.method_configs` instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nerfstudio.data.datamanagers.parallel_datamanager import ParallelDataManagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification

from nerfstudio_softmining.plugin.model import SoftMiningConfig, SoftMiningMixin
from nerfstudio_softmining.plugin.soft_mined import soft_mined


# Your method, as it is: its model, the settings of that, and the settings of a training.
class MyModel(NerfactoModel):
    """Stands for a model of yours."""


@dataclass
class MyModelConfig(NerfactoModelConfig):
    """Settings of your model."""

    _target: type = field(default_factory=lambda: MyModel)


my_method = TrainerConfig(
    method_name="my-method",
    max_num_iterations=30000,
    mixed_precision=True,
    pipeline=VanillaPipelineConfig(
        datamanager=ParallelDataManagerConfig(dataparser=NerfstudioDataParserConfig()), model=MyModelConfig()
    ),
    optimizers={
        "proposal_networks": {"optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": None},
        "fields": {"optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": None},
        "camera_opt": {"optimizer": AdamOptimizerConfig(lr=1e-3, eps=1e-15), "scheduler": None},
    },
)


# The mixin before your model, and its settings before those of your model.
class MySoftMinedModel(SoftMiningMixin, MyModel):
    """Your model, soft mined."""


@dataclass
class MySoftMinedModelConfig(SoftMiningConfig, MyModelConfig):
    """Settings of your model, and of soft mining."""

    _target: type = field(default_factory=lambda: MySoftMinedModel)


# One call: all settings of your method, with soft mining's datamanager and model.
my_softmined = MethodSpecification(
    soft_mined(my_method, MySoftMinedModelConfig, "my-softmined", alpha=0.8), description="My method, soft mined."
)
