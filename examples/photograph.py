"""Fit a photograph in a loop of your own, with any sampler of the plugin.

    python examples/photograph.py photo.jpg --sampler detail --steps 1000 --output fitted.png

`softmining image` does the same with a hash grid, checkpoints and a report; this is the whole of it in one file.
"""

from __future__ import annotations

import argparse

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from nerfstudio_softmining.plugin.loss import SoftMinedLoss
from nerfstudio_softmining.samplers.base import SamplerContext
from nerfstudio_softmining.samplers.images import TrainingImages
from nerfstudio_softmining.samplers.registry import samplers
from nerfstudio_softmining.samplers.state import SamplerRun

BATCH = 4096


class Picture(nn.Module):
    """A network with Fourier features of several scales."""

    def __init__(self, octaves: int = 9, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("scales", torch.pi * 2.0 ** torch.arange(octaves))
        layers: list[nn.Module] = [nn.Linear(4 * octaves, width), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(width, 3))

    def forward(self, points: Tensor) -> Tensor:
        """Return colours [n, 3] at points [n, 2] (row, column) of the unit square."""
        angles = (points[:, :, None] * self.scales).flatten(1)
        return self.network(torch.cat((angles.sin(), angles.cos()), dim=-1))


def read(path: str) -> Tensor:
    """Read colours [height, width, 3] in [0, 1]."""
    image = cv2.imread(path)
    if image is None:
        raise SystemExit(f"{path} is not an image that OpenCV reads.")
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).float() / 255


def main() -> None:
    """Fit, print PSNR, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photo")
    known = samplers(scenes=True)
    parser.add_argument("--sampler", choices=sorted(known), default="detail")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--output", default="fitted.png")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    truth = read(arguments.photo)
    size = torch.tensor(truth.shape[:2])
    picture, loss = Picture(), SoftMinedLoss(arguments.alpha, "density")
    optimizer = torch.optim.Adam(picture.parameters(), lr=2e-3)

    generator = torch.Generator().manual_seed(0)
    images = TrainingImages({"image": truth[None], "image_idx": torch.tensor([0])}, num_images=1, generator=generator)

    def importance(pixels: Tensor) -> Tensor:  # for `multinomial`, which looks at all pixels now and then
        with torch.no_grad():
            return (picture((pixels[:, 1:] + 0.5) / size) - truth[pixels[:, 1], pixels[:, 2]]).abs().mean(dim=-1)

    spec = known[arguments.sampler]
    context = SamplerContext(num_images=1, generator=generator, cell_size=1, importance=importance)
    sampler = SamplerRun(spec.sampler, spec.config(), context, images)
    for step in range(arguments.steps):
        samples = sampler.draw(BATCH)
        batch = sampler.batch(samples, step=step)
        position = samples.pixels.pixels + 0.5
        if sampler.sampler.needs_gradient:
            batch.coords = position.requires_grad_()
        loss.batch = batch
        value = loss(images.lookup("image", samples.pixels), picture(position / size))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        sampler.update(batch)

    rows, columns = (torch.arange(length) for length in truth.shape[:2])
    points = (torch.cartesian_prod(rows, columns) + 0.5) / size
    with torch.no_grad():
        fitted = torch.cat([picture(part) for part in points.split(1 << 16)]).view(truth.shape).clamp(0, 1)
    print(f"{arguments.sampler}: {-10 * (fitted - truth).square().mean().log10():.2f} dB")
    cv2.imwrite(arguments.output, np.ascontiguousarray((fitted * 255).round().byte().numpy()[..., ::-1]))


if __name__ == "__main__":
    main()
