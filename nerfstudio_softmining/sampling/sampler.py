"""The pixel sampler: nerfstudio's side of every way of choosing pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.sampling.detail import DetailConfig, DetailStrategy
from nerfstudio_softmining.sampling.edge import EdgeConfig, EdgeStrategy
from nerfstudio_softmining.sampling.error_map import ErrorMapConfig, ErrorMapStrategy
from nerfstudio_softmining.sampling.feedback import BATCH_KEY, MiningBatch
from nerfstudio_softmining.sampling.langevin import LangevinConfig, LangevinStrategy
from nerfstudio_softmining.sampling.multinomial import MultinomialConfig, MultinomialStrategy
from nerfstudio_softmining.sampling.pixels import CachedPixels
from nerfstudio_softmining.sampling.quadtree import QuadtreeConfig, QuadtreeStrategy
from nerfstudio_softmining.sampling.strategy import FLAG, Strategy, Surroundings, indices_of

Kind = Literal["detail", "langevin", "uniform", "edge", "multinomial", "error-map", "quadtree"]
STRATEGIES: dict[str, type[Strategy]] = {
    "detail": DetailStrategy,
    "langevin": LangevinStrategy,
    "edge": EdgeStrategy,
    "multinomial": MultinomialStrategy,
    "error-map": ErrorMapStrategy,
    "quadtree": QuadtreeStrategy,
}
"""All kinds but `uniform`, which is nerfstudio's own."""


@dataclass
class MiningPixelSamplerConfig(PixelSamplerConfig):
    """Which pixels to train on; the settings of each kind are in a group of its name."""

    _target: type = field(default_factory=lambda: MiningPixelSampler)
    """Target class to instantiate."""
    kind: Kind = "detail"
    """How pixels are chosen.
    detail: by local detail, corrected by the error of tiles.
    langevin: by chains that walk towards the error (soft mining, as in the paper).
    uniform: nerfstudio's own way.
    edge: on and around Canny edges (EGRA-NeRF).
    multinomial: by the exact error of all pixels, rendered now and then; slow (the paper's upper bound).
    error-map: by a coarse grid of the error of each image (instant-ngp).
    quadtree: by local contrast, and quadtrees of the error (Zhang et al. 2023)."""
    detail: DetailConfig = field(default_factory=DetailConfig)
    """Settings of the kind detail."""
    langevin: LangevinConfig = field(default_factory=LangevinConfig)
    """Settings of the kind langevin."""
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    """Settings of the kind edge."""
    multinomial: MultinomialConfig = field(default_factory=MultinomialConfig)
    """Settings of the kind multinomial."""
    error_map: ErrorMapConfig = field(default_factory=ErrorMapConfig)
    """Settings of the kind error-map."""
    quadtree: QuadtreeConfig = field(default_factory=QuadtreeConfig)
    """Settings of the kind quadtree."""
    cell_side: int = 2
    """Side in pixels of the cells that maps of edges, contrast and errors are kept in."""
    map_memory: float = 2.0
    """Memory in gigabytes that such a map may take; its cells become larger until it fits."""

    def __post_init__(self) -> None:
        for kind in STRATEGIES:
            self.of_kind(kind).check(kind)
        if self.cell_side < 1:
            raise UserError(f"{FLAG}.cell-side is {self.cell_side}: it is a whole number of 1 or more.")
        if not self.map_memory > 0:
            raise UserError(f"{FLAG}.map-memory is {self.map_memory}: it is a number of gigabytes, such as 2.0.")

    def of_kind(self, kind: str):
        """The settings of one kind."""
        return getattr(self, kind.replace("-", "_"))


