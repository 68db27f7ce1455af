"""The paper's sampler: a pool of Langevin chains, and a share of uniform rays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining import langevin
from nerfstudio_softmining.mining.langevin import Pool
from nerfstudio_softmining.sampling.feedback import BATCH_KEY, MiningBatch
from nerfstudio_softmining.sampling.pixels import CachedPixels, pixel

FLAG = "--pipeline.datamanager.pixel-sampler"


@dataclass
class LangevinPixelSamplerConfig(PixelSamplerConfig):
    """Soft mining by Langevin Monte Carlo (section 3.3)."""

    _target: type = field(default_factory=lambda: LangevinPixelSampler)
    """Target class to instantiate."""
    drift: float = 2e-6
    """Step size a of eq. 10 along the gradient of log Q, in squared image sides; 2e-6 is the 2e1 of the paper's
    NeRFs."""
    noise: float = 2e-2
    """Step size b of eq. 10: standard deviation of a random step, in image sides (geometric mean of height and
    width)."""
    uniform_share: float = 0.1
    """Share of each batch that is drawn uniformly over all images, in [0, 1] (section 4.1)."""
    reinit_share: float = 0.1
    """Share of the chains, those of the lowest Q, that start anew on an edge after each step, in [0, 1] (section
    4.1)."""

    def __post_init__(self) -> None:
        for name in ("drift", "noise"):
            value = getattr(self, name)
            if not value >= 0:
                raise UserError(f"{FLAG}.{name} is {value}: a step size is 0 or more. Set 0 to switch it off.")
        for name in ("uniform_share", "reinit_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"{FLAG}.{name.replace('_', '-')} is {value}: a share lies in [0, 1], such as 0.1.")
        if self.uniform_share + self.reinit_share > 1:
            raise UserError(
                f"{FLAG}.uniform-share ({self.uniform_share}) and {FLAG}.reinit-share ({self.reinit_share}) add up to "
                "more than 1. Lower one of them; the paper uses 0.1 and 0.1."
            )


class LangevinPixelSampler(PixelSampler):
    """Draws training rays by soft mining, and is told how they fared.

    The pool has an entry for every ray that is not drawn uniformly. It keeps its chains when the batch shrinks, and
    grows by uniform draws. Outside of training (an exporter asks for rays, say) it is nerfstudio's uniform sampler.

    Takes 1.125 bytes a training pixel for the edges; a step costs O(batch).

    Args:
        config: the settings.
        num_images: number of training images; given by the datamanager.
        kwargs: what nerfstudio passes to every pixel sampler.
    """

    config: LangevinPixelSamplerConfig

    def __init__(self, config: LangevinPixelSamplerConfig, num_images: int = 0, **kwargs) -> None:
        self.training = False
        self.num_images = num_images
        self.pool: Pool | None = None
        self._generator: torch.Generator | None = None
        self._image_batch: dict | None = None
        self._pixels: CachedPixels | None = None
        self._saved: dict | None = None
        super().__init__(config, **kwargs)

    def sample(self, image_batch: dict) -> dict:
        """Make the next ray batch, with its [MiningBatch][] while training."""
        if not self.training:
            return super().sample(image_batch)
        num_uniform = self._num_uniform()
        pixels = self._cache(image_batch)
        chains = self._grown_pool(pixels, self.num_rays_per_batch - num_uniform)
        rays = _concatenate(chains, pixels.uniform(num_uniform))
        index = pixels.index(rays)
        batch: dict = {key: value[index] for key, value in pixels.values.items()}
        batch["indices"] = torch.cat((rays.chart[:, None], pixel(rays)), dim=-1)
        batch[BATCH_KEY] = MiningBatch(batch["indices"], rays.density, pixels.image_gradient(rays), num_uniform)
        if self.config.keep_full_image:
            batch["full_image"] = image_batch["image"]
        return batch

    def update(self, feedback: MiningBatch, applied: Tensor | bool = True) -> None:
        """Move the chains that were in a batch, as the backward pass has left it.

        Args:
            feedback: what came with the batch, filled in by the datamanager, the model and the backward pass.
            applied: whether the optimizers took the step; if not, the pool stays as it is.
        """
        count = len(feedback.indices) - feedback.num_uniform
        if count == 0:
            return
        assert self.pool is not None and self._pixels is not None
        assert feedback.coords is not None and feedback.coords.grad is not None
        assert feedback.weighted_error is not None and feedback.weighted_error.grad is not None
        assert feedback.importance is not None
        device = self.pool.position.device
        gradient = langevin.grad_log_importance(
            feedback.coords.grad[:count], feedback.weighted_error.grad[:count], feedback.weighted_error.detach()[:count]
        )
        if self.config.drift == 0:
            gradient = torch.zeros_like(gradient)  # where there is no error the gradient is not finite
        chains = Pool(*(part[:count] for part in self.pool))
        side = self._pixels.side(chains)
        moved, _ = langevin.step(
            chains,
            gradient.to(device),
            feedback.importance[:count].to(device),
            self._pixels,
            drift=self.config.drift * side.square(),
            noise=self.config.noise * side,
            reinit_share=self.config.reinit_share,
            generator=self._generator,
        )
        if isinstance(applied, Tensor):
            moved = langevin.select(applied.to(device), moved, chains)
        elif not applied:
            moved = chains
        self.pool = _concatenate(moved, Pool(*(part[count:] for part in self.pool)))

    def state_dict(self) -> dict:
        """What a checkpoint keeps: the pool and the source of its randomness."""
        if self._saved is not None or self.pool is None or self._generator is None:
            return self._saved or {}
        return {"pool": self.pool._asdict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint at the next batch."""
        self._saved = state or None

    def _num_uniform(self) -> int:
        """How many rays of a batch are uniform."""
        share, rays = self.config.uniform_share, self.num_rays_per_batch
        uniform = round(share * rays)
        if (share > 0 and uniform == 0) or (share < 1 and uniform == rays):
            raise UserError(
                f"a batch of {rays} rays is too small for its strata: {FLAG}.uniform-share {share} makes {uniform} of "
                "them uniform. Set --pipeline.datamanager.train-num-rays-per-batch to "
                f"{math.ceil(0.5 / min(share, 1 - share)) + 1} or more."
            )
        return uniform

    def _cache(self, image_batch: dict) -> CachedPixels:
        """The flat view of the cached images, made anew when nerfstudio has cached others."""
        pixels = self._pixels
        if pixels is None or image_batch is not self._image_batch:
            pixels = self._view(image_batch)
            if self.pool is not None:
                self.pool = self._on(pixels, self.pool)
        if self._saved is not None:
            device = pixels.start.device
            self.pool = self._on(pixels, Pool(**{name: part.to(device) for name, part in self._saved["pool"].items()}))
            state = self._saved["generator"].cpu()
            assert self._generator is not None
            if len(state) == len(self._generator.get_state()):  # a checkpoint of another kind of device has another
                self._generator.set_state(state)
            self._saved = None
        self._image_batch, self._pixels = image_batch, pixels
        return pixels

    def _view(self, image_batch: dict) -> CachedPixels:
        """The flat view of an image batch."""
        if self._generator is None:
            # of its own, so that a model starts from the same weights whichever sampler feeds it
            device = next((image.device for image in image_batch["image"]), "cpu")
            self._generator = torch.Generator(device).manual_seed(torch.initial_seed() % 2**63)
        return CachedPixels(
            image_batch,
            self.num_images or int(image_batch["image_idx"].max()) + 1,
            use_mask=not self.config.ignore_mask,
            fisheye_crop_radius=self.config.fisheye_crop_radius,
            is_equirectangular=bool(self.config.is_equirectangular),
            generator=self._generator,
        )

    def _on(self, pixels: CachedPixels, pool: Pool) -> Pool:
        """The pool, with chains on images that are not cached started anew."""
        return langevin.select(pixels.contains(pool), pool, pixels.propose(len(pool.chart)))

    def _grown_pool(self, pixels: CachedPixels, count: int) -> Pool:
        """The first `count` chains, after the pool has grown to at least as many."""
        if self.pool is None:
            self.pool = pixels.uniform(count)
        missing = count - len(self.pool.chart)
        if missing > 0:
            self.pool = _concatenate(self.pool, pixels.uniform(missing))
        return Pool(*(part[:count] for part in self.pool))


def _concatenate(first: Pool, second: Pool) -> Pool:
    return Pool(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
