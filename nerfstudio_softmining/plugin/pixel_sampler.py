"""The pixel sampler: nerfstudio's side of every sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.errors import UserError, naming_flags
from nerfstudio_softmining.plugin.distributed import share
from nerfstudio_softmining.samplers.base import MiningBatch, Sampler, SamplerConfig, SamplerContext
from nerfstudio_softmining.samplers.images import TrainingImages, capped_radius, to_colours
from nerfstudio_softmining.samplers.registry import samplers
from nerfstudio_softmining.samplers.state import SamplerRun
from nerfstudio_softmining.settings import Positive, PositiveCount, check

BATCH_KEY = "mining"
"""Key of the [MiningBatch][] in nerfstudio's ray batch."""
UNEVEN_RAYS = 4
"""Rays that nerfstudio's uniform sampler may draw from one image beyond an equal part of the batch."""
MANAGER_FLAG = "--pipeline.datamanager"
FLAG = f"{MANAGER_FLAG}.pixel-sampler"
SPECS = samplers(scenes=True)
"""All samplers that scenes can be trained with, by name."""

if TYPE_CHECKING:
    Kind = str

    class _SamplerGroups:
        pass

else:
    Kind = Literal[tuple(SPECS)]
    _SamplerGroups = make_dataclass(
        "_SamplerGroups",
        [(spec.field, spec.config, field(default_factory=spec.config)) for spec in SPECS.values()],
        namespace={"__module__": __name__},
    )
    _SamplerGroups.__doc__ = "The settings of each sampler, in a group of its name."

KIND_HELP = "\n".join(("How pixels are chosen.", *(f"{name}: {spec.summary}" for name, spec in SPECS.items())))


@dataclass
class MiningPixelSamplerConfig(_SamplerGroups, PixelSamplerConfig):
    """Which pixels to train on; the settings of each kind are in a group of its name."""

    _target: type = field(default_factory=lambda: MiningPixelSampler)
    """Target class to instantiate."""
    kind: Annotated[Kind, tyro.conf.arg(help=KIND_HELP)] = "mixture"
    """Name of the sampler."""
    num_rays_per_batch: PositiveCount = 4096
    """Number of rays of a batch; a datamanager sets it."""
    fisheye_crop_radius: Positive | None = None
    """Radius in pixels around the centre of fisheye images outside of which nothing is drawn; None draws anywhere."""
    cell_size: PositiveCount = 2
    """Side in pixels of the cells that maps of edges, contrast and errors are kept in."""
    map_memory: Positive = 2.0
    """Memory in gigabytes that such a map may take; its cells become larger until it fits."""

    def __post_init__(self) -> None:
        with naming_flags(self.flag):
            check(self)
        for kind in SPECS:
            with naming_flags(lambda name, kind=kind: self.flag(f"{kind}.{name}")):
                check(self.config_for(kind))

    def config_for(self, kind: str) -> Any:
        """Return the settings of one sampler."""
        return getattr(self, SPECS[kind].field)

    @staticmethod
    def flag(name: str) -> str:
        """Return the command-line flag of a field, where a dot separates it from its group."""
        return f"{FLAG}.{name.replace('_', '-')}"


