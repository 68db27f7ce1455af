"""The interface of every sampler: settings, context, explicit state, and the batch that a training step fills in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import rich
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nerfstudio_softmining.errors import SettingError
from nerfstudio_softmining.mining.records import concatenate, take, unflatten
from nerfstudio_softmining.samplers.cells import Grid, PixelDensity
from nerfstudio_softmining.samplers.images import PixelSamples, TrainingImages
from nerfstudio_softmining.settings import Count

AHEAD = 1 << 15
"""Rays drawn at a time: a draw of many costs little more than one of few, as long as it fits the caches."""


@dataclass
class SamplerConfig:
    """Settings of one sampler. Bounds are annotated on the fields; see [settings.check][]."""

    importance_weighted: bool = True
    """Weight rays by their density (eq. 9)."""
    alpha_warmup: Count = 0
    """Training steps over which alpha rises from 0."""


@dataclass(frozen=True)
class SamplerContext:
    """What a sampler is given of the training that it is part of."""

    num_images: int
    """Number of images of the data set."""
    generator: torch.Generator
    """Source of randomness on the images' device."""
    cell_size: int = 2
    """Side in pixels of the cells of maps."""
    map_memory: float = 2.0
    """Memory in gigabytes that a map may take."""
    importance: Callable[[Int64[Tensor, "n 3"]], Float[Tensor, " n"]] | None = None
    """Gives Q of any pixels (image, row, column) with the model as it is."""
    residual: Callable[[Int64[Tensor, "n 2"]], Float[Tensor, "n c"]] | None = None
    """Gives prediction minus truth of any pixels (row, column) of the only image with the model as it is."""
    num_iterations: int = 1
    """Training steps altogether."""
    _warned: set[str] = field(default_factory=set)

    def warn_once(self, message: str) -> None:
        """Print a message at its first occurrence."""
        if message not in self._warned:
            self._warned.add(message)
            rich.print(f"[yellow]{message}[/yellow]")


@dataclass
class MiningBatch:
    """A batch of training rays, as sampler, datamanager, model and backward pass fill it in, in this order."""

    indices: Int64[Tensor, "rays 3"]
    """Image (as counted by the data set), row and column of each ray."""
    density_ratio: Float[Tensor, " rays"]
    """Density p / u that each ray was drawn with; without meaning where it follows the importance."""
    num_uniform: int
    """Number of uniform rays, which are the last of the batch."""
    follows_importance: Bool[Tensor, " rays"] | None = None
    """Whether each ray was drawn in proportion to the importance; None if none was."""
    importance_weighted: bool = True
    """Whether rays are weighted by their density (eq. 9)."""
    alpha_warmup: int = 0
    """Training steps over which alpha rises from 0."""
    num_chains: int = 0
    """Number of rays that follow chains, which are the first of the batch."""
    restarted: Float[Tensor, ""] | None = None
    """Fraction of the chains that started anew when they last moved; None without chains."""
    drawn_by_sampler: bool = True
    """Whether the sampler drew this batch, and is to be updated from it."""
    image_gradient: Float[Tensor, "rays channels 2"] | None = None
    """Change of each ray's true colour along rows and columns, per pixel, if the sampler needs a gradient."""
    step: int = 0
    """Training step; set by the datamanager."""
    coords: Float[Tensor, "rays 2"] | None = None
    """Row and column that the rays were made from, in pixels: the leaf whose gradient drives the chains; set by the
    datamanager if the sampler needs a gradient. Where there are chains, on photographs only theirs have one."""
    importance: Float[Tensor, " rays"] | None = None
    """Q of each ray; set by the model."""
    error: Float[Tensor, " rays"] | None = None
    """Squared error of each ray; set by the model."""
    weights: Float[Tensor, " rays"] | None = None
    """Weight of each ray's error; set by the model if rays are weighted."""
    weighted_error: Float[Tensor, " rays"] | None = None
    """What the loss is the mean of: the weighted error of each ray. Its gradient is kept if there are coords. Set by
    the model."""
    error_power: int = 2
    """Power of the error there: 2 for the squared error, 1 for the absolute one; set by the model."""

    shared: MiningBatch | None = None
    """The rays of this step in all processes, with their density, importance and error; None where one trains."""


class Samples(NamedTuple):
    """Pixels drawn for a batch."""

    pixels: PixelSamples
    """The pixels and their densities."""
    num_uniform: int
    """Number of uniform ones, which are the last."""
    num_chains: int = 0
    """Number of those that follow chains, which are the first."""
    restarted: Float[Tensor, ""] | None = None
    """Fraction of the chains that started anew when they last moved; None without chains."""


class Stateless(NamedTuple):
    """The state of a sampler that keeps nothing between steps."""


