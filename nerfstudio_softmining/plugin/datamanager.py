"""The datamanager: rays whose pixel coordinates have a gradient, and a sampler that is updated after each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, cast, get_args

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import TDataset, VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader, RandIndicesEvalDataloader
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.model_components.ray_generators import RayGenerator
from nerfstudio.utils import comms
from nerfstudio.utils.misc import get_orig_class, step_check
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.utils.data import Dataset

from nerfstudio_softmining.errors import SettingError, UserError, naming_flags
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.cameras import check_cameras, describe_bad_frames
from nerfstudio_softmining.plugin.dataset import ByteImages, ImageCache, NamesBrokenFiles, bytes_per_pixel
from nerfstudio_softmining.plugin.distributed import gather
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY, MiningPixelSampler, MiningPixelSamplerConfig
from nerfstudio_softmining.plugin.rays import MiningRayGenerator
from nerfstudio_softmining.samplers.base import MiningBatch
from nerfstudio_softmining.settings import LARGEST_COUNT, Interval, PositiveCount, check

UNPARSED = (OSError, LookupError, AssertionError, ValueError, ArithmeticError, RuntimeError, TypeError, AttributeError)
"""What dataparsers raise for a scene that they cannot read."""
CountOrAll = Annotated[int, Interval(-1, LARGEST_COUNT)]
"""A whole number, or -1 for all or for never."""
IMAGE_MEMORY = 0.7
"""Fraction of a GPU's free memory that images may take."""


