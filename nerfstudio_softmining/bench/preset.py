"""What a comparison is of: scenes, samplers, seeds, and when to look. A file in configs/."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.samplers import registry
from nerfstudio_softmining.settings import apply


@dataclass(frozen=True)
class Scene:
    """A scene, and how it is trained on."""

    path: str
    """Folder within --data."""
    method: str
    """Method of this plugin whose settings all samplers share."""
    views: tuple[int, ...] = ()
    """Held-out views to render, by their number; all if empty."""
    image_scale: float = 1.0
    """Factor on the resolution of the images as they are on disk."""
    dataparser: str | None = None
    """Name of the dataparser, such as colmap; the method's own if None."""
    set: tuple[str, ...] = ()
    """Settings of the model, the datamanager or the sampler, as name=value."""


@dataclass(frozen=True)
class Preset:
    """A comparison."""

    title: str
    """What it asks, in a line."""
    scenes: tuple[Scene, ...]
    """Scenes to train on."""
    samplers: tuple[str, ...]
    """What to compare: uniform, uniform-weighted, a kind of sampler, or any nerfstudio method; each may be followed by
    settings of its own, as in langevin,drift=0."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    at: tuple[int, ...] = (250, 500, 1000)
    """Iterations at which the held-out views are rendered; the last ends a run."""
    targets: tuple[float, ...] = ()
    """PSNRs in dB to tell the iterations to; if empty, uniform's own at each of `at`."""
    paper: str | None = None
    """CSV file beside the preset with the paper's figures."""
    folder: Path = field(default=Path("."), compare=False)
    """Folder of the preset's file."""


def read(path: Path) -> Preset:
    """Read a preset.

    Raises:
        UserError: if the file is missing or has what a preset has not.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file. Name a preset, such as configs/lite.yaml.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        scenes = tuple(Scene(**_tuples(scene)) for scene in values.pop("scenes"))
        return Preset(scenes=scenes, folder=path.parent, **_tuples(values))
    except (TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        known = ", ".join(f.name for f in dataclasses.fields(Preset) if f.name != "folder")
        raise UserError(f"{path} is not a preset ({error}). It has the keys {known}; see configs/lite.yaml.") from error


def _tuples(values: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def trainer_config(scene: Scene, sampler: str, seed: int, data: Path, output: Path) -> TrainerConfig:
    """The settings of one run.

    Args:
        scene: what to train on, and by which method.
        sampler: name of the sampler or of another method, and settings of its own after commas.
        seed: seed of the run.
        data: folder that the scene's folder is in.
        output: folder for checkpoints and logs.

    Raises:
        UserError: if the sampler, the method or a setting is not known.
    """
    known = registry.samplers(scenes=True)
    name, own = registry.parse(sampler)
    is_peer = name not in known
    method = name if is_peer else scene.method
    if method not in all_methods:
        names = ", ".join((*known, *registry.ALIASES))
        raise UserError(f"{method!r} is neither a sampler ({names}) nor an installed nerfstudio method.")
    config: TrainerConfig = deepcopy(all_methods[method])  # type: ignore[assignment]
    pipeline: Any = config.pipeline
    if not is_peer and not hasattr(pipeline.datamanager.pixel_sampler, "kind"):
        raise UserError(f"the sampler of {method} cannot be chosen. Name a softmining method for {scene.path}.")
    if scene.dataparser is not None:
        pipeline.datamanager.dataparser = _dataparser(scene.dataparser)
    elif is_peer:
        pipeline.datamanager.dataparser = deepcopy(all_methods[scene.method].pipeline.datamanager.dataparser)
    config.data = pipeline.datamanager.data = data / scene.path
    pipeline.datamanager.camera_res_scale_factor = scene.image_scale
    config.output_dir = output / scene.path.replace("/", "_")
    config.experiment_name, config.timestamp = sampler, str(seed)
    config.machine.seed, config.machine.device_type = seed, compat.device_type()
    config.vis = "tensorboard"
    if not is_peer:
        pipeline.datamanager.pixel_sampler.kind = name
    places = [pipeline.model, pipeline.datamanager, getattr(pipeline.datamanager, "pixel_sampler", None)]
    if not is_peer:
        places.append(pipeline.datamanager.pixel_sampler.config_for(name))
    for setting in (*scene.set, *own):
        apply(setting, places, required=setting in own, sampler=sampler)
    for place in places:
        if hasattr(place, "__post_init__"):
            place.__post_init__()  # refuses what makes no sense
    return config


def _dataparser(name: str) -> Any:
    """A dataparser by its name on the command line."""
    from nerfstudio.configs.dataparser_configs import all_dataparsers

    known = {key.removesuffix("-data"): value for key, value in all_dataparsers.items()}
    if name.removesuffix("-data") not in known:
        raise UserError(f"--dataparser is {name!r}: known are {', '.join(sorted(all_dataparsers))}.")
    return deepcopy(known[name.removesuffix("-data")])
