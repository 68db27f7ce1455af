"""The fit of one field to one photograph: training step, evaluation and checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.image import PeakSignalNoiseRatio

from nerfstudio_softmining import files
from nerfstudio_softmining.errors import UserError, naming_flags
from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.field import Field
from nerfstudio_softmining.images.photo import Encoding, Photo
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.plugin.loss import SoftMinedLoss
from nerfstudio_softmining.samplers import registry
from nerfstudio_softmining.samplers.base import MiningBatch, SamplerConfig, SamplerContext
from nerfstudio_softmining.samplers.images import TrainingImages
from nerfstudio_softmining.samplers.state import SamplerRun
from nerfstudio_softmining.settings import apply, check

DEFAULT_ALPHA = 0.6
"""Softness of samplers that have none of their own (section 4.1 of the paper)."""
LEARNING_RATE_DECAY = 0.33
"""Factor on the learning rate, as in Instant-NGP's settings for photographs."""
AVERAGE_EVERY = 10
"""Steps between two updates of the averaged weights."""
AVERAGE_DECAY = 0.99
"""Decay a step of the averaged weights, which are rendered; as in Instant-NGP's settings for photographs."""
PSNR_PIXELS = 1 << 20
"""Pixels of which PSNR is computed, in photographs that have more."""
CHUNK = 1 << 16
"""Points that are evaluated at a time."""
RECENT_BATCHES = 50
"""Batches whose draws are shown."""
PARTS = ("field", "average", "optimizer", "scheduler", "run")
"""Attributes of a fit whose states are in its checkpoints."""


@dataclass
class Settings:
    """Settings of one fit."""

    sampler: str
    """Way of choosing points, with settings of its own after commas, as in langevin,drift=0."""
    seed: int
    """Seed of the field's start and of the draws."""
    iterations: int
    """Training steps."""
    config: FitConfig
    """Settings of the training, with those named after the sampler applied."""
    sampler_config: SamplerConfig
    """Settings of the sampler itself."""

    @property
    def kind(self) -> str:
        """Return the name of the sampler, without settings."""
        return registry.parse(self.sampler)[0]


def make_settings(sampler: str, seed: int, iterations: int, config: FitConfig) -> Settings:
    """Return the settings of a fit from those of the command line.

    Raises:
        UserError: if the sampler is unknown, or a setting of its own makes no sense.
    """
    kind, sampler_settings = registry.parse(sampler)
    specs = registry.samplers()
    if kind not in specs:
        raise UserError(f"--samplers has {kind!r}. Photographs have {', '.join((*specs, *registry.ALIASES))}.")
    config, defaults = deepcopy(config), specs[kind].sampler.photo_settings
    sampler_config = specs[kind].config(**{name: value for name, value in defaults.items() if name != "alpha"})
    if config.alpha is None:
        config.alpha = defaults.get("alpha", DEFAULT_ALPHA)
    for setting in sampler_settings:
        apply(setting, (config, sampler_config), required=True, sampler=sampler)
    config.__post_init__()
    with naming_flags(lambda name: sampler_flag(kind, name)):
        check(sampler_config)
    return Settings(sampler, seed, iterations, config, sampler_config)


def sampler_flag(kind: str, name: str) -> str:
    """Return the command-line flag of a sampler's field."""
    return "--batch" if name == "num_rays" else f"--samplers {kind},{name}"


