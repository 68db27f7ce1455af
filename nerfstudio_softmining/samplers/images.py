"""The training images as one domain to draw pixels from, whatever their sizes and masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import cv2
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from rich.progress import track
from torch import Tensor

from nerfstudio_softmining.errors import SettingError, UserError

RUN = 64
"""Pixels of a row that are counted together where not all pixels are valid."""
PROGRESS_PIXELS = 1 << 25
"""Pixels from which a pass over all of them shows its progress."""
SOLID_ANGLE = 1 << 15
"""Integer that stands for the solid angle of a pixel on the equator."""


class PixelSamples(NamedTuple):
    """Pixels drawn from the training images, and the densities that they were drawn with."""

    image_index: Int64[Tensor, " n"]
    """Image of each sample, as counted by the data set."""
    position: Float[Tensor, "n 2"]
    """Row and column in pixels; pixel (0, 0) covers [0, 1)^2."""
    density_ratio: Float[Tensor, " n"]
    """Density p / u relative to a uniform draw; without meaning where a sample follows the importance."""
    follows_importance: Bool[Tensor, " n"]
    """Whether a sample was drawn in proportion to Q instead of with a known density."""

    @property
    def pixels(self) -> Int64[Tensor, "n 2"]:
        """Row and column of the pixel that each sample is in."""
        return self.position.long()

    @property
    def indices(self) -> Int64[Tensor, "n 3"]:
        """Image, row and column of each sample, as nerfstudio has them."""
        return torch.cat((self.image_index[:, None], self.pixels), dim=-1)


class TrainingImages:
    """All pixels of a cached image batch.

    Images have two numbers. The *image index* counts the data set, and stays the same while the cache changes; samples
    hold it. The *cache index* is the place in the cache.

    Takes no memory of its own, or 0.125 bytes a pixel where there are masks, a fisheye crop or latitudes. Images of
    different sizes come as a list and are joined into one tensor, of which the list's tensors become views.

    Args:
        image_batch: as nerfstudio's dataloader yields it: `image`, in [0, 1] or in bytes, and any other per-pixel data
            as one tensor [images, height, width, channels] or as a list of [height, width, channels], and
            `image_idx` [images].
        num_images: number of images of the data set.
        use_mask: whether pixels outside of the `mask`, if there is one, are left out.
        fisheye_crop_radius: radius in pixels around the centre outside of which nothing is drawn, or None.
        is_equirectangular: whether rows stand for latitudes, whose pixels count by their solid angle.
        background: colour [3] that RGBA images are blended with; None keeps their alpha.
        premultiplied: whether the colours of RGBA images are multiplied by alpha already.
        generator: source of randomness on the images' device.

    Raises:
        UserError: if there are no images, no valid pixels, or images with different channels.
    """

    def __init__(
        self,
        image_batch: dict,
        num_images: int,
        *,
        use_mask: bool = True,
        fisheye_crop_radius: float | None = None,
        is_equirectangular: bool = False,
        background: Tensor | None = None,
        premultiplied: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        images = image_batch["image"]
        if len(images) == 0:
            raise UserError("the data set has no training images (0 found). Check --data and the dataparser's split.")
        self.device = device = images[0].device
        self.generator = generator
        self.num_cached = len(images)
        self.sizes = [(image.shape[0], image.shape[1]) for image in images]
        """Height and width of each cached image, on the host."""
        self.height, self.width = torch.tensor(self.sizes, device=device).unbind(-1)
        self.image_index = image_batch["image_idx"].to(device)
        """Image index of each cached image."""
        self.cache_index = torch.full((num_images,), -1, device=device)
        """Cache index of each image of the data set; -1 where it is not cached."""
        self.cache_index[self.image_index] = torch.arange(len(images), device=device)
        self.ends = (self.height * self.width).cumsum(0)
        self.start = self.ends - self.height * self.width
        self._starts = [0, *itertools.accumulate(height * width for height, width in self.sizes)]
        self.num_pixels = self._starts[-1]
        self.values = {key: value for key in image_batch if (value := _joined(image_batch, key)) is not None}
        """All per-pixel data by its key."""
        if "mask" in self.values:  # pixels are drawn where the images are
            self.values["mask"] = self.values["mask"].to(device)
        self._background = None if background is None else background.to(device)

        self._mask = self.values.get("mask") if use_mask else None
        self._crop, self._premultiplied = capped_radius(fisheye_crop_radius, self.sizes), premultiplied
        self.is_equirectangular = is_equirectangular
        self.all_valid = self._mask is None and fisheye_crop_radius is None
        """Whether every pixel may be drawn."""
        self.is_even = self.all_valid and not is_equirectangular
        """Whether a uniform draw is uniform over pixels."""
        self.max_integer_weight = SOLID_ANGLE if is_equirectangular else 1
        """The largest [integer_weight][] that a pixel can have."""
        self._run_ends = None if self.is_even else self._count_runs()
        self.total = self.num_pixels if self._run_ends is None else int(self._run_ends[-1])
        """Sum of the integer weights of all pixels."""
        if self.total == 0 and self._mask is None:
            raise SettingError(
                "fisheye_crop_radius", fisheye_crop_radius, "it leaves no pixel to train on. Set it to 1 or more."
            )
        if self.total == 0:
            raise SettingError(
                "ignore_mask",
                False,
                f"the masks of all {len(images)} cached images are empty, and there is no pixel to draw from them. "
                "Check the mask files (non-zero is valid), or set it to True.",
            )

    def _count_runs(self) -> Int64[Tensor, " runs"]:
        """Sum the integer weights up to and including each run of 64 pixels."""
        runs = (self.width + RUN - 1) // RUN
        self._image_run_ends = (runs * self.height).cumsum(0)
        self._runs_per_row = runs
        sums = []
        for index in self.track("Counting pixels"):
            height, width = self.sizes[index]
            row = torch.arange(height, device=self.device)
            weight = self.valid_mask(index).long() * self._solid_angle(index, row)[:, None]
            sums.append(torch.nn.functional.pad(weight, (0, -width % RUN)).view(-1, RUN).sum(dim=1))
        return torch.cat(sums).cumsum(0)

    def track(self, description: str) -> Iterable[int]:
        """Yield the cache index of each image, with a progress bar where that may take a while."""
        disable = self.num_pixels < PROGRESS_PIXELS
        return track(range(self.num_cached), description, transient=True, disable=disable)

    def image(self, cache_index: int) -> Float[Tensor, "h w c"]:
        """Return one cached image. The colours of RGBA are multiplied by alpha.

        Pixels that may not be drawn have the colour of the nearest that may, so that the border of a mask is no edge.
        """
        image = to_colours(self._part("image", cache_index), self._background)
        if image.shape[-1] == 4 and not self._premultiplied:
            image = torch.cat((image[..., :3] * image[..., 3:], image[..., 3:]), dim=-1)
        return self._fill(image, cache_index)

    def image_or_bytes(self, cache_index: int) -> Float[Tensor, "h w c"] | UInt8[Tensor, "h w c"]:
        """Return [image][], in bytes where these are its colours, which saves time and memory."""
        part = self._part("image", cache_index)
        is_colours = part.dtype == torch.uint8 and part.shape[-1] < 4
        return self._fill(part, cache_index) if is_colours else self.image(cache_index)

    def _fill(self, image: Tensor, cache_index: int) -> Tensor:
        return image if self.all_valid else fill_invalid(image, self.valid_mask(cache_index))

    def _part(self, key: str, cache_index: int) -> Tensor:
        value, (height, width) = self.values[key], self.sizes[cache_index]
        if value.dim() > 2:
            return value[cache_index]
        return value[self._starts[cache_index] : self._starts[cache_index + 1]].view(height, width, -1)

    def valid_mask(self, cache_index: int) -> Bool[Tensor, "h w"]:
        """Return which pixels of one cached image may be drawn."""
        height, width = self.sizes[cache_index]
        if self._mask is not None:
            valid = self._part("mask", cache_index)[..., 0].bool()
        else:
            valid = torch.ones(height, width, dtype=torch.bool, device=self.device)
        if self._crop is not None:
            row = torch.arange(height, device=self.device)[:, None]
            valid = valid & self._is_within_crop(cache_index, row, torch.arange(width, device=self.device)[None])
        return valid

    def pixel_weight(self, cache_index: int) -> Float[Tensor, "h w"]:
        """Return the weight in [0, 1] of each pixel of one cached image in a uniform draw."""
        if self.is_even:
            return torch.ones((), device=self.device).expand(self.sizes[cache_index])
        row = torch.arange(self.sizes[cache_index][0], device=self.device)
        solid_angle = self._solid_angle(cache_index, row) / self.max_integer_weight
        return self.valid_mask(cache_index) * solid_angle[:, None]

    def valid(self, cache_index: Int64[Tensor, "*n"], pixels: Int64[Tensor, "*n 2"]) -> Bool[Tensor, "*n"]:
        """Return whether each pixel, which must be on its image, may be drawn."""
        row, column = pixels.unbind(-1)
        valid = torch.ones_like(cache_index, dtype=torch.bool)
        if self._mask is not None:
            valid = self._lookup("mask", cache_index, row, column)[..., 0].bool()
        if self._crop is not None:
            valid = valid & self._is_within_crop(cache_index, row, column)
        return valid

    def _is_within_crop(self, cache_index: Tensor | int, row: Tensor, column: Tensor) -> Tensor:
        assert self._crop is not None
        down, across = row + 0.5 - self.height[cache_index] / 2, column + 0.5 - self.width[cache_index] / 2
        return down.square() + across.square() < self._crop**2

    def _solid_angle(self, cache_index: Tensor | int, row: Tensor) -> Tensor:
        if not self.is_equirectangular:
            return torch.ones_like(row)
        return ((torch.pi * (row + 0.5) / self.height[cache_index]).sin() * SOLID_ANGLE).round().long()

    def integer_weight(self, cache_index: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"]) -> Int64[Tensor, " n"]:
        """Return the integer weight of valid pixels in a uniform draw: 1, or their solid angle."""
        return self._solid_angle(cache_index, pixels[..., 0])

    def density_ratio(self, probability: Float[Tensor, " n"], samples: PixelSamples) -> Float[Tensor, " n"]:
        """Return the density p / u of valid pixels that were drawn with the given probability."""
        cache_index = self.cache_index[samples.image_index]
        return probability * self.total / self.integer_weight(cache_index, samples.pixels)

    def uniform(self, count: int) -> PixelSamples:
        """Draw uniformly over the valid pixels of all cached images, by solid angle on panoramas."""
        if self._run_ends is None:
            index = torch.randint(self.num_pixels, (count,), generator=self.generator, device=self.device)
            cache_index = torch.searchsorted(self.ends, index, right=True)
            local, width = index - self.start[cache_index], self.width[cache_index]
            pixels = torch.stack((local // width, local % width), dim=-1)
        else:
            cache_index, pixels = self._draw_from_runs(self._run_ends, count)
        return self.samples_at(cache_index, pixels)

    def _draw_from_runs(self, run_ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
        target = torch.randint(self.total, (count,), generator=self.generator, device=self.device)
        run = torch.searchsorted(run_ends, target, right=True)
        before = torch.where(run > 0, run_ends[(run - 1).clamp_min(0)], 0)
        cache_index = torch.searchsorted(self._image_run_ends, run, right=True)
        runs_per_row = self._runs_per_row[cache_index]
        local = run - (self._image_run_ends[cache_index] - runs_per_row * self.height[cache_index])
        row = local // runs_per_row
        column = (local % runs_per_row * RUN)[:, None] + torch.arange(RUN, device=self.device)
        width = self.width[cache_index][:, None]
        pixels = torch.stack((row[:, None].expand_as(column), column.minimum(width - 1)), dim=-1)
        valid = self.valid(cache_index[:, None].expand_as(column), pixels) & (column < width)
        rank = (target - before) // self._solid_angle(cache_index, row)
        return cache_index, pixels[torch.arange(count, device=self.device), nth(valid, rank)]

    def samples_at(self, cache_index: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"]) -> PixelSamples:
        """Draw positions uniformly within the given pixels. Their density ratio is 1."""
        corner = pixels.float()
        # kept off the rims, where rounding would carry it into the next pixel
        jitter = torch.empty_like(corner).uniform_(0.001, 0.999, generator=self.generator)
        return self.as_samples(self.image_index[cache_index], corner + jitter)

    def as_samples(self, image_index: Int64[Tensor, " n"], position: Float[Tensor, "n 2"]) -> PixelSamples:
        """Return given positions as samples with a density ratio of 1."""
        ratio = torch.ones(len(position), device=position.device)
        return PixelSamples(image_index, position, ratio, torch.zeros_like(ratio, dtype=torch.bool))

    def contains(self, samples: PixelSamples) -> Bool[Tensor, " n"]:
        """Return whether each position is on a cached image, within its frame and not masked."""
        cache_index = self.cache_index[samples.image_index]
        size = torch.stack((self.height[cache_index], self.width[cache_index]), dim=-1)
        is_inside = (cache_index >= 0) & ((samples.position >= 0) & (samples.position < size)).all(dim=-1)
        if self.all_valid:
            return is_inside
        on_image = torch.where(is_inside[:, None], samples.position, 0.0)
        return is_inside & self.valid(cache_index, on_image.long())

    def wrap(self, samples: PixelSamples) -> PixelSamples:
        """Return positions that have left a panorama at one side where they come in at the other."""
        if not self.is_equirectangular:
            return samples
        row, column = samples.position.unbind(-1)
        width = self.width[self.cache_index[samples.image_index]].to(column.dtype)
        wrapped = column.remainder(width)
        # a remainder is rounded to the width itself just below 0
        return samples._replace(position=torch.stack((row, wrapped.where(wrapped < width, 0.0)), dim=-1))

    def lookup(self, key: str, samples: PixelSamples) -> Tensor:
        """Return the data [n, channels] under a key at the pixels of the samples."""
        return self._lookup(key, self.cache_index[samples.image_index], *samples.pixels.unbind(-1))

    def _lookup(self, key: str, cache_index: Tensor, row: Tensor, column: Tensor) -> Tensor:
        value = self.values[key]
        if value.dim() > 2:
            index = (cache_index, row, column)
        else:
            index = (self.start[cache_index] + row * self.width[cache_index] + column,)
        found = value[tuple(part.to(value.device) for part in index)]
        return to_colours(found, self._background) if key == "image" else found

    def image_gradient(self, samples: PixelSamples) -> Float[Tensor, "n c 2"]:
        """Differentiate the bilinearly interpolated images along rows and columns, per pixel, at the pixels' centres.

        There the interpolation has a kink: the mean of the derivatives on both sides is taken, a central difference.
        """
        cache_index = self.cache_index[samples.image_index]
        last = torch.stack((self.height[cache_index], self.width[cache_index]), dim=-1) - 1
        centre = samples.pixels
        parts = []
        for unit in torch.eye(2, dtype=torch.int64, device=centre.device):
            ahead = self._lookup("image", cache_index, *(centre + unit).minimum(last).unbind(-1))
            behind = self._lookup("image", cache_index, *(centre - unit).clamp_min(0).unbind(-1))
            parts.append((ahead - behind) / 2)
        return torch.stack(parts, dim=-1)

    def side(self, samples: PixelSamples) -> Float[Tensor, "n 1"]:
        """Return the side of each sample's image in pixels: the geometric mean of height and width."""
        cache_index = self.cache_index[samples.image_index]
        return (self.height[cache_index] * self.width[cache_index]).float().sqrt()[:, None]

    def solid_angle(self, samples: PixelSamples) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 2"]]:
        """Return the solid angle of each pixel relative to the equator, and the gradient of its logarithm per pixel.

        These are 1 and 0 for all but equirectangular images.
        """
        gradient = torch.zeros_like(samples.position)
        if not self.is_equirectangular:
            return torch.ones_like(samples.density_ratio), gradient
        height = self.height[self.cache_index[samples.image_index]]
        latitude = torch.pi * (samples.pixels[:, 0] + 0.5) / height
        gradient[:, 0] = torch.pi / height / latitude.tan()
        return latitude.sin(), gradient


