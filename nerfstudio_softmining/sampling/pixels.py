"""One view of the images that nerfstudio has cached, whatever their sizes."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float, Int64
from rich.progress import track
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining.langevin import Pool

RUN = 64
"""Pixels of a row that are counted together where not all pixels may be drawn."""
SHOWN = 1 << 25
"""Pixels from which a pass over all of them shows its progress."""
SOLID_ANGLE = 1 << 15
"""Integer that stands for the solid angle of a pixel on the equator."""


class CachedPixels:
    """All pixels of a cached image batch; the domain of the chains that soft mining keeps on them.

    Images are known by two numbers: the slot, which is their place in the cache, and the image index of the data set,
    which stays the same while the cache changes. Positions are (row, column) in pixels, pixel (0, 0) covering [0, 1)^2.
    Pools hold image indices.

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
        self.num_slots = len(images)
        self.sizes = [(image.shape[0], image.shape[1]) for image in images]
        """Height and width of each image, on the host."""
        self.height, self.width = torch.tensor(self.sizes, device=device).unbind(-1)
        self.image_idx = image_batch["image_idx"].to(device)
        self.slot = torch.full((num_images,), -1, device=device)
        self.slot[self.image_idx] = torch.arange(len(images), device=device)
        self.ends = (self.height * self.width).cumsum(0)
        self.start = self.ends - self.height * self.width
        self._starts = [0, *itertools.accumulate(height * width for height, width in self.sizes)]
        self.num_pixels = self._starts[-1]
        self.values = {key: value for key in image_batch if (value := _joined(image_batch, key)) is not None}
        if "mask" in self.values:  # pixels are drawn where the images are
            self.values["mask"] = self.values["mask"].to(device)
        self._background = None if background is None else background.to(device)

        self._mask = self.values.get("mask") if use_mask else None
        self._crop, self._premultiplied = fisheye_crop_radius, premultiplied
        self.is_equirectangular = is_equirectangular
        self.all_kept = self._mask is None and fisheye_crop_radius is None
        """Whether every pixel may be drawn."""
        self.largest_base = SOLID_ANGLE if is_equirectangular else 1
        """The largest [base][] that a pixel can have."""
        self._runs = None if self.all_kept and not is_equirectangular else self._count_runs()
        self.total = self.num_pixels if self._runs is None else int(self._runs[-1])
        """Sum of the [base][] of all pixels."""
        if self.total == 0:
            raise UserError(
                f"the masks of all {len(images)} cached training images are empty: there is no pixel to train on. "
                "Check the mask files (non-zero is kept), or set --pipeline.datamanager.pixel-sampler.ignore-mask True."
            )

    def _count_runs(self) -> Int64[Tensor, " runs"]:
        """Sum of the base up to and including each run of 64 pixels."""
        runs = (self.width + RUN - 1) // RUN
        self._runs_ends = (runs * self.height).cumsum(0)
        self._runs_of_row = runs
        sums = []
        for slot in self.each_slot("Counting pixels"):
            height, width = self.sizes[slot]
            row = torch.arange(height, device=self.device)
            base = self.keeps(slot).long() * self._solid_angle(slot, row)[:, None]
            sums.append(torch.nn.functional.pad(base, (0, -width % RUN)).view(-1, RUN).sum(dim=1))
        return torch.cat(sums).cumsum(0)

    def each_slot(self, description: str):
        """The slots of all cached images, with a progress bar where that may take a while."""
        return track(range(self.num_slots), description, transient=True, disable=self.num_pixels < SHOWN)

    def image(self, slot: int) -> Float[Tensor, "h w c"]:
        """One cached image; the colours of RGBA are multiplied by alpha."""
        image = to_colours(self._part("image", slot), self._background)
        if image.shape[-1] == 4 and not self._premultiplied:
            image = torch.cat((image[..., :3] * image[..., 3:], image[..., 3:]), dim=-1)
        return image

    def _part(self, key: str, slot: int) -> Tensor:
        value, (height, width) = self.values[key], self.sizes[slot]
        if value.dim() == 4:
            return value[slot]
        return value[self._starts[slot] : self._starts[slot + 1]].view(height, width, -1)

    def keeps(self, slot: int) -> Bool[Tensor, "h w"]:
        """Which pixels of an image may be drawn."""
        height, width = self.sizes[slot]
        if self._mask is not None:
            kept = self._part("mask", slot)[..., 0].bool()
        else:
            kept = torch.ones(height, width, dtype=torch.bool, device=self.device)
        if self._crop is not None:
            row = torch.arange(height, device=self.device)[:, None]
            kept = kept & self._within_crop(slot, row, torch.arange(width, device=self.device)[None])
        return kept

    def mass(self, slot: int) -> Float[Tensor, "h w"]:
        """What a uniform draw of each pixel of an image is in proportion to, in [0, 1]."""
        row = torch.arange(self.sizes[slot][0], device=self.device)
        return self.keeps(slot) * (self._solid_angle(slot, row) / self.largest_base)[:, None]

    def kept(self, slot: Int64[Tensor, "*n"], pixels: Int64[Tensor, "*n 2"]) -> Bool[Tensor, "*n"]:
        """Whether each pixel, which has to be on its image, may be drawn."""
        row, column = pixels.unbind(-1)
        kept = torch.ones_like(slot, dtype=torch.bool)
        if self._mask is not None:
            kept = self._lookup("mask", slot, row, column)[..., 0].bool()
        if self._crop is not None:
            kept = kept & self._within_crop(slot, row, column)
        return kept

    def _within_crop(self, slot: Tensor | int, row: Tensor, column: Tensor) -> Tensor:
        assert self._crop is not None
        down, across = row + 0.5 - self.height[slot] / 2, column + 0.5 - self.width[slot] / 2
        return down.square() + across.square() < self._crop**2

    def _solid_angle(self, slot: Tensor | int, row: Tensor) -> Tensor:
        if not self.is_equirectangular:
            return torch.ones_like(row)
        return ((torch.pi * (row + 0.5) / self.height[slot]).sin() * SOLID_ANGLE).round().long()

    def base(self, slot: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"]) -> Int64[Tensor, " n"]:
        """Integer that a uniform draw of each kept pixel is in proportion to: 1, or its solid angle."""
        return self._solid_angle(slot, pixels[..., 0])

    def relative(self, probability: Float[Tensor, " n"], pool: Pool) -> Float[Tensor, " n"]:
        """Density p / u of kept pixels that were drawn with the given probability, relative to a uniform draw."""
        return probability * self.total / self.base(self.slot[pool.chart], pixel(pool))

    def uniform(self, count: int) -> Pool:
        """Draw uniformly over the pixels of all images (over the kept part of them, by solid angle)."""
        if self._runs is None:
            index = torch.randint(self.num_pixels, (count,), generator=self.generator, device=self.device)
            slot = torch.searchsorted(self.ends, index, right=True)
            local, width = index - self.start[slot], self.width[slot]
            pixels = torch.stack((local // width, local % width), dim=-1)
        else:
            slot, pixels = self._draw_from_runs(count)
        return self.at(slot, pixels, torch.ones(count, device=self.device))

    def _draw_from_runs(self, count: int) -> tuple[Tensor, Tensor]:
        assert self._runs is not None
        target = torch.randint(self.total, (count,), generator=self.generator, device=self.device)
        run = torch.searchsorted(self._runs, target, right=True)
        before = torch.where(run > 0, self._runs[(run - 1).clamp_min(0)], 0)
        slot = torch.searchsorted(self._runs_ends, run, right=True)
        of_row = self._runs_of_row[slot]
        local = run - (self._runs_ends[slot] - of_row * self.height[slot])
        row = local // of_row
        column = (local % of_row * RUN)[:, None] + torch.arange(RUN, device=self.device)
        width = self.width[slot][:, None]
        pixels = torch.stack((row[:, None].expand_as(column), column.minimum(width - 1)), dim=-1)
        kept = self.kept(slot[:, None].expand_as(column), pixels) & (column < width)
        rank = (target - before) // self._solid_angle(slot, row)
        return slot, pixels[torch.arange(count, device=self.device), nth(kept, rank)]

    def at(self, slot: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"], density: Float[Tensor, " n"]) -> Pool:
        """Positions uniform within the given pixels."""
        corner = pixels.float()
        # kept off the rims, where rounding would carry it into the next pixel
        jitter = torch.empty_like(corner).uniform_(0.001, 0.999, generator=self.generator)
        return Pool(self.image_idx[slot], corner + jitter, density)

    def contains(self, pool: Pool) -> Bool[Tensor, " n"]:
        """Whether each chain is on a cached image, within its frame and not masked."""
        slot = self.slot[pool.chart]
        size = torch.stack((self.height[slot], self.width[slot]), dim=-1)
        inside = (slot >= 0) & ((pool.position >= 0) & (pool.position < size)).all(dim=-1)
        if self.all_kept:
            return inside
        on_image = torch.where(inside[:, None], pool.position, 0.0)
        return inside & self.kept(slot, on_image.long())

    def lookup(self, key: str, pool: Pool) -> Tensor:
        """The data [n, channels] under a key at the pixels of a pool."""
        return self._lookup(key, self.slot[pool.chart], *pixel(pool).unbind(-1))

    def _lookup(self, key: str, slot: Tensor, row: Tensor, column: Tensor) -> Tensor:
        value = self.values[key]
        index = (slot, row, column) if value.dim() == 4 else (self.start[slot] + row * self.width[slot] + column,)
        found = value[tuple(part.to(value.device) for part in index)]
        return to_colours(found, self._background) if key == "image" else found

    def image_gradient(self, pool: Pool) -> Float[Tensor, "n c 2"]:
        """Derivatives of the bilinearly interpolated images along rows and columns, per pixel, at the pixels' centres.

        There the interpolation has a kink: the mean of the derivatives on both sides is taken, a central difference.
        """
        slot = self.slot[pool.chart]
        last = torch.stack((self.height[slot], self.width[slot]), dim=-1) - 1
        centre = pixel(pool)
        parts = []
        for unit in torch.eye(2, dtype=torch.int64, device=centre.device):
            ahead = self._lookup("image", slot, *(centre + unit).minimum(last).unbind(-1))
            behind = self._lookup("image", slot, *(centre - unit).clamp_min(0).unbind(-1))
            parts.append((ahead - behind) / 2)
        return torch.stack(parts, dim=-1)

    def side(self, pool: Pool) -> Float[Tensor, "n 1"]:
        """Side of the chains' images in pixels: the geometric mean of height and width."""
        slot = self.slot[pool.chart]
        return (self.height[slot] * self.width[slot]).float().sqrt()[:, None]

    def solid_angle(self, pool: Pool) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 2"]]:
        """Solid angle of a chain's surroundings, relative to the equator, and the gradient of its logarithm per pixel;
        1 and 0 but for equirectangular images."""
        gradient = torch.zeros_like(pool.position)
        if not self.is_equirectangular:
            return torch.ones_like(pool.density), gradient
        height = self.height[self.slot[pool.chart]]
        latitude = torch.pi * (pixel(pool)[:, 0] + 0.5) / height
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


def pixel(pool: Pool) -> Int64[Tensor, "n 2"]:
    """Row and column of the pixel that each chain is in."""
    return pool.position.long()


def nth(marks: Bool[Tensor, "n m"], rank: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Place of the mark number `rank` (from 0) in each row, which has to have more marks than that."""
    return (marks.cumsum(dim=1) <= rank[:, None]).sum(dim=1).clamp_max(marks.shape[1] - 1)


def _joined(image_batch: dict, key: str) -> Tensor | None:
    """The per-pixel data under a key: [images, height, width, channels] as it is, a list as [pixels, channels], None
    for what is not per pixel."""
    value, images = image_batch[key], image_batch["image"]
    if isinstance(value, Tensor) and isinstance(images, Tensor):
        return value if value.dim() == 4 and value.shape[:3] == images.shape[:3] else None
    if not isinstance(value, list) or any(v.shape[:2] != i.shape[:2] for v, i in zip(value, images, strict=True)):
        return None
    channels = {v.shape[-1] for v in value}
    if len(channels) > 1:
        raise UserError(
            f"the training images differ in their number of channels ({sorted(channels)} in '{key}'). Convert all of "
            "them to RGB or all to RGBA."
        )
    flat = torch.cat([v.reshape(-1, v.shape[-1]) for v in value])
    sizes = [v.shape[0] * v.shape[1] for v in value]
    image_batch[key] = [part.view(v.shape) for part, v in zip(flat.split(sizes), value, strict=True)]
    return flat
