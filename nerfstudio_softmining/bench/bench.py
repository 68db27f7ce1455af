"""`softmining bench`: samplers side by side on real scenes, through nerfstudio's own trainer."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from nerfstudio.engine.trainer import TrainerConfig

from nerfstudio_softmining.bench import report
from nerfstudio_softmining.bench.preset import Preset, Scene, read, trainer_config
from nerfstudio_softmining.bench.results import Results, check_flags, make_progress
from nerfstudio_softmining.bench.step_time import run_step_time
from nerfstudio_softmining.bench.training import Run, train
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import file_name
from nerfstudio_softmining.plugin import compat


def run_bench(
    path: Path, data: Path, output: Path, changes: dict, prepare: Callable[[TrainerConfig], None] = lambda config: None
) -> bool:
    """Train the runs of a preset that are not finished, then write the report.

    Args:
        path: the preset's file.
        data: folder that the scenes' folders are in.
        output: folder for everything that comes out.
        changes: values of flags, which replace the preset's; empty or None for flags that are not given.
        prepare: changes the settings of each run before it starts.

    Returns:
        Whether every run went well.

    Raises:
        UserError: for a preset, a flag or data that cannot be used, before anything is trained.
    """
    preset = override(read(path), changes)
    _check(preset, data, output)
    if preset.rounds:
        return run_step_time(preset, data, output)
    results = Results(output, preset.at, {scene.title: dataclasses.asdict(scene) for scene in preset.scenes})
    runs = list(product(preset.seeds, preset.scenes, preset.samplers))
    if not torch.cuda.is_available():
        compat.prepare_cpu()
    last = preset.at[-1]
    with make_progress() as progress:
        total = progress.add_task("all runs", total=len(runs) * last)

        def run(number: int, seed: int, scene: Scene, sampler: str, name: str) -> None:
            entries = results.entries(scene.title, sampler, seed)
            if entries and entries[-1]["iteration"] == last:
                return
            task = progress.add_task(name, total=last)

            def on_step(iteration: int) -> None:
                progress.update(task, completed=iteration)
                progress.update(total, completed=number * last + iteration)

            def on_evaluation(entry: dict) -> None:
                results.add(scene.title, sampler, seed, {"method": scene.method, **entry})
                progress.update(task, description=f"{name}: {entry['psnr']:.2f} dB at {entry['iteration']}")

            is_first = seed == preset.seeds[0]
            pictures = output / "pictures" / file_name(scene.title) / file_name(sampler) if is_first else None
            config = trainer_config(scene, sampler, seed, data, output / "runs")
            config.max_num_iterations = last  # over which learning rates may fall
            prepare(config)
            try:
                train(Run(config, preset.at, scene.views, entries, pictures), on_evaluation, on_step)
            finally:
                progress.remove_task(task)

        for number, (seed, scene, sampler) in enumerate(runs):
            name = f"{scene.title}, {sampler}, seed {seed}"
            with results.recording_failure(name):
                run(number, seed, scene, sampler, name)
            progress.update(total, completed=(number + 1) * last)
            gc.collect()  # a trainer is full of cycles, and holds its memory until they are found
    if results.content["runs"]:
        report.write(preset, results.content, output)
        report.print_summary(preset, results.content, output)
    return not results.content["failures"]


def _check(preset: Preset, data: Path, output: Path) -> None:
    """Find mistakes in a preset and its data before hours have gone by."""
    if preset.rounds == 1 or preset.rounds < 0 or preset.steps < 1:
        raise UserError(
            f"rounds is {preset.rounds} and steps is {preset.steps} in {preset.title!r}: the first round is left out. "
            "Set rounds to 2 or more, and steps to 1 or more."
        )
    for scene in preset.scenes:
        used: set[str] = set()
        for seed, sampler in product(preset.seeds, preset.samplers):
            trainer_config(scene, sampler, seed, data, output / "runs", used)
        if unused := [setting for setting in scene.set if setting not in used]:
            raise UserError(
                f"{unused[0]!r}, of --set or of the preset, is a setting of no run of {scene.title}. Check its name."
            )
        if not (data / scene.path).is_dir():
            raise UserError(f"--data is {data}, which has no folder {scene.path}. Name the folder that it is in.")


def override(preset: Preset, changes: dict) -> Preset:
    """Return the preset with the values of flags in place of its own; those of --set are added to them.

    Raises:
        UserError: if the value of a flag cannot be used.
    """
    given = {key: value for key, value in changes.items() if value not in (None, ())}
    known = {scene.title: scene for scene in preset.scenes}
    titles = given.pop("scenes", [scene.title for scene in preset.scenes])
    missing = [title for title in titles if title not in known]
    if missing and "method" not in given:
        raise UserError(
            f"--scenes has {missing[0]!r}, which is not in the preset ({', '.join(known)}). Name --method for it."
        )
    scene_changes = {field.name: given.pop(field.name) for field in dataclasses.fields(Scene) if field.name in given}
    more = scene_changes.pop("set", ())  # after the preset's own, as the last value of a setting counts
    chosen = [known.get(title, Scene(title, method="")) for title in titles]
    scenes = tuple(dataclasses.replace(scene, set=(*scene.set, *more), **scene_changes) for scene in chosen)
    preset = dataclasses.replace(preset, scenes=scenes, **given)
    check_flags(preset.at, scenes=preset.scenes, samplers=preset.samplers, seeds=preset.seeds)
    return preset
