"""One call that turns a nerfstudio method into a soft-mined one."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import Any, get_args, get_origin

from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.data.datamanagers.parallel_datamanager import ParallelDataManager
from nerfstudio.data.datasets.sdf_dataset import SDFDataset
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.pipelines.dynamic_batch import DynamicBatchPipeline

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManager, SoftMiningDataManagerConfig
from nerfstudio_softmining.plugin.dataset import SurfaceDataset
from nerfstudio_softmining.plugin.model import SoftMiningConfig
from nerfstudio_softmining.plugin.optimizer import FusedAdamOptimizerConfig
from nerfstudio_softmining.plugin.pipelines import RayMarchingPipeline
from nerfstudio_softmining.plugin.trainer import SoftMiningTrainer

OWN = {"_target", "pixel_sampler", "images_on_gpu", "masks_on_gpu"}
"""Settings of soft mining that the other method has otherwise: what they set up, the sampler, where images are."""


def soft_mined(
    method: TrainerConfig,
    model: type[SoftMiningConfig],
    name: str | None = None,
    datamanager: type[SoftMiningDataManager] | None = None,
    **settings: Any,
) -> TrainerConfig:
    """Return a method that trains as another does, on pixels that soft mining chooses.

    All settings are those of the other method, but for the device, where this machine has no CUDA GPU, and for the log,
    which TensorBoard gets as well. Adam runs in one kernel. A `ParallelDataManager` gives way to one that draws rays in
    the process that trains.

    Args:
        method: settings of the other method, which stay as they are.
        model: settings of its model, soft mined.
        name: name of the new method; softmining- and the other's if None.
        datamanager: its datamanager, where the other method has one of its own.
        settings: settings of the model that differ.

    Raises:
        UserError: if the method trains on whole images, or has a datamanager of its own and none is given.
    """
    config = deepcopy(method)
    if config._target is Trainer:
        config._target = SoftMiningTrainer
    theirs: Any = config.pipeline.datamanager
    if not hasattr(theirs, "train_num_rays_per_batch"):
        raise UserError(
            f"{method.method_name} cannot be soft mined: its {type(theirs).__name__} gives whole images to the model. "
            "Soft mining chooses single rays."
        )
    if config.pipeline._target is DynamicBatchPipeline:
        config.pipeline._target = RayMarchingPipeline
    config.method_name = name or f"softmining-{method.method_name}"
    config.pipeline.datamanager = SoftMiningDataManagerConfig(**_shared(theirs, SoftMiningDataManagerConfig))
    config.pipeline.datamanager._target = datamanager or _datamanager(str(method.method_name), theirs._target)
    shared: dict[str, Any] = _shared(config.pipeline.model, model)
    if hasattr(model, "implementation"):
        shared["implementation"] = compat.implementation()
    config.pipeline.model = model(**shared | settings)  # pyright: ignore[reportAttributeAccessIssue] # also a ModelConfig
    for group in config.optimizers.values():
        optimizer = group["optimizer"]
        if type(optimizer) is AdamOptimizerConfig:
            group["optimizer"] = FusedAdamOptimizerConfig(**_shared(optimizer, FusedAdamOptimizerConfig))
    config.machine = dataclasses.replace(config.machine, device_type=compat.device_type())
    config.vis = "viewer+tensorboard"
    return config


def _datamanager(method: str, theirs: Any) -> Any:
    """Return the datamanager in place of one of nerfstudio's, with the same data set."""
    origin = get_origin(theirs) or theirs
    if origin not in (VanillaDataManager, ParallelDataManager):
        raise UserError(
            f"{method} has a datamanager of its own, {origin.__name__}. Derive one that does the same from "
            "SoftMiningDataManager, and give it to soft_mined as `datamanager`."
        )
    for dataset in get_args(theirs):
        return SoftMiningDataManager[SurfaceDataset if dataset is SDFDataset else dataset]
    return SoftMiningDataManager


def _shared(theirs: Any, ours: type) -> dict[str, Any]:
    """Return the settings that two classes of settings share, but for those that are soft mining's own."""
    names = {field.name for field in dataclasses.fields(ours) if field.init} - OWN
    return {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