class MiningPixelSampler(PixelSampler):
    """Draws training rays by one of several strategies, and tells it how they fared.

    Outside of training (an exporter asks for rays, say) it is nerfstudio's uniform sampler.

    Args:
        config: the settings.
        kwargs: what nerfstudio passes to every pixel sampler.
    """

    config: MiningPixelSamplerConfig

    def __init__(self, config: MiningPixelSamplerConfig, **kwargs) -> None:
        self.training = False
        self.num_images = 0
        """Number of training images; given by the datamanager."""
        self.evaluate: Callable[[Tensor], Tensor] | None = None
        """Gives Q of any pixels; given by the datamanager."""
        self.strategy: Strategy | None = None
        self._generator: torch.Generator | None = None
        self._image_batch: dict | None = None
        self._pixels: CachedPixels | None = None
        self._saved: dict | None = None
        super().__init__(config, **kwargs)

    def sample(self, image_batch: dict) -> dict:
        """Make the next ray batch, with its [MiningBatch][] while training."""
        if not self.training:
            return super().sample(image_batch)
        if self.config.kind == "uniform":
            batch = super().sample(image_batch)
            count = len(batch["indices"])
            batch[BATCH_KEY] = MiningBatch(
                batch["indices"], torch.ones(count, device=batch["indices"].device), num_uniform=count
            )
            return batch
        strategy, pixels = self._cache(image_batch)
        rays, num_uniform = strategy.draw(self.num_rays_per_batch)
        batch: dict = {key: pixels.lookup(key, rays) for key in pixels.values}
        batch["indices"] = indices_of(rays)
        batch[BATCH_KEY] = MiningBatch(
            batch["indices"],
            rays.density,
            num_uniform,
            strategy.config.reweighted,
            strategy.config.alpha_warmup,
            pixels.image_gradient(rays) if strategy.wants_gradient else None,
        )
        if self.config.keep_full_image:
            batch["full_image"] = image_batch["image"]
        return batch

    def at(self, indices: Tensor) -> dict:
        """The ray batch of given pixels [rays, 3] (image, row, column) of the cached images, without a
        [MiningBatch][]."""
        assert self._pixels is not None
        pixels = self._pixels
        slot = pixels.slot[indices[:, 0]]
        pool = pixels.at(slot, indices[:, 1:], torch.ones_like(slot, dtype=torch.float32))
        return {"indices": indices, **{key: pixels.lookup(key, pool) for key in pixels.values}}

    def update(self, feedback: MiningBatch, applied: Tensor | bool = True) -> None:
        """Tell the strategy how a batch fared.

        Args:
            feedback: what came with the batch, filled in by the datamanager, the model and the backward pass.
            applied: whether the optimizers took the step; if not, chains and maps stay as they are (only counts of
                steps go on).
        """
        if self.strategy is not None:
            applied = applied.to(feedback.density.device) if isinstance(applied, Tensor) else applied
            self.strategy.update(feedback, applied)

    def state_dict(self) -> dict:
        """What a checkpoint keeps: the strategy's state and the source of its randomness."""
        if self._saved is not None or self.strategy is None or self._generator is None:
            return self._saved or {}
        return {
            "kind": self.config.kind,
            "strategy": self.strategy.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint at the next batch; what another kind of sampler has saved is left, and said so."""
        self._saved = state or None
        if state and state["kind"] != self.config.kind:
            CONSOLE.print(
                f"[yellow]The checkpoint is of {FLAG}.kind {state['kind']}: {self.config.kind} starts anew.[/yellow]"
            )
            self._saved = None

    def _cache(self, image_batch: dict) -> tuple[Strategy, CachedPixels]:
        """The strategy and its view of the cached images, made anew when nerfstudio has cached others."""
        if self._pixels is None or image_batch is not self._image_batch:
            self.num_images = self.num_images or int(image_batch["image_idx"].max()) + 1
            self._image_batch, self._pixels = image_batch, self._view(image_batch)
            self._make_strategy().cache(self._pixels)
        strategy = self._make_strategy()
        if self._saved is not None:
            saved, self._saved = self._saved, None
            strategy.load_state_dict(saved["strategy"])
            state = saved["generator"].cpu()
            assert self._generator is not None
            if len(state) == len(self._generator.get_state()):  # a checkpoint of another kind of device has another
                self._generator.set_state(state)
        return strategy, self._pixels

    def _make_strategy(self) -> Strategy:
        """The strategy of this training, made at its first batch."""
        if self.strategy is None:
            assert self._generator is not None
            surroundings = Surroundings(
                self.num_images,
                self._generator,
                self.config.cell_side,
                self.config.map_memory,
                self.evaluate,
            )
            kind = self.config.kind
            self.strategy = STRATEGIES[kind](self.config.of_kind(kind), kind, surroundings)
        return self.strategy

    def _view(self, image_batch: dict) -> CachedPixels:
        """The view of an image batch."""
        if self._generator is None:
            # of its own, so that a model starts from the same weights whichever sampler feeds it
            device = next((image.device for image in image_batch["image"]), "cpu")
            self._generator = torch.Generator(device).manual_seed(torch.initial_seed() % 2**63)
        return CachedPixels(
            image_batch,
            self.num_images,
            use_mask=not self.config.ignore_mask,
            fisheye_crop_radius=self.config.fisheye_crop_radius,
            is_equirectangular=bool(self.config.is_equirectangular),
            generator=self._generator,
        )