class MiningPixelSampler(PixelSampler):
    """Draws training rays by one of several samplers, and updates its state after each step.

    Outside of training (an exporter asks for rays, say) it is nerfstudio's uniform sampler, or draws uniformly itself
    where that would fail: nerfstudio 1.1.5 cannot draw more rays than there are valid pixels.

    Args:
        config: the settings.
        num_images: number of training images; by default as many as the first cache shows.
        importance: gives Q of any pixels [n, 3] (image, row, column) with the model as it is.
        background: colour [3] that RGBA images are blended with; None keeps their alpha.
        kwargs: what nerfstudio passes to every pixel sampler.
    """

    config: MiningPixelSamplerConfig  # pyright: ignore[reportIncompatibleVariableOverride] # as in nerfstudio
    sampler_class: type[Sampler] | None = None
    """Takes the place of the sampler that `kind` names, in a subclass."""

    def __init__(
        self,
        config: MiningPixelSamplerConfig,
        num_images: int | None = None,
        importance: Callable[[Tensor], Tensor] | None = None,
        background: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        self.training = False
        self._num_images, self._importance, self._background = num_images, importance, background
        self._sampler_class = self.sampler_class or SPECS[config.kind].sampler
        self._generator: torch.Generator | None = None
        self._image_batch: dict | None = None
        self._run: SamplerRun | None = None
        self._saved: dict | None = None
        self._checked_batch: dict | None = None
        self._own_images: TrainingImages | None = None
        self._most_rays = math.inf
        self.draws_uniformly = False
        """Whether the sampler is switched off for now, and all rays are uniform and weigh the same."""
        # without metadata nerfstudio passes None, which would replace the setting
        super().__init__(config, **{name: value for name, value in kwargs.items() if value is not None})
        self._num_shared = self.num_rays_per_batch

    @property
    def run(self) -> SamplerRun | None:
        """The sampler and its state; None before the first batch, and where nerfstudio draws."""
        return self._run

    def sample(self, image_batch: dict) -> dict:
        """Make the next ray batch, with its [MiningBatch][] while training."""
        if not self.training:
            return self._sample_uniformly(image_batch)
        if self._sampler_class.is_uniform or self.draws_uniformly:
            return self._uniform_mining_batch(image_batch)
        with naming_flags(self._flag):
            run = self._run_on(image_batch)
            samples = run.draw(self.num_rays_per_batch)
        images = run.sampler.images
        batch: dict = {key: images.lookup(key, samples.pixels) for key in images.values}
        gradient = images.image_gradient(samples.pixels) if run.sampler.needs_gradient else None
        batch[BATCH_KEY] = run.batch(samples, image_gradient=gradient)
        batch["indices"] = batch[BATCH_KEY].indices
        if self.config.keep_full_image:
            batch["full_image"] = image_batch["image"]
        return batch

    def _sample_uniformly(self, image_batch: dict) -> dict:
        """Draw by nerfstudio's own sampler, or uniformly over the valid pixels where that would fail."""
        if image_batch is not self._checked_batch:
            self._checked_batch, self._own_images = image_batch, None
            self._most_rays = self._most_rays_of(image_batch)
        is_odd_list = isinstance(image_batch["image"], list) and self.num_rays_per_batch % 2 == 1
        if is_odd_list or self.num_rays_per_batch > self._most_rays:
            return self._sample_valid_pixels(image_batch)
        if isinstance(image_batch["image"], list) and "mask" in image_batch:
            self.config.rejection_sample_mask = False  # fails in nerfstudio 1.1.5 for images that differ in size
        images = image_batch["image"]
        if isinstance(images, Tensor):
            # nerfstudio draws in the circle until all rays are on their image, which a large one would take for ever
            size = (images.shape[1], images.shape[2])
            self.config.fisheye_crop_radius = capped_radius(self.config.fisheye_crop_radius, [size])
        batch = super().sample(image_batch)
        if self._background is not None:
            self._background = self._background.to(batch["image"].device)
        batch["image"] = to_colours(batch["image"], self._background)
        return batch

    def _most_rays_of(self, image_batch: dict) -> float:
        """Return how many rays nerfstudio's own sampler can draw from a cache. Synchronizes with the device.

        It draws from the valid pixels without replacement: from each image's where images differ in size.
        """
        images, masks = image_batch["image"], image_batch.get("mask")
        if masks is None or self.config.ignore_mask:
            return math.inf
        if isinstance(images, list):
            fewest = int(torch.stack([mask.count_nonzero() for mask in masks]).min())
            return (fewest - UNEVEN_RAYS) * len(images)
        return 0 if 1 in masks.shape[:3] else int(masks.count_nonzero())  # it squeezes the mask

    def _sample_valid_pixels(self, image_batch: dict) -> dict:
        """Draw uniformly over the valid pixels of all images, with replacement."""
        if self._own_images is None:
            self._num_images = self._num_images or int(image_batch["image_idx"].max()) + 1
            with naming_flags(self._flag):
                known = self._run if image_batch is self._image_batch else None
                self._own_images = self._view(image_batch) if known is None else known.sampler.images
        images = self._own_images
        samples = images.uniform(self.num_rays_per_batch)
        batch = {key: images.lookup(key, samples) for key in images.values} | {"indices": samples.indices}
        return batch | ({"full_image": image_batch["image"]} if self.config.keep_full_image else {})

    def _uniform_mining_batch(self, image_batch: dict) -> dict:
        batch, config = self._sample_uniformly(image_batch), self._config
        count = len(batch["indices"])
        batch[BATCH_KEY] = MiningBatch(
            batch["indices"],
            torch.ones(count, device=batch["indices"].device),
            count,
            importance_weighted=config.importance_weighted and not self.draws_uniformly,
            alpha_warmup=config.alpha_warmup,
            drawn_by_sampler=False,
        )
        return batch

    def batch_at(self, indices: Tensor) -> dict:
        """Make the ray batch of given pixels [rays, 3] (image, row, column), without a [MiningBatch][]."""
        assert self._run is not None
        images = self._run.sampler.images
        samples = images.as_samples(indices[:, 0], indices[:, 1:] + 0.5)
        return {"indices": indices, **{key: images.lookup(key, samples) for key in images.values}}

    def update(self, batch: MiningBatch, applied: Tensor | bool = True) -> None:
        """Update the sampler from a batch after `backward()`.

        Args:
            batch: what came with the rays, filled in by the datamanager, the model and the backward pass.
            applied: False where the optimizer skipped the step. Chains and maps then stay as they are.
        """
        if self._run is not None and batch.drawn_by_sampler:
            applied = applied.to(batch.density_ratio.device) if isinstance(applied, Tensor) else applied
            batch.shared = share(batch, self._num_shared, self._run.sampler.images)
            self._run.update(batch, applied)

    def live_settings(self) -> dict[str, Any]:
        """Return the settings of the sampler that [change][] can change, and their values."""
        config = self._config
        return {name: getattr(config, name) for name in self._sampler_class.live_settings if hasattr(config, name)}

    def change(self, name: str, value: Any) -> None:
        """Change a live setting of the sampler from the next batch on.

        Raises:
            UserError: if the value cannot be used. The setting then stays as it was.
        """
        config, before = self._config, getattr(self._config, name)
        setattr(config, name, value)
        try:
            with naming_flags(self._flag):
                check(config)
                if self._run is not None:
                    self._run.sampler.check_settings(self.num_rays_per_batch)
        except UserError:
            setattr(config, name, before)
            raise

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps: the sampler's state and the source of its randomness."""
        if self._saved is not None or self._run is None or self._generator is None:
            return self._saved or {}
        return {
            "kind": self.config.kind,
            "num_images": self._num_images,
            "run": self._run.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint at the next batch. Start anew, with a warning, where it is of something else."""
        self._saved = state or None
        reason = None
        if state and state["kind"] != self.config.kind:
            reason = f"of {FLAG}.kind {state['kind']}"
        elif state and self._num_images not in (None, state["num_images"]):
            reason = f"of {state['num_images']} training images, and there are {self._num_images}"
        if reason is not None:
            CONSOLE.print(f"[yellow]The checkpoint is {reason}: the sampler {self.config.kind} starts anew.[/yellow]")
            self._saved = None

    @property
    def _config(self) -> SamplerConfig:
        return self.config.config_for(self.config.kind)

    def _flag(self, name: str) -> str:
        """Return the flag of a field that the sampler has named."""
        if name == "num_rays":
            return f"{MANAGER_FLAG}.train-num-rays-per-batch"
        return self.config.flag(name if hasattr(self.config, name) else f"{self.config.kind}.{name}")

    def _run_on(self, image_batch: dict) -> SamplerRun:
        """Return the sampler on an image batch, made anew when nerfstudio has cached other images."""
        saved, self._saved = self._saved, None
        if self._run is None or self._generator is None:
            self._num_images = self._num_images or int(image_batch["image_idx"].max()) + 1
            # of its own, so that a model starts from the same weights whichever sampler feeds it
            device = next((image.device for image in image_batch["image"]), "cpu")
            self._generator = torch.Generator(device).manual_seed(torch.initial_seed() % 2**63)
            context = SamplerContext(
                self._num_images, self._generator, self.config.cell_size, self.config.map_memory, self._importance
            )
            images = self._view(image_batch, self._generator)
            self._run = SamplerRun(self._sampler_class, self._config, context, images)
        elif image_batch is not self._image_batch:
            self._run.replace_images(self._view(image_batch, self._generator))
        self._image_batch = image_batch
        if saved is not None:
            self._run.load_state_dict(saved["run"])
            state = saved["generator"].cpu()
            if len(state) == len(self._generator.get_state()):  # a checkpoint of another kind of device has another
                self._generator.set_state(state)
        return self._run

    def _view(self, image_batch: dict, generator: torch.Generator | None = None) -> TrainingImages:
        assert self._num_images is not None
        return TrainingImages(
            image_batch,
            self._num_images,
            use_mask=not self.config.ignore_mask,
            fisheye_crop_radius=self.config.fisheye_crop_radius,
            is_equirectangular=bool(self.config.is_equirectangular),
            background=self._background,
            generator=generator,
        )
