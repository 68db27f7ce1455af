"""`softmining bench`: samplers side by side on real scenes, through nerfstudio's own trainer."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nerfstudio_softmining.bench import report
from nerfstudio_softmining.bench.preset import Preset, Scene, read, trainer_config
from nerfstudio_softmining.bench.results import Results
from nerfstudio_softmining.bench.training import Run, train
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def run_bench(
    path: Path, data: Path, output: Path, changes: dict, prepare: Callable[[TrainerConfig], None] = lambda config: None
) -> bool:
    """Run what a preset asks for and has not been run yet, then report.

    Args:
        path: the preset's file.
        data: folder that the scenes' folders are in.
        output: folder for everything that comes out.
        changes: what flags say instead of the preset; empty or None where they say nothing.
        prepare: changes the settings of each run before it starts.

    Returns:
        Whether every run went well.

    Raises:
        UserError: for a preset, a flag or data that cannot be used, before anything is run.
    """
    preset = override(read(path), changes)
    results = Results(output, preset.at, {scene.path: dataclasses.asdict(scene) for scene in preset.scenes})
    jobs = list(product(preset.seeds, preset.scenes, preset.samplers))
    for seed, scene, sampler in jobs:
        trainer_config(scene, sampler, seed, data, output / "runs")  # to find mistakes before hours have gone by
    for scene in preset.scenes:
        if not (data / scene.path).is_dir():
            raise UserError(f"--data is {data}, which has no folder {scene.path}. Name the folder that it is in.")
    if not torch.cuda.is_available():
        compat.prepare_cpu()
    with Progress(*COLUMNS, console=CONSOLE) as progress:
        everything = progress.add_task("all runs", total=len(jobs) * preset.at[-1])
        for number, (seed, scene, sampler) in enumerate(jobs):
            entries = results.entries(scene.path, sampler, seed)
            if entries and entries[-1]["iteration"] == preset.at[-1]:
                progress.update(everything, completed=(number + 1) * preset.at[-1])
                continue
            name = f"{scene.path}, {sampler}, seed {seed}"
            task = progress.add_task(name, total=preset.at[-1])

            def advance(done: int, task=task, number=number) -> None:
                progress.update(task, completed=done)
                progress.update(everything, completed=number * preset.at[-1] + done)

            def evaluated(entry: dict, task=task, name=name, scene=scene, sampler=sampler, seed=seed) -> None:
                results.add(scene.path, sampler, seed, {"method": scene.method, **entry})
                progress.update(task, description=f"{name}: {entry['psnr']:.2f} dB at {entry['iteration']}")

            is_shown = seed == preset.seeds[0]
            pictures = output / "pictures" / scene.path.replace("/", "_") / sampler if is_shown else None
            config = trainer_config(scene, sampler, seed, data, output / "runs")
            prepare(config)
            try:
                train(Run(config, preset.at, scene.views, entries, pictures), evaluated, advance)
                results.succeeded(name)
            except Exception as error:  # whatever it is, the other runs can still be made
                results.failed(name, f"{type(error).__name__}: {error}")
                CONSOLE.print(f"[red]{name} failed: {results.content['failures'][name]}[/red]")
            gc.collect()  # a trainer is full of cycles, and holds its memory until they are found
            progress.remove_task(task)
    if results.content["runs"]:
        report.write(preset, results.content, output)
        for scene in report.scenes_of(results.content["runs"]):
            CONSOLE.rule(scene)
            for table in report.tables(preset.targets, [r for r in results.content["runs"] if r["scene"] == scene]):
                CONSOLE.print(table)
        CONSOLE.print(f"{output / 'report.md'} has all of it, with plots and pictures.", soft_wrap=True)
    return not results.content["failures"]


def override(preset: Preset, changes: dict) -> Preset:
    """The preset with what flags say instead.

    Raises:
        UserError: if a flag asks for what makes no sense.
    """
    given = {key: value for key, value in changes.items() if value not in (None, ())}
    scenes = preset.scenes
    if "scenes" in given:
        known = {scene.path: scene for scene in scenes}
        missing = [path for path in given["scenes"] if path not in known and "method" not in given]
        if missing:
            raise UserError(
                f"--scenes has {missing[0]!r}, which the preset has not ({', '.join(known)}). Name --method for it."
            )
        scenes = tuple(known.get(path, Scene(path, given.get("method", ""))) for path in given["scenes"])
    of_scene = {f.name for f in dataclasses.fields(Scene)} & given.keys()
    scenes = tuple(dataclasses.replace(scene, **{key: given[key] for key in of_scene}) for scene in scenes)
    of_preset = {key: given[key] for key in ("samplers", "seeds", "at") if key in given}
    preset = dataclasses.replace(preset, scenes=scenes, **of_preset)
    if not preset.at or sorted(set(preset.at)) != list(preset.at) or preset.at[0] < 1:
        raise UserError(f"--at is {list(preset.at)}: it is iterations in rising order, such as 250 500 1000.")
    for name in ("scenes", "samplers", "seeds"):
        values = getattr(preset, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} is {list(values)}: name at least one, and each once.")
    return preset
