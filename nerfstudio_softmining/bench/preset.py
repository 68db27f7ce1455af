"""Presets, the files in configs/: which scenes, samplers and seeds are compared, and when they are evaluated."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import file_name
from nerfstudio_softmining.plugin import compat
from nerfstudio_softmining.samplers import registry
from nerfstudio_softmining.settings import apply, suits

VANILLA = "datamanager=vanilla"
"""Setting of another method: nerfstudio's datamanager that draws rays in the process that trains."""
VIEWER = "vis=viewer"
"""Setting of any run: train with the live viewer, to which no browser is connected."""
BATCH_SIZES = {"train_num_rays_per_batch", "eval_num_rays_per_batch"}


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
    """Settings as name=value: of the model, its SDF field, the dataparser, the datamanager, the sampler, the
    optimizers, their schedulers."""
    same_settings: bool = False
    """Give other nerfstudio methods the model settings, batch size and learning rates of `method`."""
    name: str = ""
    """Name in reports, where several scenes of a preset have the same folder; the folder if empty."""

    @property
    def title(self) -> str:
        """What the scene is called in reports."""
        return self.name or self.path


@dataclass(frozen=True)
class Preset:
    """A comparison."""

    title: str
    """The question of the comparison, in a line."""
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
    """PSNRs in dB to which iterations are counted; if empty, uniform's own at each of `at`."""
    rounds: int = 0
    """Rounds in which steps are timed, the first of which is left out; 0: train and evaluate instead."""
    steps: int = 40
    """Steps of a round."""
    paper: str | None = None
    """CSV file beside the preset with the paper's figures."""
    folder: Path = field(default=Path("."), compare=False)
    """Folder of the preset's file."""


def read(path: Path) -> Preset:
    """Read a preset.

    Raises:
        UserError: if the file is missing or is not a preset.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file. Name a preset, such as configs/lite.yaml.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        scenes = tuple(_checked(Scene(**_tuples(scene))) for scene in values.pop("scenes"))
        return _checked(Preset(scenes=scenes, folder=path.parent, **_tuples(values)))
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError, yaml.YAMLError) as error:
        keys = ", ".join(field.name for field in dataclasses.fields(Preset) if field.name != "folder")
        raise UserError(f"{path} is not a preset ({error}). It has the keys {keys}; see configs/lite.yaml.") from error


Part = TypeVar("Part", Preset, Scene)


def _checked(part: Part) -> Part:
    """Return a preset or a scene whose values have the types of its fields; raise a TypeError for another one."""
    for name, hint in get_type_hints(type(part)).items():
        if name not in ("scenes", "folder") and not suits(getattr(part, name), hint):
            raise TypeError(f"{name} is {getattr(part, name)!r}")
    return part


def _tuples(values: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def trainer_config(
    scene: Scene, sampler: str, seed: int, data: Path, output: Path, used: set[str] | None = None
) -> TrainerConfig:
    """Return the settings of one run.

    Args:
        scene: scene to train on, and its method.
        sampler: name of the sampler or of another method, and settings of its own after commas.
        seed: seed of the run.
        data: folder that the scene's folder is in.
        output: folder for checkpoints and logs.
        used: collects the settings that this run has, if given.

    Raises:
        UserError: if there is no such sampler, method or setting.
    """
    specs = registry.samplers(scenes=True)
    name, sampler_settings = registry.parse(sampler)
    is_sampler = name in specs
    has_viewer = VIEWER in sampler_settings
    sampler_settings = [setting for setting in sampler_settings if setting != VIEWER]
    method = scene.method if is_sampler else name
    if method not in all_methods:
        names = ", ".join((*specs, *registry.ALIASES))
        raise UserError(f"{method!r} is neither a sampler ({names}) nor an installed nerfstudio method.")
    config: TrainerConfig = deepcopy(all_methods[method])  # type: ignore[assignment]
    if not is_sampler and VANILLA in sampler_settings:
        sampler_settings.remove(VANILLA)
        config.pipeline.datamanager = VanillaDataManagerConfig()
    if not is_sampler and scene.same_settings:
        config = _with_settings_of(all_methods[scene.method], config)
    model, manager = config.pipeline.model, cast(Any, config.pipeline.datamanager)
    configs = [model, getattr(model, "sdf_field", None), manager, getattr(manager, "pixel_sampler", None)]
    configs += [part for group in config.optimizers.values() for part in group.values()]
    if is_sampler:
        if not hasattr(manager.pixel_sampler, "kind"):
            raise UserError(f"the sampler of {method} cannot be chosen. Name a softmining method for {scene.path}.")
        manager.pixel_sampler.kind = name
        configs.append(manager.pixel_sampler.config_for(name))
    if scene.dataparser is not None:
        manager.dataparser = _dataparser(scene.dataparser)
    elif not is_sampler:
        manager.dataparser = deepcopy(cast(Any, all_methods[scene.method]).pipeline.datamanager.dataparser)
    configs.append(manager.dataparser)
    config.data = manager.data = data / scene.path
    manager.camera_res_scale_factor = scene.image_scale
    config.output_dir = output / file_name(scene.title)
    config.experiment_name, config.timestamp = file_name(sampler), str(seed)
    config.machine.seed, config.machine.device_type = seed, compat.device_type()
    config.vis = "viewer+tensorboard" if has_viewer else "tensorboard"
    for setting in (*scene.set, *sampler_settings):
        if apply(setting, configs, required=setting in sampler_settings, sampler=sampler) and used is not None:
            used.add(setting)
    for part in configs:
        if hasattr(part, "__post_init__"):
            part.__post_init__()  # checks the values
    return config


def _with_settings_of(ours: TrainerConfig, theirs: TrainerConfig) -> TrainerConfig:
    """Return a method with the model settings, batch size, precision and learning rates of another."""
    config = deepcopy(ours)
    config.pipeline, config.method_name = theirs.pipeline, theirs.method_name
    for part, other, names in (
        (config.pipeline.model, ours.pipeline.model, vars(config.pipeline.model).keys() - {"_target"}),
        (config.pipeline.datamanager, ours.pipeline.datamanager, BATCH_SIZES),
    ):
        for name in names & vars(other).keys():
            setattr(part, name, deepcopy(getattr(other, name)))
    for group in config.optimizers.values():
        group["optimizer"] = AdamOptimizerConfig(lr=group["optimizer"].lr, eps=group["optimizer"].eps)
    return config


def _dataparser(name: str) -> Any:
    """Return the settings of a dataparser by its name on the command line."""
    dataparsers = {key.removesuffix("-data"): value for key, value in all_dataparsers.items()}
    if name.removesuffix("-data") not in dataparsers:
        raise UserError(f"--dataparser is {name!r}: known are {', '.join(sorted(all_dataparsers))}.")
    return deepcopy(dataparsers[name.removesuffix("-data")])
