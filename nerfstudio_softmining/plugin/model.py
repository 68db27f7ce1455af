"""Soft mining for any ray-based nerfstudio model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.model_components.ray_samplers import ProposalNetworkSampler, Sampler
from nerfstudio.models.base_model import Model
from nerfstudio.utils.external import TCNN_EXISTS
from torch import Tensor, nn

from nerfstudio_softmining.errors import UserError, naming_flags
from nerfstudio_softmining.plugin import compat, viewer
from nerfstudio_softmining.plugin.contraction import quicken_contractions
from nerfstudio_softmining.plugin.datamanager import SoftMiningDataManager
from nerfstudio_softmining.plugin.error_grid import ErrorGrid
from nerfstudio_softmining.plugin.hash_encoding import quicken
from nerfstudio_softmining.plugin.loss import SoftMinedLoss, WeightBy
from nerfstudio_softmining.plugin.metrics import MetricsLog
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY
from nerfstudio_softmining.plugin.rays import RAY_OFFSETS
from nerfstudio_softmining.samplers.base import MiningBatch
from nerfstudio_softmining.settings import Fraction, check

STEPS_PER_GRID = 8
"""Steps from which the rays of one are added to the grid of errors in space."""
FIX_OF_IMPLEMENTATION = {
    "tcnn": "Install tiny-cuda-nn (`softmining doctor` says how), or use the checkpoint on a machine that has it.",
    "torch": "Set implementation to torch, on the command line or in the run's config.yml.",
}
"""What to do about a checkpoint of each implementation where the other one runs."""


@dataclass
class SoftMiningConfig:
    """Settings that soft mining adds to a model's own."""

    alpha: Fraction = 0.8
    """Softness of eq. 9, in [0, 1]: 0 hard mining, 1 importance sampling. The paper: 0.6 on white, 0.8
    forward-facing."""
    weight_by: WeightBy = "density"
    """Weight a ray by the density it was drawn with, which is Q only for the chains, or any ray by its Q."""

    def __post_init__(self) -> None:
        with naming_flags(lambda name: f"--pipeline.model.{name.replace('_', '-')}"):
            check(self)


