"""A sampler together with its state: saving, loading and moving it, and keeping what is about images out of cache."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from nerfstudio_softmining.samplers.base import MiningBatch, Sampler, SamplerConfig, SamplerContext, Samples
from nerfstudio_softmining.samplers.images import TrainingImages


def save(state: Any, exclude: tuple[str, ...] = ()) -> Any:
    """Turn a state into dictionaries, lists, tensors and numbers, as a checkpoint can hold it.

    Args:
        state: a NamedTuple, or anything that one is made of.
        exclude: fields to leave out; a field of a field as `outer.inner`.
    """
    if hasattr(state, "_asdict"):
        inner = {
            name: tuple(path[len(name) + 1 :] for path in exclude if path.startswith(f"{name}."))
            for name in state._fields
        }
        return {name: save(value, inner[name]) for name, value in state._asdict().items() if name not in exclude}
    if isinstance(state, tuple):
        return [save(value) for value in state]
    return state.clone() if isinstance(state, Tensor) else state


def load(kind: Any, saved: Any, device: torch.device, default: Any = None) -> Any:
    """Return what [save][] was given, with its tensors on a device.

    Args:
        kind: type of the value, such as the class of the state.
        saved: what [save][] returned.
        device: where the tensors go.
        default: a value of the same type, whose fields stand in for those that were left out.
    """
    if isinstance(saved, Tensor):
        return saved.to(device)
    if isinstance(saved, dict):
        record = next(part for part in (kind, *get_args(kind)) if hasattr(part, "_fields"))
        hints = get_type_hints(record)
        defaults = default._asdict() if default is not None else {}
        loaded = {name: load(hints[name], value, device, defaults.get(name)) for name, value in saved.items()}
        return record(**(defaults | loaded))
    if isinstance(saved, list):
        return tuple(load(get_args(kind)[0], value, device) for value in saved)
    return saved


class SamplerRun:
    """A sampler in use: settings, images and state, and what is known of images that have left the cache.

    Args:
        sampler: class of the sampler.
        config: its settings.
        context: what it is given of the training.
        images: the images cached now.
        saved: what [state_dict][] returned, to go on from there.
    """

    def __init__(
        self,
        sampler: type[Sampler],
        config: SamplerConfig,
        context: SamplerContext,
        images: TrainingImages,
        saved: dict | None = None,
    ) -> None:
        self.context = context
        self.sampler = sampler(config, context, images)
        self.evicted: dict[int, dict[str, Tensor]] = {}
        """Image fields of images seen before, by image index; on the CPU."""
        self.state: Any = self.sampler.rebuild(self.sampler.init())
        if saved is not None:
            self.load_state_dict(saved)

    def replace_images(self, images: TrainingImages) -> None:
        """Go on with other images. What is known of each image is kept, and used again when it comes back."""
        state = self.sampler.flush(self.state)
        self.evicted = self._by_image(state)
        self.sampler = type(self.sampler)(self.sampler.config, self.context, images)
        self.state = self._restored(self.sampler.init(state))

    def draw(self, count: int) -> Samples:
        """Draw the pixels of a batch."""
        samples, self.state = self.sampler.draw(self.state, count)
        return samples

    def batch(self, samples: Samples, **fields: Any) -> MiningBatch:
        """Return the record of a batch that the training step fills in."""
        pixels, config = samples.pixels, self.sampler.config
        return MiningBatch(
            pixels.indices,
            pixels.density_ratio,
            samples.num_uniform,
            pixels.follows_importance,
            config.importance_weighted,
            config.alpha_warmup,
            samples.num_chains,
            samples.restarted,
            **fields,
        )

    def update(self, batch: MiningBatch, applied: Tensor | bool = True) -> None:
        """Update from a batch after `backward()`. `applied` is False where the optimizer skipped the step."""
        self.state = self.sampler.update(self.state, batch, applied)

    def _by_image(self, state: Any) -> dict[int, dict[str, Tensor]]:
        """Return the image fields of all images known, by image index."""
        parts, sampler = dict(self.evicted), self.sampler
        if sampler.image_fields:
            fields = {name: attrgetter(name)(state).cpu() for name in sampler.image_fields}
            for index, image in enumerate(sampler.images.image_index.tolist()):
                part = sampler.image_slice(index)
                parts[image] = {name: field[..., part].clone() for name, field in fields.items()}
        return parts

    def _restored(self, state: Any) -> Any:
        """Return the state with the image fields of known images, as far as these have the same size."""
        sampler = self.sampler
        for index, image in enumerate(sampler.images.image_index.tolist() if sampler.image_fields else ()):
            part = sampler.image_slice(index)
            for name, values in self.evicted.get(image, {}).items():
                field = attrgetter(name)(state)
                if values.shape[-1] == part.stop - part.start:
                    field[..., part] = values.to(field.device)
        return sampler.rebuild(state)

    def state_dict(self) -> dict[str, Any]:
        """Return all that it takes to go on bit for bit, as a checkpoint can hold it."""
        return {
            "state": save(self.state, (*self.sampler.derived_fields, *self.sampler.image_fields)),
            "images": self.sampler.images.image_index,
            "sizes": self.sampler.images.sizes,
            "by_image": self._by_image(self.state),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint; as from other images where their numbers or sizes are others."""
        sampler, images = self.sampler, self.sampler.images
        self.evicted = saved["by_image"]
        state = load(sampler.state_class, saved["state"], images.device, sampler.init())
        is_same = torch.equal(saved["images"].to(images.device), images.image_index)
        if not is_same or list(map(tuple, saved["sizes"])) != images.sizes:
            state = sampler.init(state)
        self.state = self._restored(state)