class Fit:
    """A field in training.

    Args:
        photo: the photograph, on the device of the training.
        settings: settings of the fit.
    """

    def __init__(self, photo: Photo, settings: Settings) -> None:
        self.photo, self.settings, self.config = photo, settings, settings.config
        device = photo.values.device
        self.size = torch.tensor(photo.size, dtype=torch.float32, device=device)
        torch.manual_seed(settings.seed)
        self.field = Field(self.config, photo.values.shape[2], device)
        self.average = AveragedModel(self.field, multi_avg_fn=self._average, use_buffers=False)
        fused = compat.has_fused_adam(device)
        self.optimizer = torch.optim.Adam(self.field.parameters(), self.config.learning_rate, eps=1e-15, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, self.config.decay_at, LEARNING_RATE_DECAY)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        assert self.config.alpha is not None, "settings come from make_settings"
        self.loss = SoftMinedLoss(self.config.alpha, self.config.weight_by)
        self.run = self._make_run()
        self.iteration = 0
        self.drawn: deque[Tensor] = deque(maxlen=RECENT_BATCHES)
        """Positions of the last batches."""

    def _make_run(self) -> SamplerRun:
        context = SamplerContext(
            num_images=1,
            generator=self.generator,
            cell_size=1,
            importance=lambda indices: self.residual(indices[:, 1:]).abs().mean(dim=-1),
            residual=self.residual,
            num_iterations=self.settings.iterations,
        )
        batch = {"image": self.photo.values[None], "image_idx": torch.zeros(1, dtype=torch.int64)}
        images = TrainingImages(batch, 1, premultiplied=True, generator=self.generator)
        spec = registry.samplers()[self.settings.kind]
        return SamplerRun(spec.sampler, self.settings.sampler_config, context, images)

    def step(self) -> None:
        """Train on one batch."""
        batch, position = self.draw()
        num_moving = batch.num_chains or None  # without chains, a sampler may need the gradient of all points
        loss = self.loss(self.photo.at(batch.indices[:, 1:]), self.field(position / self.size, num_moving))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer_step()
        self.update(batch, position)

    def draw(self) -> tuple[MiningBatch, Float[Tensor, "n 2"]]:
        """Return the batch of a step and the centres (row, column) of its pixels.

        A field that fits the pixels' own colours at their centres converges faster than one that fits colours
        interpolated between them. Chains keep their places within the pixels.
        """
        with naming_flags(lambda name: sampler_flag(self.settings.kind, name)):
            samples = self.run.draw(self.config.batch)
        batch = self.run.batch(samples, step=self.iteration)
        position = batch.indices[:, 1:] + 0.5
        if self.run.sampler.needs_gradient:
            batch.coords = position.requires_grad_()
        self.loss.batch = batch
        return batch, position

    def optimizer_step(self) -> None:
        """Update the weights, and every few steps their average."""
        self.optimizer.step()
        self.scheduler.step()
        if self.iteration % AVERAGE_EVERY == 0:
            self.average.update_parameters(self.field)

    def update(self, batch: MiningBatch, position: Float[Tensor, "n 2"]) -> None:
        """Update the sampler after the backward pass of a step."""
        self.run.update(batch)
        self.drawn.append(position.detach())
        self.iteration += 1

    def _average(self, averaged, current, _: Tensor | int) -> None:
        """Update the averaged weights, with less decay at first, so that early pictures show what has been learnt."""
        updates = self.iteration // AVERAGE_EVERY
        decay = min(AVERAGE_DECAY**AVERAGE_EVERY, (1 + updates) / (10 + updates))
        get_ema_multi_avg_fn(decay)(averaged, current, updates)

    @torch.no_grad()
    def predict(self, points: Float[Tensor, "n 2"]) -> Float[Tensor, "n c"]:
        """Return values of the averaged field at points (row, column) of the unit square."""
        return torch.cat([self.average(chunk) for chunk in points.split(CHUNK)])

    @torch.no_grad()
    def residual(self, pixels: Int64[Tensor, "n 2"]) -> Float[Tensor, "n c"]:
        """Return the field, not averaged, minus the photograph at the centres of pixels (row, column)."""
        return torch.cat(
            [self.field((chunk + 0.5) / self.size) - self.photo.at(chunk) for chunk in pixels.split(CHUNK)]
        )

    def psnr(self, count: int = PSNR_PIXELS) -> float:
        """Return the PSNR in dB over `count` pixels, or over all if there are no more.

        One pixel is taken at random of each of as many equal parts, always the same.
        """
        height, width = self.photo.size
        device, total = self.size.device, height * width
        metric = PeakSignalNoiseRatio(data_range=1.0).to(device)
        generator = torch.Generator().manual_seed(0)
        for start in range(0, min(count, total), CHUNK):
            index = torch.arange(start, min(start + CHUNK, count, total), dtype=torch.float64)
            if count < total:
                index = (index + torch.rand(len(index), generator=generator, dtype=torch.float64)) * (total / count)
            index = index.long().clamp_max(total - 1).to(device)
            pixels = torch.stack((index // width, index % width), dim=-1)
            truth = self.photo.at(pixels)
            metric.update(self.predict((pixels + 0.5) / self.size).clamp(0, 1), truth)
        return float(metric.compute())

    def render(self, size: tuple[int, int]) -> Iterator[Float[Tensor, "rows w c"]]:
        """Yield a picture of the given height and width, some rows at a time, on the CPU."""
        return render(self.average.module, size, self.size.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoint from which `load_state_dict` resumes."""
        state = {name: getattr(self, name).state_dict() for name in PARTS}
        del state["scheduler"]["milestones"]  # a Counter, which torch 2.1 does not load safely; the settings have them
        return {
            "photo": {"size": self.photo.size},
            "encoding": dataclasses.asdict(self.photo.encoding),
            "sampler": self.settings.sampler,
            "seed": self.settings.seed,
            "config": dataclasses.asdict(self.config),
            "iteration": self.iteration,
            **state,
            "generator": self.generator.get_state(),
            "drawn": list(self.drawn),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint of the same photograph and settings."""
        self.iteration = state["iteration"]
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.drawn.extend(state["drawn"])


def fingerprint(photo: Photo) -> str:
    """Return a hash of the values of a photograph."""
    return hashlib.sha256(photo.values.cpu().numpy().data).hexdigest()[:16]


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint beside the previous one, then replace that, so that a crash leaves a whole one."""
    # by Python's own file, whose errors have a reason
    with files.replacing(path) as part, part.open("wb") as file:
        torch.save(state, file)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        UserError: if the file is missing or is not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file. Name the checkpoint.pt of an image fit.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises almost anything
        raise UserError(f"{path} is not the checkpoint of an image fit ({error}).") from error
    if not isinstance(state, dict) or not {"average", "encoding", "config", "photo"} <= state.keys():
        raise UserError(f"{path} is not the checkpoint of an image fit. Name a checkpoint.pt in its runs/.")
    return state


def load_field(state: dict[str, Any], device: torch.device) -> tuple[nn.Module, Encoding]:
    """Return the averaged field of a checkpoint, and the encoding of its photograph's file."""
    config = FitConfig(**{**state["config"], "decay_at": tuple(state["config"]["decay_at"])})
    encoding = Encoding(**state["encoding"])
    with compat.fork_random_state():
        average = AveragedModel(Field(config, encoding.channels, device))
    average.load_state_dict(state["average"])
    return average.module, encoding


@torch.no_grad()
def render(field: nn.Module, size: tuple[int, int], device: torch.device) -> Iterator[Float[Tensor, "rows w c"]]:
    """Yield a picture of the given height and width, some rows at a time, on the CPU."""
    height, width = size
    rows = max(1, CHUNK // width)
    column = (torch.arange(width, device=device) + 0.5) / width
    for start in range(0, height, rows):
        row = (torch.arange(start, min(start + rows, height), device=device) + 0.5) / height
        points = torch.cartesian_prod(row, column)
        yield torch.cat([field(chunk) for chunk in points.split(CHUNK)]).view(len(row), width, -1).cpu()
