"""Training steps of a whole pipeline for tests."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline

from nerfstudio_softmining.plugin import methods


class Training:
    """The steps of nerfstudio's trainer, with a gradient scaler that works on the CPU."""

    def __init__(
        self,
        scene: Path,
        loss_scale: float | None = None,
        scale: float = 1.0,
        kind: str = "langevin",
        manager: dict[str, Any] | None = None,
        **model: Any,
    ) -> None:
        random.seed(0)  # the order in which nerfstudio caches images
        torch.manual_seed(0)
        config = deepcopy(methods.softmining_nerfacto_lite_blender.config).pipeline
        config.datamanager.data = scene
        config.datamanager.camera_res_scale_factor = scale
        config.datamanager.train_num_rays_per_batch = 64 if scale == 1.0 else 1024
        config.datamanager.pixel_sampler.kind = kind
        config.datamanager = replace(config.datamanager, **manager or {})
        config.model.log2_hashmap_size = 10
        config.model = replace(config.model, **model)
        if model.get("background_color") == "random":
            config.datamanager.dataparser.alpha_color = None
        self.pipeline: VanillaPipeline = config.setup(device="cpu")
        if loss_scale is None:
            self.scaler = torch.cuda.amp.GradScaler(enabled=False)
        elif hasattr(torch.amp, "GradScaler"):
            self.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
        else:
            pytest.skip("torch before 2.3 scales gradients on CUDA only")
        self.optimizer = torch.optim.Adam(self.pipeline.model.parameters(), lr=1e-2, eps=1e-15)
        self.callbacks = self.pipeline.get_training_callbacks(
            TrainingCallbackAttributes(None, self.scaler, self.pipeline, None)
        )
        self.steps = 0

    @property
    def pool(self):
        return self.pipeline.datamanager.train_pixel_sampler.run.state.chains

    def step(self, spoil: float = 1.0, autocast: bool = False) -> None:
        self.pipeline.train()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", enabled=autocast):
            _, losses, _ = self.pipeline.get_train_loss_dict(self.steps)
            loss = sum(losses.values()) * spoil
        self.last = self.pipeline.datamanager._mining_batch
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for callback in self.callbacks:
            callback.run_callback_at_location(self.steps, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        self.steps += 1
