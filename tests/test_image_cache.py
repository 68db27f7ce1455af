"""The cache of images holds what nerfstudio's does, at far less memory."""

from __future__ import annotations

import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from nerfstudio.data.utils.dataloaders import CacheDataloader
from torch.utils.data import Dataset

from nerfstudio_softmining.plugin.dataset import ImageCache
from nerfstudio_softmining.samplers.images import TrainingImages

SIZES = {"one size": [(4, 5)] * 7, "mixed sizes": [(4, 5), (4, 5), (6, 3), (4, 5), (2, 2)]}


class Images(Dataset):
    """Images, masks and what is not per pixel, as nerfstudio's data sets give them."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = [torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image = self.images[index]
        return {"image_idx": index, "image": image, "mask": image[..., :1] > 99, "name": f"{index}.png"}


def load(cache: type[CacheDataloader], sizes: str, **settings) -> dict:
    random.seed(3)
    return next(iter(cache(Images(SIZES[sizes]), device="cpu", **settings)))


@pytest.mark.parametrize("count", [-1, 3])
def test_it_holds_what_nerfstudios_cache_holds(count):
    ours, theirs = (load(cache, "one size", num_images_to_sample_from=count) for cache in (ImageCache, CacheDataloader))
    assert ours.keys() == theirs.keys() and ours["name"] == theirs["name"]
    for key in ("image_idx", "image", "mask"):
        assert ours[key].dtype == theirs[key].dtype
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("count", [-1, 4])
def test_images_of_different_sizes_stay_apart(count):
    batch, source = load(ImageCache, "mixed sizes", num_images_to_sample_from=count), Images(SIZES["mixed sizes"])
    assert len(batch["image"]) == len(batch["mask"]) == (5 if count == -1 else count)
    for place, index in enumerate(batch["image_idx"].tolist()):
        assert torch.equal(batch["image"][place], source[index]["image"])
        assert torch.equal(batch["mask"][place], source[index]["mask"])


@pytest.mark.parametrize("rounded", [False, True], ids=["as their cameras say", "one is not"])
def test_images_of_different_sizes_are_views_of_one_tensor(rounded):
    sizes = SIZES["mixed sizes"]
    source = Images(sizes)
    told = [(4, 6), *sizes[1:]] if rounded else sizes  # nerfstudio rounds sizes in one place and not in another
    height, width = torch.tensor(told)[:, :, None].unbind(1)
    source.cameras = SimpleNamespace(height=height, width=width)
    batch = next(iter(ImageCache(source, device="cpu")))
    for place, index in enumerate(batch["image_idx"].tolist()):
        assert torch.equal(batch["image"][place], source[index]["image"])
    del batch["name"]
    before = [image.data_ptr() for image in batch["image"]]
    images = TrainingImages(batch, len(source))
    assert ([image.data_ptr() for image in batch["image"]] == before) != rounded
    samples = images.uniform(50)
    row, column = samples.pixels.unbind(-1)
    expected = [source.images[i][r, c] / 255 for i, r, c in zip(samples.image_index, row, column, strict=True)]
    assert torch.equal(images.lookup("image", samples), torch.stack(expected))


def test_images_are_not_in_memory_twice():
    alive, most = 0, 0

    def forget() -> None:
        nonlocal alive
        alive -= 1

    class Counted(Images):
        def __getitem__(self, index: int) -> dict:
            nonlocal alive, most
            decoded = self.images[index].numpy().copy()
            weakref.finalize(decoded, forget)
            alive += 1
            most = max(most, alive)
            return {"image_idx": index, "image": torch.from_numpy(decoded)}

    batch = next(iter(ImageCache(Counted([(4, 5)] * 200), device="cpu")))
    assert len(batch["image"]) == 200 and 0 < most < 100