def to_colours(values: Tensor, background: Float[Tensor, " 3"] | None) -> Float[Tensor, "*n c"]:
    """Convert colours to float32 in [0, 1], exactly as nerfstudio's `InputDataset` does for whole images.

    Args:
        values: colours [..., 3 or 4] in bytes, or in [0, 1].
        background: what RGBA is blended with; None keeps alpha.
    """
    values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    if background is not None and values.shape[-1] == 4:
        values = values[..., :3] * values[..., 3:] + background * (1 - values[..., 3:])
    return values


def fill_invalid(image: Shaped[Tensor, "h w c"], valid: Bool[Tensor, "h w"]) -> Shaped[Tensor, "h w c"]:
    """Give each pixel that is not valid the colour of the nearest that is, if there is any.

    Nearest by OpenCV's 5 x 5 distance, which is within some per cent of the Euclidean.
    """
    valid = valid.cpu()
    if valid.all() or not valid.any():
        return image
    hidden = (~valid).byte().numpy()
    _, labels = cv2.distanceTransformWithLabels(hidden, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL)
    labels = torch.from_numpy(labels).flatten()  # the valid pixels have 1, 2, ..., the others that of the nearest
    pixels = valid.flatten().nonzero()[:, 0]
    nearest = torch.empty(len(pixels) + 1, dtype=torch.int64)
    nearest[labels[pixels].long()] = pixels
    return image.flatten(0, 1)[nearest[labels.long()].to(image.device)].view_as(image)