class SoftMiningMixin(Model):
    """Weight the reconstruction loss of a ray-based model, and let the pixel coordinates have a gradient.

    Put this class before that of the model.

    The model must compute its reconstruction loss by `self.rgb_loss(truth, prediction)` and draw the samples of its
    field by a nerfstudio ray sampler among its modules, with a [rays, samples] shape.
    """

    config: Any

    def populate_modules(self) -> None:
        """Build the model."""
        with compat.lazy_lpips():
            super().populate_modules()
        compat.warn_if_tcnn_is_missing(getattr(self.config, "implementation", "torch"))
        self.rgb_loss = SoftMinedLoss(self.config.alpha, self.config.weight_by)
        self._encodings = quicken(self)
        quicken_contractions(self)
        self._outer_sampler().register_forward_hook(self._attach_pixel_gradient)
        self._error_grid = ErrorGrid()
        self._rays: RayBundle | None = None

    def _outer_sampler(self) -> Sampler:
        """Return the module that draws the samples of the field."""
        return next(module for module in self.children() if isinstance(module, Sampler))

    def get_loss_dict(self, outputs: dict, batch: dict, metrics_dict: dict | None = None) -> dict[str, Tensor]:
        """Compute the model's own losses, with the reconstruction weighted while training."""
        if self.training and BATCH_KEY not in batch:
            raise UserError(
                "the training batch does not come from soft mining's sampler, which must be updated from the loss. Use "
                "the method's own --pipeline.datamanager and pixel sampler (a ParallelDataManager samples in another "
                "process)."
            )
        mining = batch[BATCH_KEY] if self.training else None
        self.rgb_loss.batch = mining
        try:
            losses = super().get_loss_dict(outputs, batch, metrics_dict)
        finally:
            self.rgb_loss.batch = None
        rays, self._rays = self._rays, None
        if (
            rays is not None
            and mining is not None
            and mining.importance is not None
            and mining.step % STEPS_PER_GRID == 0
        ):
            self._error_grid.add(self._ends(rays, outputs["depth"]), mining.importance.detach())
        return losses

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride] # as in nerfstudio
        """Render rays. Outside of training `importance` and `sample_density` say how training saw these places."""
        outputs: dict[str, Any] = super().get_outputs(ray_bundle)
        if "depth" not in outputs:
            return outputs
        if self.training:
            self._rays = ray_bundle
            return outputs
        importance, density = self._error_grid.look_up(self._ends(ray_bundle, outputs["depth"]))
        return outputs | {"importance": importance[:, None], "sample_density": density[:, None]}

    @torch.no_grad()
    def _ends(self, rays: RayBundle, depth: Tensor) -> Tensor:
        """Return where rays end [rays, 3], in [0, 1]^3 as the field sees space."""
        positions = rays.origins + rays.directions * depth
        contraction = getattr(getattr(self, "field", None), "spatial_distortion", None)
        if contraction is not None:
            return (contraction(positions) + 2) / 4
        return SceneBox.get_normalized_positions(positions, self.scene_box.aabb.to(positions.device))

    @torch.no_grad()
    def importance(self, ray_bundle: RayBundle, batch: dict) -> Tensor:
        """Evaluate Q of some rays [rays] as training would, without changing its state.

        Args:
            ray_bundle: the rays.
            batch: what they should show, as a pixel sampler gives it.
        """
        state, was_training = self.get_extra_state(), self.training
        count = len(batch["indices"])
        mining = MiningBatch(batch["indices"], torch.ones(count), count, importance_weighted=False)
        try:
            self.train()
            with compat.fork_random_state(self.device):
                outputs = self(ray_bundle)
                self.get_loss_dict(outputs, {**batch, BATCH_KEY: mining}, self.get_metrics_dict(outputs, batch))
        finally:
            self.train(was_training)
            self.set_extra_state(state)
        assert mining.importance is not None
        return mining.importance

    def get_image_metrics_and_images(self, outputs: dict, batch: dict) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Compute the model's own metrics; LPIPS is left out where its weights are missing."""
        metrics, images = super().get_image_metrics_and_images(outputs, batch)
        if math.isnan(metrics.get("lpips", 0.0)):
            del metrics["lpips"]
        return metrics, images

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Return the model's own callbacks, after checking that the datamanager suits soft mining."""
        pipeline = training_callback_attributes.pipeline
        if pipeline is not None and not isinstance(pipeline.datamanager, SoftMiningDataManager):
            raise UserError(
                f"--pipeline.datamanager is a {type(pipeline.datamanager).__name__}, whose sampler cannot be updated "
                "from the loss (ParallelDataManager samples in another process). Use SoftMiningDataManagerConfig."
            )
        callbacks = super().get_training_callbacks(training_callback_attributes)
        trainer = training_callback_attributes.trainer
        if trainer is not None:
            watchers = [MetricsLog(trainer, self.rgb_loss), viewer.attach(trainer, self)]
            callbacks += [
                TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], watcher.update, 1)
                for watcher in watchers
                if watcher is not None
            ]
        return callbacks

    @property
    def _implementation(self) -> str:
        """Return the implementation whose parameters the model holds: nerfstudio falls back to torch by itself."""
        chosen = getattr(self.config, "implementation", "torch")
        return chosen if TCNN_EXISTS else "torch"

    def get_extra_state(self) -> dict:
        """Return what nerfstudio's checkpoints lack: the implementation, and the schedule of the proposal networks."""
        sampler = self._outer_sampler()
        state: dict[str, Any] = {"implementation": self._implementation, "error_grid": self._error_grid.sums.clone()}
        if isinstance(sampler, ProposalNetworkSampler):
            state |= {"step": sampler._step, "steps_since_update": sampler._steps_since_update}
        return state

    def set_extra_state(self, state: dict) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: if the checkpoint holds the parameters of the other implementation. nerfstudio would leave out
                what does not fit, and render noise.
        """
        saved = state.get("implementation", self._implementation)
        if saved != self._implementation:
            raise UserError(
                f"the checkpoint was trained with --pipeline.model.implementation {saved}, but {self._implementation} "
                f"runs here. {FIX_OF_IMPLEMENTATION[saved]}"
            )
        self._error_grid = ErrorGrid(state.get("error_grid"))
        sampler = self._outer_sampler()
        if isinstance(sampler, ProposalNetworkSampler) and "step" in state:
            sampler._step, sampler._steps_since_update = state["step"], state["steps_since_update"]

    def _attach_pixel_gradient(self, sampler: nn.Module, inputs: tuple, output: tuple) -> None:
        """Give the field's samples the gradient with respect to the pixel coordinates.

        The proposal networks do not see it, and so neither pay for it nor add to it. A camera optimizer's rotation of
        the rays is taken as the identity here, which it is up to some milliradians.
        """
        ray_bundle, ray_samples = inputs[0], output[0]
        assert isinstance(ray_bundle, RayBundle) and isinstance(ray_samples, RaySamples)
        for name, key in RAY_OFFSETS.items():
            offset = ray_bundle.metadata.get(key)
            if offset is not None:
                setattr(ray_samples.frustums, name, getattr(ray_samples.frustums, name) + offset[:, None])
        follows_positions = self.uses_position_gradient(ray_samples)
        for encoding in self._encodings:
            encoding.follows_positions = follows_positions

    def uses_position_gradient(self, ray_samples: RaySamples) -> bool:
        """Return whether anything uses the gradient of the field with respect to positions."""
        return True