class Ahead(NamedTuple):
    """Batches that are drawn and not used yet."""

    samples: PixelSamples
    """Samples [batches, rays], as [DensitySampler.draw_batches][] returns them."""
    num_uniform: int
    """Uniform rays of each batch, which are the last."""


Config = TypeVar("Config", bound=SamplerConfig)
State = TypeVar("State", bound=tuple)


class Sampler(Generic[Config, State]):
    """A way of choosing pixels for one cache of images.

    An instance holds settings and what follows from the images alone. Everything that changes while training is in a
    state: a NamedTuple of tensors, numbers, and records of these. A state belongs to whoever called last: `update` may
    change its tensors in place, and only the returned state is to be used.

    The derived fields of a state follow from the others. Checkpoints leave them out, and [rebuild][] computes them.

    Args:
        config: its settings.
        context: what it is given of the training.
        images: the images cached now.
    """

    config_class: ClassVar[type[SamplerConfig]]
    """Class of its settings."""
    state_class: ClassVar[type] = Stateless
    """Class of its state."""
    image_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the state whose last dimension runs over the images, in slices given by [image_slice][]. A field of a
    field is written `outer.inner`."""
    derived_fields: ClassVar[tuple[str, ...]] = ("density",)
    """Fields of the state that follow from the others, if it has them; written likewise."""
    needs_residual: ClassVar[bool] = False
    """Whether it needs the residual of a whole image now and then, which scenes cannot give."""
    is_uniform: ClassVar[bool] = False
    """Whether all its draws are uniform, so that the framework's own uniform draw can take its place."""
    live_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that may change between two draws."""
    photo_settings: ClassVar[dict[str, Any]] = {}
    """Settings of its own, and alpha, that differ where a photograph is fitted."""

    def __init__(self, config: Config, context: SamplerContext, images: TrainingImages) -> None:
        self.config, self.context, self.images = config, context, images

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs the gradient of the loss with respect to the pixel coordinates."""
        return False

    def init(self, previous: State | None = None) -> State:
        """Return the state to start these images with.

        Args:
            previous: the state on the images that were cached before, if there were any.
        """
        return self.state_class()

    def draw(self, state: State, count: int) -> tuple[Samples, State]:
        """Draw the pixels of a batch.

        Raises:
            SettingError: if the batch is too small for its uniform fraction.
        """
        raise NotImplementedError

    def update(self, state: State, batch: MiningBatch, applied: Tensor | bool) -> State:
        """Update from a batch after `backward()`. `applied` is False where the optimizer skipped the step."""
        return state

    def expected_density(self, state: State, samples: PixelSamples) -> Float[Tensor, " n"] | None:
        """Return the density p / u that given pixels are drawn with now; None where the sampler does not know it."""
        return None

    def check_settings(self, count: int) -> None:
        """Check settings against each other and the number of rays of a batch.

        Raises:
            SettingError: if they do not go together.
        """
        if hasattr(self.config, "uniform_fraction"):
            self.num_of_fraction("uniform_fraction", count)

    def flush(self, state: State) -> State:
        """Move pending observations into the fields kept by image."""
        return state

    def rebuild(self, state: State) -> State:
        """Compute the derived fields of a state from the others."""
        return state

    def image_slice(self, cache_index: int) -> slice:
        """Return the part of the image fields' last dimension that is about one cached image."""
        raise NotImplementedError

    def num_of_fraction(self, name: str, count: int) -> int:
        """Return how many rays of a batch a fraction of the settings stands for.

        Raises:
            SettingError: if it rounds to none or all of them when it is neither 0 nor 1.
        """
        fraction = getattr(self.config, name)
        number = round(fraction * count)
        if (fraction > 0 and number == 0) or (fraction < 1 and number == count):
            rest = min(fraction, 1 - fraction)
            # rounded, a smaller fraction is 0 or 1
            fix = f"Set it to {math.ceil(0.5 / rest) + 1} or more" if rest > 1e-9 else f"Set {name} to {number and 1}"
            raise SettingError(
                "num_rays",
                count,
                f"too few for a {name} of {fraction}, which stands for {number} of them. {fix}.",
            )
        return number

    def make_grid(
        self, contents: str, bytes_per_cell: float, tile: int = 1, min_tile_side: int = 1, levels: int = 0
    ) -> Grid:
        """Make the grid of a map over the images, with larger cells where the map would take too much memory.

        Args:
            contents: what the map holds, for the message about larger cells.
            bytes_per_cell: memory of the map.
            tile: side in pixels of the tiles that cells are gathered in; rounded up to a power of two in cells.
            min_tile_side: least side in cells of a tile.
            levels: levels of larger tiles.
        """
        wanted = size = self.context.cell_size
        budget = self.context.map_memory * 1e9
        while size < 1024 and self.images.num_pixels / size**2 * bytes_per_cell > budget:
            size += 1
        if size > wanted:
            self.context.warn_once(
                f"{self.images.num_pixels / 1e6:,.0f} million pixels: {contents} are kept in cells of {size} x {size} "
                f"pixels instead of {wanted} x {wanted} to fit {self.context.map_memory} GB (map_memory)."
            )
        # a larger tile than any image would only have more places without a cell
        largest = max(map(max, self.images.sizes))
        tile_side = max(min_tile_side, math.ceil(min(tile, largest) / size))
        return Grid.with_cell_size(self.images, size, 1 << (tile_side - 1).bit_length(), levels)