def capped_radius(radius: float | None, sizes: Iterable[tuple[int, int]]) -> float | None:
    """Return the radius of a crop around the centre; of larger ones, one that leaves all pixels of all images."""
    return None if radius is None else min(radius, 1 + math.hypot(*map(max, zip(*sizes, strict=True))) / 2)


def nth(marks: Bool[Tensor, "n m"], rank: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Return the place of mark number `rank`, from 0, in each row, which must have more marks than that."""
    return (marks.cumsum(dim=1) <= rank[:, None]).sum(dim=1).clamp_max(marks.shape[1] - 1)


def _joined(image_batch: dict, key: str) -> Tensor | None:
    """Return the per-pixel data under a key, or None for what is not per pixel.

    A tensor [images, height, width, ...] stays as it is; a list becomes one tensor [pixels, ...]. Data may be without
    channels, such as nerfstudio's monocular depth.
    """
    value, images = image_batch[key], image_batch["image"]
    if isinstance(value, Tensor) and isinstance(images, Tensor):
        return value if value.dim() in (3, 4) and value.shape[:3] == images.shape[:3] else None
    if not isinstance(value, list) or any(v.shape[:2] != i.shape[:2] for v, i in zip(value, images, strict=True)):
        return None
    channels = {v.shape[2:] for v in value}
    if len(channels) > 1:
        numbers = sorted(shape[0] if shape else 1 for shape in channels)
        raise UserError(
            f"the training images differ in their number of channels ({numbers} in '{key}'). Convert all of them to "
            "RGB or all to RGBA."
        )
    if (joined := _shared_base(value)) is not None:
        return joined
    flat = torch.cat([v.flatten(0, 1) for v in value])
    image_batch[key] = views(flat, [v.shape[:2] for v in value])
    return flat


def views(flat: Tensor, sizes: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Return views [height, width, ...], one for each size, of a tensor [pixels, ...] of all images."""
    shapes = list(sizes)
    parts = flat.split([height * width for height, width in shapes])
    return [part.view(*shape, *flat.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


def _shared_base(values: list[Tensor]) -> Tensor | None:
    """Return the tensor [pixels, ...] that all of the given images are views of by [views][], if there is one."""
    base = values[0]._base
    if base is None or base.shape[1:] != values[0].shape[2:] or any(value._base is not base for value in values):
        return None
    starts = itertools.accumulate((value.numel() for value in values), initial=0)
    follows = (v.is_contiguous() and v.storage_offset() == start for v, start in zip(values, starts, strict=False))
    return base if all(follows) and base.numel() == sum(value.numel() for value in values) else None
