"""Made-up images, feedback and statistics for tests of pixel samplers."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from torch import Tensor

from nerfstudio_softmining.mining import density as dens
from nerfstudio_softmining.mining.priors import laplacian, sobel
from nerfstudio_softmining.plugin.pixel_sampler import BATCH_KEY, SPECS, MiningPixelSampler, MiningPixelSamplerConfig
from nerfstudio_softmining.samplers.base import DensitySampler, MiningBatch
from nerfstudio_softmining.samplers.cells import PixelDensity
from nerfstudio_softmining.samplers.images import PixelSamples, fill_invalid

NUM_IMAGES = 9
CACHED = (7, 2, 5, 0, 4)
ONE_SIZE = ((10, 14),) * 5
SIZES = ((6, 9), (13, 4), (8, 8), (3, 17), (1, 5))
NAN, INF = float("nan"), math.inf


def grid(height: int, width: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(height) for column in range(width)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_images(sizes=ONE_SIZE, channels: int = 3, ids=CACHED) -> list[Tensor]:
    """Noise whose contrast rises from none at the left to full at the right; an image depends on its id alone."""
    images = []
    for (height, width), i in zip(sizes, ids, strict=True):
        contrast = (torch.linspace(-0.5, 1, width)).clamp_min(0)[None, :, None]
        images.append(0.5 + contrast * (torch.rand(height, width, channels, generator=seeded(i)) - 0.5))
    return images


def make_masks(sizes) -> list[Tensor]:
    """The first image is masked as a whole, the others in places."""
    keep = [torch.rand(height, width, 1, generator=seeded(i)) < 0.6 for i, (height, width) in enumerate(sizes)]
    return [torch.zeros_like(keep[0]), *keep[1:]]


@dataclass
class Case:
    """A cache of images, and how nerfstudio asks to draw from it."""

    sizes: tuple = ONE_SIZE
    channels: int = 3
    masked: bool = False
    settings: dict = field(default_factory=dict)
    ids: tuple = CACHED

    def batch(self) -> dict:
        def collated(parts: list[Tensor]):
            return torch.stack(parts) if len(set(self.sizes)) == 1 else parts

        batch = {"image": collated(make_images(self.sizes, self.channels, self.ids))}
        batch["image_idx"] = torch.tensor(self.ids)
        batch["depth_image"] = collated([image[..., :1] * 7 for image in make_images(self.sizes, 3, self.ids)])
        if self.masked:
            batch["mask"] = collated(make_masks(self.sizes))
        return batch

    def uniform(self) -> Tensor:
        """Density of a uniform draw of each pixel of the cache, in a row."""
        return self.mass() / self.mass().sum()

    def mass(self) -> Tensor:
        """What that is in proportion to, by brute force: 1 or a solid angle, 0 for what is masked."""
        weights = []
        for (height, width), mask in zip(self.sizes, make_masks(self.sizes), strict=True):
            weight = torch.ones(height, width).double()
            radius = self.settings.get("fisheye_crop_radius", INF)
            for row in range(height):
                for column in range(width):
                    if (row + 0.5 - height / 2) ** 2 + (column + 0.5 - width / 2) ** 2 >= radius**2:
                        weight[row, column] = 0
                if self.settings.get("is_equirectangular"):
                    weight[row] *= math.sin(math.pi * (row + 0.5) / height)
            if self.masked and not self.settings.get("ignore_mask"):
                weight *= mask[..., 0]
            weights.append(weight.flatten())
        return torch.cat(weights)

    def pixels(self) -> Tensor:
        """Image, row and column of all pixels of the cache, in a row."""
        rows = [(i, row, column) for i, (h, w) in zip(self.ids, self.sizes, strict=True) for row, column in grid(h, w)]
        return torch.tensor(rows)

    def per_slot(self, values: Tensor) -> list[Tensor]:
        """Values of all pixels in a row, as images."""
        parts = values.split([height * width for height, width in self.sizes])
        return [part.view(size) for part, size in zip(parts, self.sizes, strict=True)]

    def cells(self, side: int) -> Tensor:
        """Number of the cell of each pixel, by brute force."""
        numbers: dict[tuple, int] = {}
        cells = []
        size = dict(zip(self.ids, self.sizes, strict=True))
        for i, row, column in self.pixels().tolist():
            rows, columns = (math.ceil(length / side) for length in size[i])
            key = (i, row * rows // size[i][0], column * columns // size[i][1])
            cells.append(numbers.setdefault(key, len(numbers)))
        return torch.tensor(cells)

    def evened(self, weight: Tensor, side: int = 2) -> Tensor:
        """Density over pixels in a row whose weights are averaged over cells and coded in bytes, masked ones apart."""
        cells, kept = self.cells(side), self.uniform() > 0
        sums = torch.zeros(int(cells.max()) + 1).index_add_(0, cells, (weight * self.mass()).float())
        count = torch.zeros(len(sums)).double().index_add_(0, cells, kept.double())
        code = dens.integer_weight(dens.encode(sums / side**2)).double()
        density = torch.where(kept, (code / count)[cells], 0.0)
        return density / density.sum()

    def edges(self, side: int = 2) -> Tensor:
        """Density of a re-initialised chain at each pixel: the Sobel magnitude, on kept pixels."""
        return self.evened(torch.cat([sobel(image).flatten().double() for image in self.shown()]), side)

    def detail(self, side: int = 2) -> Tensor:
        """The density of detail before any correction: the difference from the surroundings, and a floor."""
        return self.evened(torch.cat([laplacian(image).flatten().double() for image in self.shown()]) + 0.003, side)

    def shown(self) -> list[Tensor]:
        """The images as samplers look at them: colours multiplied by alpha, and nothing hidden by a mask."""
        images = make_images(self.sizes, self.channels, self.ids)
        if self.channels == 4:
            images = [torch.cat((image[..., :3] * image[..., 3:], image[..., 3:]), dim=-1) for image in images]
        return [fill_invalid(*pair) for pair in zip(images, self.per_slot(self.mass() > 0), strict=True)]

    def place(self, indices: Tensor) -> Tensor:
        """Place in that row of (image, row, column); fails for what is not in the cache."""
        slot = torch.tensor([self.ids.index(i) for i in indices[:, 0].tolist()])
        size = torch.tensor(self.sizes)
        start = size.prod(-1).cumsum(0) - size.prod(-1)
        assert ((indices[:, 1:] >= 0) & (indices[:, 1:] < size[slot])).all()
        return start[slot] + indices[:, 1] * size[slot, 1] + indices[:, 2]


CASES = {
    "one size": Case(),
    "list": Case(SIZES),
    "rgba": Case(channels=4),
    "single": Case(((11, 13),), ids=(3,)),
    "mask": Case(masked=True),
    "ignored mask": Case(masked=True, settings=dict(ignore_mask=True)),
    "masked list": Case(SIZES, masked=True),
    "fisheye": Case(settings=dict(fisheye_crop_radius=4.2)),
    "masked fisheye": Case(masked=True, settings=dict(fisheye_crop_radius=4.2)),
    "equirectangular": Case(settings=dict(is_equirectangular=True)),
    "masked equirectangular list": Case(SIZES, channels=4, masked=True, settings=dict(is_equirectangular=True)),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


QUICK = {
    "multinomial": dict(refresh=3),
    "error-map": dict(interval=2),
    "quadtree": dict(reduction=8),
    "detail": dict(interval=2, tile=1),
    "mixture": dict(interval=2, tile=1),
}
"""Settings that change maps within a few steps."""
MINED = [kind for kind, spec in SPECS.items() if not spec.sampler.is_uniform]
MAPPED = [kind for kind in MINED if issubclass(SPECS[kind].sampler, DensitySampler)]
EACH_KIND = pytest.mark.parametrize("kind", SPECS)
EACH_MINED = pytest.mark.parametrize("kind", MINED)
EACH_MAP = pytest.mark.parametrize("kind", MAPPED)


def q_of(indices: Tensor) -> Tensor:
    """A made-up importance of each pixel."""
    image, row, column = indices.unbind(-1)
    return 0.1 + ((5 * image + 3 * row + 7 * column) % 11) / 12


def make_config(kind: str = "langevin", rays: int = 64, **settings) -> MiningPixelSamplerConfig:
    """Settings of the kind go to its group, others to the sampler."""
    own = {f.name for f in fields(MiningPixelSamplerConfig)} & settings.keys()
    group = {name: value for name, value in settings.items() if name not in own}
    config = MiningPixelSamplerConfig(kind=kind, num_rays_per_batch=rays, **{name: settings[name] for name in own})
    return replace(config, **{SPECS[kind].field: replace(config.config_for(kind), **group)})


def make_sampler(
    rays: int = 64,
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    kind: str = "langevin",
    importance: Callable[[Tensor], Tensor] = q_of,
    **settings,
) -> MiningPixelSampler:
    torch.manual_seed(seed)
    sampler = make_config(kind, rays, **settings).setup(num_images=num_images, importance=importance)
    sampler.training = True
    return sampler


def density_of(sampler: MiningPixelSampler) -> PixelDensity | None:
    """The density that the sampler draws from now."""
    return sampler.run.sampler.density(sampler.run.state)


def chains_of(sampler: MiningPixelSampler) -> PixelSamples:
    return PixelSamples(*sampler.run.state.chains)


def replace_chains(sampler: MiningPixelSampler, **fields) -> None:
    state = sampler.run.state
    sampler.run.state = state._replace(chains=state.chains._replace(**fields))


def feed(
    mining: MiningBatch,
    gradient: Tensor | float = 0.0,
    importance: Tensor | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> MiningBatch:
    """Fill in what a training step would, for the given gradient of log Q per pixel and loss scale."""
    count = len(mining.indices)
    mining.importance = torch.rand(count, generator=seeded(seed)) + 0.1 if importance is None else importance
    mining.error = mining.importance.square()
    mining.weighted_error = (mining.error * 1.7).requires_grad_()
    mining.weighted_error.grad = torch.full((count,), scale / count)
    if mining.image_gradient is not None:
        mining.coords = (mining.indices[:, 1:] + 0.5).requires_grad_()
        factor = 2 * mining.weighted_error.grad * mining.weighted_error.detach()
        mining.coords.grad = factor[:, None] * gradient * torch.ones(count, 2)
    return mining


def wild(count: int, seed: int) -> Tensor:
    """Gradients that range from none to nonsense."""
    values = torch.tensor([0.0, 1.0, -100.0, 3e3, -1e30, 1e30, INF, -INF, NAN])
    return values[torch.randint(len(values), (count, 2), generator=seeded(seed))]


def train(sampler: MiningPixelSampler, batch: dict, steps: int, first: int = 0) -> list[dict]:
    """Sample and update with random feedback."""
    results = []
    for step in range(first, first + steps):
        results.append(sampler.sample(batch))
        gradient = torch.randn(len(results[-1]["indices"]), 2, generator=seeded(step))
        sampler.update(feed(results[-1][BATCH_KEY], gradient, seed=step))
    return results


def p_value(counts: Tensor, probability: Tensor) -> float:
    """Of a chi-square test; 0 where something impossible was counted. Rare outcomes are taken together."""
    if counts[probability == 0].any():
        return 0.0
    expected = probability * counts.sum()
    rare = expected < 10
    observed = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def follows(case: Case, indices: Tensor, density: Tensor) -> bool:
    return p_value(torch.bincount(case.place(indices), minlength=len(density)), density) > 1e-4


def assert_true_colours(batch: dict, rays: dict) -> None:
    """The rays' data are those of the pixels that their indices name."""
    slot = {i: n for n, i in enumerate(batch["image_idx"].tolist())}
    for key in ("image", "depth_image", "mask"):
        if key in batch:
            expected = [batch[key][slot[i]][row, column] for i, row, column in rays["indices"].tolist()]
            assert torch.equal(rays[key], torch.stack(expected))


def same(a: tuple, b: tuple) -> bool:
    """Whether two records are the same bit for bit."""
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copy(record: tuple):
    return type(record)(*(part.clone() for part in record))


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def other_cache() -> dict:
    ids = (5, 8, 0, 7)
    return {"image": torch.stack(make_images(ONE_SIZE[:4], ids=ids)), "image_idx": torch.tensor(ids)}