@dataclass
class SoftMiningDataManagerConfig(VanillaDataManagerConfig):
    """Settings of a datamanager whose pixel sampler is updated from the loss."""

    _target: type = field(default_factory=lambda: SoftMiningDataManager)
    """Target class to instantiate."""
    images_on_gpu: bool = True
    """Keep the training images and masks on the device. If False, each step waits for pixels from the host."""
    masks_on_gpu: bool = True
    """Has no effect: masks are kept where the images are."""
    train_num_rays_per_batch: PositiveCount = 1024
    """Number of rays of a training step."""
    eval_num_rays_per_batch: PositiveCount = 1024
    """Number of rays of a step of evaluation."""
    train_num_images_to_sample_from: CountOrAll = -1
    """Number of training images that are cached at a time; -1 is all of them."""
    eval_num_images_to_sample_from: CountOrAll = -1
    """Number of held-out images that are cached at a time; -1 is all of them."""
    train_num_times_to_repeat_images: CountOrAll = -1
    """Training steps after which other images are cached, where not all are; -1 is never."""
    eval_num_times_to_repeat_images: CountOrAll = -1
    """Evaluations after which other images are cached, where not all are; -1 is never."""
    camera_res_scale_factor: Annotated[float, Interval(0, 16, excludes_low=True)] = 1.0
    """Factor on the resolution of the images and their cameras."""
    patch_size: Annotated[int, Interval(1, 1)] = 1
    """Has to be 1: soft mining chooses single pixels."""
    pixel_sampler: PixelSamplerConfig = field(default_factory=MiningPixelSamplerConfig)
    """How training pixels are chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        with naming_flags(lambda name: f"--pipeline.datamanager.{name.replace('_', '-')}"):
            if self.patch_size != 1:
                raise SettingError(
                    "patch_size",
                    self.patch_size,
                    "soft mining chooses single pixels, patches cannot follow the error. Set it to 1.",
                )
            for name in ("train_num_images_to_sample_from", "eval_num_images_to_sample_from"):
                if getattr(self, name) == 0:
                    raise SettingError(name, 0, "it must be at least 1, or -1 for all images.")
            check(self)


class SoftMiningDataManager(VanillaDataManager[TDataset]):
    """Owns the pixels and rays of training, and keeps the state of its sampler in checkpoints.

    As with nerfstudio's own, `SoftMiningDataManager[DepthDataset]` is one with another data set.

    Images are cached as bytes, 3 or 4 a pixel. They are loaded when training begins or a first batch is drawn, so that
    commands that only evaluate or render do not load them. Images of evaluation stay on the host.

    Args:
        config: the settings.
        device: where training runs.
        args, kwargs: as nerfstudio's pipelines give them.
    """

    config: SoftMiningDataManagerConfig  # pyright: ignore[reportIncompatibleVariableOverride] # as in nerfstudio

    def __init__(
        self, config: SoftMiningDataManagerConfig, device: torch.device | str = "cpu", *args: Any, **kwargs: Any
    ) -> None:
        compat.prepare(device)
        self._mining_batch: MiningBatch | None = None
        self.last_batch: MiningBatch | None = None
        """The batch of the last step, as the model and the backward pass have filled it in."""
        self._loss_scale: Tensor | None = None
        self._random_state: dict | None = None
        self._starts_apart = False
        self._other_states: list[dict] = []
        """What the other processes have in the checkpoint of the last step."""
        try:
            super().__init__(config, device, *args, **kwargs)
        except UserError:
            raise
        except UNPARSED as error:
            if hasattr(self, "exclude_batch_keys_from_device"):  # set once both splits are parsed
                raise
            spoilt = describe_bad_frames(self.config.data) if self.config.data else None
            if spoilt is not None:
                raise UserError(spoilt) from error
            if isinstance(error, ZeroDivisionError):
                raise UserError(
                    f"the cameras of {self.config.data} are all at the same place, and cannot be scaled to a size of "
                    "1. Set `nerfstudio-data --auto-scale-poses False` after all other flags."
                ) from error
            raise UserError(
                f"{type(self.dataparser).__name__} finds no scene with images at {self.config.data} ({error!r}). Check "
                "--data, and name another dataparser after all other flags if the scene has another format."
            ) from error
        assert self.config.data is not None  # the dataparser's own if --data is not given
        for dataset in (self.train_dataset, self.eval_dataset):
            check_cameras(dataset._dataparser_outputs, self.config.data)

    @cached_property
    def dataset_type(self) -> type[TDataset]:
        """The class of the data set."""
        given = get_args(get_orig_class(self))
        return NamesBrokenFiles.mixed_into(given[0] if given else InputDataset)  # pyright: ignore[reportReturnType]

    def setup_train(self) -> None:
        """Set up what training needs, but for the images."""
        for dataset in (self.train_dataset, self.eval_dataset):
            compat.allow_camera_export(dataset)
        self.train_pixel_sampler = self._get_pixel_sampler(self.train_dataset, self.config.train_num_rays_per_batch)
        self.train_ray_generator = MiningRayGenerator(self.train_dataset.cameras.to(self.device))

    def setup_eval(self) -> None:
        """Set up what evaluation needs, but for the images."""
        self.eval_pixel_sampler = self._get_pixel_sampler(self.eval_dataset, self.config.eval_num_rays_per_batch)
        self.eval_ray_generator = RayGenerator(self.eval_dataset.cameras.to(self.device))
        self.fixed_indices_eval_dataloader = FixedIndicesEvalDataloader(self.eval_dataset, device=self.device)
        self.eval_dataloader = RandIndicesEvalDataloader(self.eval_dataset, device=self.device)

    @cached_property
    def iter_train_image_dataloader(self) -> Iterator[Any]:
        """The cached training images, on the device if `images_on_gpu`. Loaded at the first use."""
        config, dataset = self.config, cast(NamesBrokenFiles, self.train_dataset)
        self._check_images(dataset)
        # masks are needed where pixels are drawn, which is where the images are
        on_device = config.images_on_gpu and self._images_fit_on_device()
        on_host = [] if on_device else dataset.pixel_keys
        self.train_image_dataloader = self._cache(
            dataset, config.train_num_images_to_sample_from, config.train_num_times_to_repeat_images, on_host
        )
        return iter(self.train_image_dataloader)

    def _images_fit_on_device(self) -> bool:
        """Return whether the cached training images leave a GPU enough memory to train in; say so if they do not."""
        device, dataset = torch.device(self.device), self.train_dataset
        if device.type != "cuda":
            return True
        wanted, cameras = self.config.train_num_images_to_sample_from, dataset.cameras
        fraction = 1.0 if wanted == -1 else min(1.0, wanted / len(dataset))
        # nerfstudio loads the next images while the sampler still has the last ones
        copies = 2 if fraction < 1 and self.config.train_num_times_to_repeat_images != -1 else 1
        pixels = float((cameras.height * cameras.width).sum())
        needed = copies * fraction * pixels * bytes_per_pixel(self._as_cached(dataset)[0])
        free, _ = torch.cuda.mem_get_info(device)
        if needed <= IMAGE_MEMORY * free:
            return True
        CONSOLE.print(
            f"[yellow]The training images take {needed / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} GB free. They "
            "stay on the host, and each step waits for its pixels. To avoid that, train on some images at a time: set "
            "--pipeline.datamanager.train-num-images-to-sample-from and "
            "--pipeline.datamanager.train-num-times-to-repeat-images.[/yellow]"
        )
        return False

    @cached_property
    def iter_eval_image_dataloader(self) -> Iterator[Any]:
        """The cached images of evaluation, on the host. Loaded at the first use."""
        config, dataset = self.config, self.eval_dataset
        self._check_images(dataset)
        self.eval_image_dataloader = self._cache(
            dataset,
            config.eval_num_images_to_sample_from,
            config.eval_num_times_to_repeat_images,
            dataset.exclude_batch_keys_from_device,
        )
        return iter(self.eval_image_dataloader)

    def _check_images(self, dataset: InputDataset) -> None:
        """Check that a split has images, and these have pixels."""
        if len(dataset) == 0:
            split = "training" if dataset is self.train_dataset else "held-out"
            raise UserError(
                f"the scene at {self.config.data} has 0 {split} images. Add some, or change how the dataparser splits "
                "them, such as `nerfstudio-data --eval-mode interval` after all other flags; `all` for a single image."
            )
        if min(dataset.cameras.height.min(), dataset.cameras.width.min()) < 1:
            raise UserError(
                f"--pipeline.datamanager.camera-res-scale-factor is {self.config.camera_res_scale_factor}, which "
                "leaves images without pixels. Set it closer to 1."
            )

    def _cache(self, dataset: InputDataset, num_images: int, num_repeats: int, on_host: list[str]) -> ImageCache:
        return ImageCache(
            self._as_cached(dataset),
            num_images_to_sample_from=num_images,
            num_times_to_repeat_images=num_repeats,
            device=self.device,
            collate_fn=self.config.collate_fn,
            exclude_batch_keys_from_device=on_host,
            num_workers=self.world_size * 4,
        )

    def _as_cached(self, dataset: InputDataset) -> Dataset:
        """Return the data set whose items the cache keeps."""
        sampler = self.config.pixel_sampler
        # what nerfstudio computes from whole images needs them in float32
        as_bytes = isinstance(sampler, MiningPixelSamplerConfig) and not (sampler.keep_full_image or dataset.mask_color)
        return ByteImages(dataset) if as_bytes else dataset

    def _get_pixel_sampler(self, dataset: InputDataset, num_rays_per_batch: int) -> PixelSampler:
        sampler = super()._get_pixel_sampler(dataset, num_rays_per_batch)  # pyright: ignore[reportArgumentType]
        if isinstance(sampler, MiningPixelSampler):
            background = dataset._dataparser_outputs.alpha_color
            return type(sampler)(sampler.config, len(dataset), self._importance, background, **sampler.kwargs)
        return sampler

    def next_train(self, step: int) -> tuple[RayBundle, dict]:
        """Make the next training batch: rays, and the pixels they should show."""
        # nerfstudio's trainer asks within autocast, but ray generation fails in half precision for some cameras
        with compat.no_autocast(self.device):
            return self._next_train(step)

    def _next_train(self, step: int) -> tuple[RayBundle, dict]:
        sampler = self.train_pixel_sampler
        if not isinstance(sampler, MiningPixelSampler):
            return super().next_train(step)
        sampler.training = self.training
        if not self.training:
            return super().next_train(step)
        self._resume_randomness(step)
        self.train_count += 1
        image_batch = next(self.iter_train_image_dataloader)
        assert isinstance(image_batch, dict)
        batch = sampler.sample(image_batch)
        mining = batch[BATCH_KEY]
        mining.step = step
        if mining.image_gradient is None:
            rays = self.train_ray_generator.mined(mining.indices)
        else:
            rays, mining.coords = self.train_ray_generator.differentiable(mining.indices)
            batch["image"] = _moving_with(mining.coords, batch["image"], mining.image_gradient)
        self._mining_batch = mining
        return rays, batch

    def _resume_randomness(self, step: int) -> None:
        """Go on from the randomness of a checkpoint, once."""
        if self._random_state is not None:
            compat.set_random_state(self._random_state)
            self._random_state = None
        if self._starts_apart:
            compat.seed_everything(torch.initial_seed() + step)
            self._starts_apart = False

    def _importance(self, indices: Tensor) -> Tensor:
        """Evaluate Q of given pixels [rays, 3] with the model as it is."""
        parts = indices.split(self._chunk_size)
        return torch.cat([self._model_importance(*self.rays_at(part)) for part in parts])

    def rays_at(self, indices: Tensor) -> tuple[RayBundle, dict]:
        """Return the rays of given pixels [rays, 3], and what they should show."""
        assert isinstance(self.train_pixel_sampler, MiningPixelSampler)
        return self.train_ray_generator.mined(indices), self.train_pixel_sampler.batch_at(indices)

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Load the images, and update the sampler after each step."""
        _ = self.iter_train_image_dataloader
        if self.test_mode == "val" and len(self.eval_dataset) > 0:  # ns-train, which evaluates batches as well
            _ = self.iter_eval_image_dataloader
        scaler = training_callback_attributes.grad_scaler
        self._loss_scale = compat.loss_scale(scaler)
        sampler, pipeline = self.train_pixel_sampler, training_callback_attributes.pipeline
        if pipeline is not None:
            model: Any = pipeline.model  # a SoftMiningMixin, which the mixin itself makes sure of
            # not the model itself, which torch would save as a part of the datamanager
            self._model_importance, self._chunk_size = model.importance, model.config.eval_num_rays_per_chunk

        def update_sampler(step: int) -> None:
            before, self._loss_scale = self._loss_scale, compat.loss_scale(scaler)
            mining = self.last_batch = self._mining_batch
            self._mining_batch = None
            if mining is None or not isinstance(sampler, MiningPixelSampler):
                return
            # the scaler lowers its scale when, and only when, it made the optimizers skip the step
            applied = True if before is None or self._loss_scale is None else self._loss_scale >= before
            sampler.update(mining, applied)

        trainer = training_callback_attributes.trainer
        last = -1 if trainer is None else trainer._start_step + trainer.config.max_num_iterations - 1

        def collect_states(step: int) -> None:
            is_saved = trainer is not None and (step == last or step_check(step, trainer.config.steps_per_save))
            is_shared = is_saved and self.world_size > 1
            self._other_states = gather(self._own_state(), self.device)[1:] if is_shared else []

        return [
            *super().get_training_callbacks(training_callback_attributes),
            # before models draw anything, such as cells of an occupancy grid to look at
            TrainingCallback(
                [TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], self._resume_randomness, update_every_num_iters=1
            ),
            TrainingCallback(
                [TrainingCallbackLocation.AFTER_TRAIN_ITERATION], update_sampler, update_every_num_iters=1
            ),
            TrainingCallback(
                [TrainingCallbackLocation.AFTER_TRAIN_ITERATION], collect_states, update_every_num_iters=1
            ),
        ]

    def _own_state(self) -> dict:
        sampler = self.train_pixel_sampler
        return {
            "sampler": sampler.state_dict() if isinstance(sampler, MiningPixelSampler) else {},
            "random": compat.random_state(),
        }

    def get_extra_state(self) -> dict:
        """Return the sampler's state and the sources of randomness, which nerfstudio's checkpoints do not hold."""
        return self._own_state() | {"others": self._other_states}

    def set_extra_state(self, state: dict) -> None:
        """Continue from a checkpoint at the next training step.

        Each process goes on from its own sampler and randomness. More processes than the checkpoint has start with a
        sampler and a random stream of their own, as they would train on the same rays otherwise.
        """
        states = [state, *state.get("others", [])]
        if comms.get_rank() >= len(states):
            self._starts_apart = True
            return
        state = states[comms.get_rank()]
        self._random_state = state["random"]
        if isinstance(self.train_pixel_sampler, MiningPixelSampler):
            self.train_pixel_sampler.load_state_dict(state["sampler"])


def _moving_with(coords: Tensor, colours: Tensor, gradient: Tensor) -> Tensor:
    """Return the same colours [rays, channels], whose gradient along the coordinates is [rays, channels, 2]."""
    offset = (coords - coords.detach()).to(colours.device)
    return colours + (gradient * offset[:, None]).sum(dim=-1)