class DensitySampler(Sampler[Config, State]):
    """A sampler that draws from a known density, beside a fraction of uniform rays.

    The density ratio of every ray is that of the mixture of both, so that weights are exact and at most
    1 / uniform_fraction.
    """

    live_settings = ("uniform_fraction",)
    is_stratified: ClassVar[bool] = False
    """Whether every tile of the density receives its expected number of draws."""

    def density(self, state: State) -> PixelDensity | None:
        """Return the density to draw from; None while all rays are uniform."""
        return state.density  # type: ignore[attr-defined]

    def draw(self, state: State, count: int) -> tuple[Samples, State]:
        num_uniform = self.num_uniform(state, count)
        samples = take(self.draw_batches(state, 1, count - num_uniform, num_uniform), 0)
        return self.mix(samples, num_uniform), state

    def expected_density(self, state: State, samples: PixelSamples) -> Float[Tensor, " n"] | None:
        density, uniform_fraction = self.density(state), getattr(self.config, "uniform_fraction", 0.0)
        if density is None:
            return torch.ones_like(samples.density_ratio)
        return uniform_fraction + (1 - uniform_fraction) * density.density_ratio(samples)

    def num_uniform(self, state: State, count: int) -> int:
        """Return how many rays of a batch are uniform."""
        if self.density(state) is None:
            return count
        return self.num_of_fraction("uniform_fraction", count) if hasattr(self.config, "uniform_fraction") else 0

    def draw_batches(self, state: State, times: int, num_drawn: int, num_uniform: int) -> PixelSamples:
        """Draw several batches at once, as a draw of many costs little more than one of few.

        Returns:
            Samples whose tensors begin with [times, num_drawn + num_uniform], uniform ones last. Their density ratios
            are those of the density alone, without the uniform fraction.
        """
        density = self.density(state)
        if density is None or num_drawn == 0:
            return unflatten(self.images.uniform(times * num_uniform), (times, num_uniform))
        # stratified draws are in order: each batch takes every `times`-th of them
        drawn = density.draw(times * num_drawn, self.is_stratified)
        drawn = PixelSamples(*(part.transpose(0, 1) for part in unflatten(drawn, (num_drawn, times))))
        if num_uniform == 0:
            return drawn
        uniform = self.images.uniform(times * num_uniform)
        uniform = uniform._replace(density_ratio=density.density_ratio(uniform))
        return concatenate(drawn, unflatten(uniform, (times, num_uniform)), dim=1)

    def next_batch(
        self, state: State, ahead: Ahead | None, most: int, num_drawn: int, num_uniform: int
    ) -> tuple[PixelSamples, Ahead | None]:
        """Return the next batch of [draw_batches][], drawn in advance where possible.

        Args:
            state: the state.
            ahead: what is left of the batches drawn before; None if there are none, or if they are out of date.
            most: number of batches that may be drawn now, as the density stays the same until then.
            num_drawn: rays of a batch that are drawn from the density.
            num_uniform: uniform rays of a batch.

        Returns:
            The batch, and what is left.
        """
        count = num_drawn + num_uniform
        # a resumed training may have another batch size, or another fraction of uniform rays
        if ahead is None or (ahead.samples.image_index.shape[1], ahead.num_uniform) != (count, num_uniform):
            times = max(1, min(AHEAD // count, most))
            ahead = Ahead(self.draw_batches(state, times, num_drawn, num_uniform), num_uniform)
        batch, rest = take(ahead.samples, 0), take(ahead.samples, slice(1, None))
        return batch, ahead._replace(samples=rest) if len(rest.image_index) > 0 else None

    def mix(self, samples: PixelSamples, num_uniform: int) -> Samples:
        """Return a batch of samples whose density ratios are those of its mixture with uniform rays."""
        fraction = num_uniform / len(samples.density_ratio)
        mixed = fraction + (1 - fraction) * samples.density_ratio
        return Samples(samples._replace(density_ratio=mixed), num_uniform)


def pixel_centres(images: TrainingImages, batch: MiningBatch) -> PixelSamples:
    """Return the rays of a batch as samples at the centres of their pixels, on the images' device."""
    indices = batch.indices.to(images.device)
    samples = images.as_samples(indices[:, 0], indices[:, 1:] + 0.5)
    return samples._replace(density_ratio=batch.density_ratio.to(images.device))
