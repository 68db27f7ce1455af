"""One flat view of the images that nerfstudio has cached, whatever their sizes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, UInt8
from rich.progress import track
from torch import Tensor

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining import edges
from nerfstudio_softmining.mining.langevin import Pool


class CachedPixels:
    """All pixels of a cached image batch, in a row; the domain of the chains that soft mining keeps on them.

    Images are known by two numbers: the slot, which is their place in the cache, and the image index of the data set,
    which stays the same while the cache changes. Positions are (row, column) in pixels, pixel (0, 0) covering [0, 1)^2.

    Takes 1.125 bytes a pixel for the edges, and 0.125 for a mask, beside the images themselves. Images of different
    sizes come as a list and are joined into one tensor, of which the list's tensors become views.

    Args:
        image_batch: as nerfstudio's dataloader yields it: `image` and any other per-pixel data as one tensor
            [images, height, width, channels] or as a list of [height, width, channels], and `image_idx` [images].
        num_images: number of images of the data set.
        use_mask: whether pixels outside of the `mask`, if there is one, are left out.
        fisheye_crop_radius: radius in pixels around the centre outside of which nothing is drawn, or None.
        is_equirectangular: whether rows stand for latitudes, whose pixels count by their solid angle.
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
        generator: torch.Generator | None = None,
    ) -> None:
        images = image_batch["image"]
        if len(images) == 0:
            raise UserError("the data set has no training images (0 found). Check --data and the dataparser's split.")
        device = images[0].device
        self.generator = generator
        self.height = torch.tensor([image.shape[0] for image in images], device=device)
        self.width = torch.tensor([image.shape[1] for image in images], device=device)
        self.image_idx = image_batch["image_idx"].to(device)
        self.slot = torch.full((num_images,), -1, device=device)
        self.slot[self.image_idx] = torch.arange(len(images), device=device)
        ends = (self.height * self.width).cumsum(0)
        self.start = ends - self.height * self.width
        self.ends = ends
        self.num_pixels = int(ends[-1])
        self.values = {key: value for key in image_batch if (value := _flatten(image_batch, key)) is not None}

        base = self._base_roots(use_mask, fisheye_crop_radius, is_equirectangular)
        self.base = None if base is None else dens.tabulate(base)
        if self.base is not None and self.base.total == 0:
            raise UserError(
                f"the masks of all {len(images)} cached training images are empty: there is no pixel to train on. "
                "Check the mask files (non-zero is kept), or set --pipeline.datamanager.pixel-sampler.ignore-mask True."
            )
        self.edges = dens.tabulate(self._edge_roots())

    def _base_roots(
        self, use_mask: bool, fisheye_crop_radius: float | None, is_equirectangular: bool
    ) -> UInt8[Tensor, " pixels"] | None:
        """Bytes of the density of a uniform draw; None where that is the same for all pixels."""
        roots = None
        if use_mask and "mask" in self.values:
            roots = self.values["mask"][:, 0].bool().view(torch.uint8)
        if fisheye_crop_radius is None and not is_equirectangular:
            return roots
        parts = []
        for height, width in zip(self.height.tolist(), self.width.tolist(), strict=True):
            row = torch.arange(height, device=self.height.device)[:, None] + 0.5
            column = torch.arange(width, device=self.height.device)[None] + 0.5
            weight = torch.ones(height, width, device=self.height.device)
            if is_equirectangular:
                weight = weight * (torch.pi * row / height).sin()
            if fisheye_crop_radius is not None:
                weight = weight * ((row - height / 2).square() + (column - width / 2).square() < fisheye_crop_radius**2)
            parts.append(dens.encode(weight).flatten())
        shape = torch.cat(parts)
        return shape if roots is None else shape * roots

    def _edge_roots(self) -> UInt8[Tensor, " pixels"]:
        """Bytes of the density that chains are re-initialised from."""
        image = self.values["image"]
        roots = torch.empty(self.num_pixels, dtype=torch.uint8, device=image.device)
        sizes = zip(self.start.tolist(), self.height.tolist(), self.width.tolist(), strict=True)
        for start, height, width in track(
            list(sizes), description="Finding edges", transient=True, disable=len(self.start) < 50
        ):
            part = slice(start, start + height * width)
            pixels = image[part].view(height, width, -1).float()
            if pixels.shape[-1] == 4:
                pixels = torch.cat((pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]), dim=-1)
            roots[part] = dens.encode(edges.sobel(pixels)).flatten()
        return roots if self.base is None else roots * (self.base.roots > 0)

    def uniform(self, count: int) -> Pool:
        """Draw uniformly over the pixels of all images (over the kept part of them, by solid angle)."""
        if self.base is None:
            device = self.start.device
            index = torch.randint(self.num_pixels, (count,), generator=self.generator, device=device)
        else:
            index = dens.draw(self.base, count, self.generator).entry
        return self._at(index, torch.ones(count, device=index.device))

    def propose(self, count: int) -> Pool:
        """Draw in proportion to the squared byte of the Sobel magnitude, over all images; uniformly if there is no
        edge."""
        if self.edges.total == 0:
            return self.uniform(count)
        index, probability = dens.draw(self.edges, count, self.generator)
        if self.base is None:
            return self._at(index, probability * self.num_pixels)
        return self._at(index, probability / dens.probability(self.base, index))

    def _at(self, index: Int64[Tensor, " n"], density: Float[Tensor, " n"]) -> Pool:
        """Positions uniform within the given pixels."""
        slot = torch.searchsorted(self.ends, index, right=True)
        local, width = index - self.start[slot], self.width[slot]
        corner = torch.stack((local // width, local % width), dim=-1).float()
        # kept off the rims, where rounding would carry it into the next pixel
        jitter = torch.empty_like(corner).uniform_(0.001, 0.999, generator=self.generator)
        return Pool(self.image_idx[slot], corner + jitter, density)

    def contains(self, pool: Pool):
        """Whether each chain is on a cached image, within its frame and not masked."""
        slot = self.slot[pool.chart]
        size = torch.stack((self.height[slot], self.width[slot]), dim=-1)
        inside = (slot >= 0) & ((pool.position >= 0) & (pool.position < size)).all(dim=-1)
        if self.base is None:
            return inside
        first_pixel = torch.where(inside[:, None], pool.position, 0.0)
        return inside & (self.base.roots[self.index(pool._replace(position=first_pixel))] > 0)

    def index(self, pool: Pool) -> Int64[Tensor, " n"]:
        """Place of the chains' pixels in the row of all pixels."""
        return self._index(self.slot[pool.chart], pixel(pool))

    def _index(self, slot: Int64[Tensor, " n"], pixels: Int64[Tensor, "n 2"]) -> Int64[Tensor, " n"]:
        row, column = pixels.unbind(-1)
        return self.start[slot] + row * self.width[slot] + column

    def image_gradient(self, pool: Pool) -> Float[Tensor, "n c 2"]:
        """Derivatives of the bilinearly interpolated images along rows and columns, per pixel, at the pixels' centres.

        There the interpolation has a kink: the mean of the derivatives on both sides is taken, a central difference.
        """
        slot, image = self.slot[pool.chart], self.values["image"]
        last = torch.stack((self.height[slot], self.width[slot]), dim=-1) - 1
        centre = pixel(pool)
        parts = []
        for unit in torch.eye(2, dtype=torch.int64, device=centre.device):
            ahead = image[self._index(slot, (centre + unit).minimum(last))]
            behind = image[self._index(slot, (centre - unit).clamp_min(0))]
            parts.append((ahead - behind) / 2)
        return torch.stack(parts, dim=-1)

    def side(self, pool: Pool) -> Float[Tensor, "n 1"]:
        """Side of the chains' images in pixels: the geometric mean of height and width."""
        slot = self.slot[pool.chart]
        return (self.height[slot] * self.width[slot]).float().sqrt()[:, None]


def pixel(pool: Pool) -> Int64[Tensor, "n 2"]:
    """Row and column of the pixel that each chain is in."""
    return pool.position.long()


def _flatten(image_batch: dict, key: str) -> Tensor | None:
    """The per-pixel data under a key as [pixels, channels], None for what is not per pixel."""
    value, images = image_batch[key], image_batch["image"]
    if isinstance(value, Tensor) and isinstance(images, Tensor):
        return value.reshape(-1, value.shape[-1]) if value.dim() == 4 and value.shape[:3] == images.shape[:3] else None
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
