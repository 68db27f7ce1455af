"""Soft mining for any ray-based nerfstudio model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.model_components.ray_samplers import ProposalNetworkSampler, Sampler, VolumetricSampler
from nerfstudio.models.base_model import Model
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn

from nerfstudio_softmining.errors import UserError, naming_flags
from nerfstudio_softmining.plugin import checkpoints, compat, viewer
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

    The model must compute its reconstruction loss by `self.rgb_loss(truth, prediction)`, an `MSELoss` or `L1Loss`. It
    must draw the samples of its field by a nerfstudio ray sampler among its modules, the last one if there are several.
    Losses of other kinds are left as they are.
    """

    config: Any
    num_losses: ClassVar[int] = 1
    """How many reconstruction losses the model computes from a batch: 2 where it has a coarse and a fine stage."""

    def populate_modules(self) -> None:
        """Build the model."""
        with compat.lenient_metrics():
            super().populate_modules()
        self._outer_sampler().register_forward_hook(self._attach_pixel_gradient, with_kwargs=True)
        self.rgb_loss = self._weighted_loss()
        encodings, field = quicken(self), getattr(self, "field", None)
        if encodings:
            compat.warn_if_tcnn_is_missing()
        of_field = set() if field is None else set(field.modules())
        self._encodings: list[Any] = [encoding for encoding in encodings if encoding in of_field]
        """Encodings of the field, which runs after the proposal networks."""
        quicken_contractions(self)
        self._error_grid = ErrorGrid()
        self._rays: RayBundle | None = None
        self._has_pixel_gradient = False

    def _outer_sampler(self) -> Sampler:
        """Return the module that draws the samples of the field, or of its finest stage.

        Raises:
            UserError: if there is none.
        """
        samplers = [module for module in self.children() if isinstance(module, Sampler)]
        if not samplers:
            raise UserError(
                f"{type(self).__name__} cannot be soft mined: it has no ray sampler of nerfstudio among its modules. "
                "Methods that render whole images, such as Gaussian splatting, choose no rays. Methods that choose the "
                "samples of a ray themselves have to draw them by a nerfstudio Sampler (docs/own_method.md)."
            )
        return samplers[-1]

    def _weighted_loss(self) -> SoftMinedLoss:
        """Return the loss that takes the place of the model's own.

        Raises:
            UserError: if that is of another kind.
        """
        own = getattr(self, "rgb_loss", None)
        if own is None:
            raise UserError(
                f"{type(self).__name__} cannot be soft mined: it has no rgb_loss. Set self.rgb_loss = MSELoss() in "
                "populate_modules, and compute the reconstruction loss by self.rgb_loss(truth, prediction)."
            )
        if not isinstance(own, (nn.MSELoss, nn.L1Loss)) or own.reduction != "mean":
            raise UserError(
                f"{type(self).__name__} cannot be soft mined: its rgb_loss is {own!r}. Soft mining weights the error "
                "of each ray in an MSELoss or L1Loss. Losses of patches have no such error."
            )
        power = 2 if isinstance(own, nn.MSELoss) else 1
        return SoftMinedLoss(self.config.alpha, self.config.weight_by, power, self.num_losses)

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
            if mining is not None and self.rgb_loss.num_computed != self.num_losses:
                raise TypeError(
                    f"{type(self).__name__} computes rgb_loss {self.rgb_loss.num_computed} times from a batch, and its "
                    f"num_losses is {self.num_losses}. Set that class attribute to the number."
                )
        finally:
            self.rgb_loss.batch = None
        rays, self._rays = self._rays, None
        if (
            rays is not None
            and mining is not None
            and mining.importance is not None
            and mining.step % STEPS_PER_GRID == 0
        ):
            self._error_grid.add(self._ends(rays, outputs), mining.importance.detach())
        return losses

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride] # as in nerfstudio
        """Render rays. Outside of training `importance` and `sample_density` say how training saw these places."""
        schedule = {} if self.training else self._proposal_schedule()
        outputs: dict[str, Any] = super().get_outputs(ray_bundle)
        if schedule:  # nerfstudio counts a render as a step in which the proposal networks learnt
            self._set_proposal_schedule(schedule)
        if not outputs.keys() & {"depth", "depth_fine"}:
            return outputs
        if self.training:
            self._rays = ray_bundle
            return outputs
        importance, density = self._error_grid.look_up(self._ends(ray_bundle, outputs))
        return outputs | {"importance": importance[:, None], "sample_density": density[:, None]}

    def ray_length(self, outputs: dict[str, Any]) -> Tensor:
        """Return how far along each ray what it shows is [rays, 1], from the outputs of the model."""
        return outputs["depth_fine" if "depth_fine" in outputs else "depth"]

    @torch.no_grad()
    def _ends(self, rays: RayBundle, outputs: dict[str, Any]) -> Tensor:
        """Return where rays end [rays, 3], in [0, 1]^3 as the field sees space."""
        positions = rays.origins + rays.directions * self.ray_length(outputs)
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
        # NaN of a single tiny image stays, as nerfstudio's mean over images needs the same metrics of each
        if compat.Lpips.is_missing:
            metrics = {name: value for name, value in metrics.items() if "lpips" not in name}
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
        return "tcnn" if any(type(module).__module__.startswith("tinycudann") for module in self.modules()) else "torch"

    def get_extra_state(self) -> dict:
        """Return what nerfstudio's checkpoints lack: the implementation, and the schedule of the proposal networks."""
        state = {"implementation": self._implementation, "error_grid": self._error_grid.sums.clone()}
        return state | self._proposal_schedule()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the parameters of a checkpoint. Those of single images start anew where the data set has others.

        Raises:
            UserError: if the checkpoint is of another model.
        """
        fitted, anew = checkpoints.fitted_parameters(self, state_dict, self.num_train_data)
        if anew and strict:  # nerfstudio tries once more where the checkpoint lacks something else
            CONSOLE.print(
                f"[yellow]The checkpoint does not fit {self.num_train_data} training images. What belongs to single "
                f"images starts anew: {', '.join(anew)}.[/yellow]"
            )
        return super().load_state_dict(fitted, strict, assign)

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
        self._set_proposal_schedule(state)

    def _proposal_schedule(self) -> dict[str, int]:
        """Return the step, and how long ago the proposal networks learnt; nothing where there are none."""
        sampler = self._outer_sampler()
        if not isinstance(sampler, ProposalNetworkSampler):
            return {}
        return {"step": sampler._step, "steps_since_update": sampler._steps_since_update}

    def _set_proposal_schedule(self, state: dict[str, Any]) -> None:
        sampler = self._outer_sampler()
        if isinstance(sampler, ProposalNetworkSampler) and "step" in state:
            sampler._step, sampler._steps_since_update = state["step"], state["steps_since_update"]

    def _attach_pixel_gradient(self, sampler: nn.Module, inputs: tuple, keywords: dict[str, Any], output: Any) -> None:
        """Give the field's samples the gradient with respect to the pixel coordinates.

        The proposal networks do not see it, and so neither pay for it nor add to it. A camera optimizer's rotation of
        the rays is taken as the identity here, which it is up to some milliradians.
        """
        ray_bundle = inputs[0] if inputs else keywords["ray_bundle"]
        ray_samples, *others = output if isinstance(output, tuple) else (output,)
        assert isinstance(ray_bundle, RayBundle) and isinstance(ray_samples, RaySamples)
        # samples of an occupancy grid are packed in one dimension, beside the ray of each
        ray = others[0] if isinstance(sampler, VolumetricSampler) else None
        self._has_pixel_gradient = not ray_bundle.metadata.keys().isdisjoint(RAY_OFFSETS.values())
        with torch.enable_grad():  # which some models switch off around their sampler
            for name, key in RAY_OFFSETS.items():
                offset = ray_bundle.metadata.get(key)
                if offset is not None:
                    offset = offset[:, None] if ray is None else offset[ray]
                    setattr(ray_samples.frustums, name, getattr(ray_samples.frustums, name) + offset)
        follows_positions = self.uses_position_gradient(ray_samples)
        for encoding in self._encodings:
            encoding.follows_positions = follows_positions

    def uses_position_gradient(self, ray_samples: RaySamples) -> bool:
        """Return whether anything uses the gradient of the field with respect to positions."""
        return True
