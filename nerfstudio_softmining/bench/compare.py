"""Uniform sampling, uniform sampling with soft mining's weights, and soft mining, side by side.

    python -m nerfstudio_softmining.bench.compare configs/lite_lego.yaml --data FOLDER --output DIR

Trains each of them with several seeds through nerfstudio's trainer, run by run in turn, and prints the PSNR of held-out
views at chosen iterations with its spread over the seeds, and the time of a training step. What is finished is in
DIR/results.json and is not run again; DIR/convergence.png shows it.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import platform
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import yaml
from matplotlib.figure import Figure
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.models.nerfacto import NerfactoModelConfig
from nerfstudio.scripts.train import _set_random_seed
from nerfstudio.utils.rich_utils import CONSOLE
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nerfstudio_softmining import compat, methods
from nerfstudio_softmining.errors import UserError


@dataclass
class Compare:
    """Compare ways of choosing training pixels on one scene; a file in configs/ gives what flags do not."""

    method: str
    """A method of this plugin, whose settings all runs share."""
    scene: str
    """Folder of the scene, within --data."""
    data: Path = Path(".")
    """Folder that the scene's folder is in."""
    output: Path = Path("outputs/compare")
    """Folder for results.json."""
    variants: tuple[str, ...] = ("uniform", "soft-mining", "uniform-weighted")
    """What to compare; each may be followed by settings of its own, as in soft-mining,drift=0."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    at: tuple[int, ...] = (250, 500, 1000)
    """Iterations at which the held-out views are rendered; the last ends a run."""
    views: tuple[int, ...] = ()
    """Held-out views to render, by their number; all if empty."""
    image_scale: float = 1.0
    """Factor on the resolution of the images as they are on disk."""
    set: tuple[str, ...] = ()
    """Settings of the model, the sampler or the datamanager for all variants, as name=value."""


SHARED = ("method", "scene", "image_scale", "at", "views", "set")
"""Settings that all runs in one results.json share."""


def variant_config(compare: Compare, variant: str, seed: int) -> TrainerConfig:
    """The settings of one run."""
    name, *own = variant.split(",")
    specification = getattr(methods, compare.method.replace("-", "_"), None)
    if specification is None:
        raise UserError(f"--method is {compare.method!r}, which this plugin does not have: see `softmining doctor`.")
    config: TrainerConfig = deepcopy(specification.config)
    pipeline: Any = config.pipeline
    config.data = pipeline.datamanager.data = compare.data / compare.scene
    pipeline.datamanager.camera_res_scale_factor = compare.image_scale
    config.output_dir, config.experiment_name, config.timestamp = compare.output / "runs", variant, str(seed)
    config.machine.seed = seed
    config.vis = "tensorboard"
    if name == "uniform":
        pipeline.model = _as(NerfactoModelConfig, pipeline.model)
        pipeline.datamanager = _as(VanillaDataManagerConfig, pipeline.datamanager, pixel_sampler=PixelSamplerConfig())
    elif name == "uniform-weighted":
        pipeline.datamanager.pixel_sampler.uniform_share, pipeline.datamanager.pixel_sampler.reinit_share = 1.0, 0.0
        pipeline.model.weight_by = "importance"
    elif name != "soft-mining":
        raise UserError(f"--variants has {name!r}: known are uniform, uniform-weighted and soft-mining.")
    for setting in (*compare.set, *own):
        key, value = setting.split("=")
        owners = [
            o for o in (pipeline.model, pipeline.datamanager, pipeline.datamanager.pixel_sampler) if hasattr(o, key)
        ]
        for owner in owners:
            setattr(owner, key, _literal(value))
        if not owners and setting in own:
            raise UserError(f"--variants has {variant!r}: neither the model nor the sampler has a setting {key!r}.")
    return config


def _literal(text: str) -> Any:
    """A number, tuple or truth value as Python writes it, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _as(kind: type, config, **changes):
    """The same settings as an instance of a base class, without what subclasses add."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(kind) if f.name != "_target"}
    return kind(**{**shared, **changes})


def run(compare: Compare, variant: str, seed: int, progress: Progress) -> list[dict]:
    """Train once; one entry for each evaluation."""
    config = variant_config(compare, variant, seed)
    _set_random_seed(seed)
    with compat.lazy_lpips():
        trainer: Trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup(test_mode="test")
    task = progress.add_task(f"{variant}, seed {seed}", total=compare.at[-1])
    entries, durations = [], []
    for step in range(compare.at[-1]):
        start = time.perf_counter()
        trainer.pipeline.train()
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        trainer.train_iteration(step)
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
        progress.advance(task)
        if step + 1 in compare.at:
            metrics = evaluate(trainer, compare.views)
            entries.append(
                {
                    "scene": compare.scene,
                    "method": compare.method,
                    "sampler": variant,
                    "seed": seed,
                    "iteration": step + 1,
                    **metrics,
                    "seconds": round(sum(durations), 2),
                    "seconds_per_step": round(float(np.median(durations)), 4),
                }
            )
            progress.update(task, description=f"{variant}, seed {seed}: {metrics['psnr']:.2f} dB at {step + 1}")
    progress.remove_task(task)
    return entries


@torch.no_grad()
def evaluate(trainer: Trainer, views: tuple[int, ...]) -> dict[str, float]:
    """Mean metrics over the held-out views."""
    pipeline = trainer.pipeline
    assert isinstance(pipeline.datamanager, VanillaDataManager)
    pipeline.eval()
    rows = []
    for view in views or range(len(pipeline.datamanager.eval_dataset)):
        camera, batch = pipeline.datamanager.fixed_indices_eval_dataloader.get_camera(view)
        outputs = pipeline.model.get_outputs_for_camera(camera)
        rows.append(pipeline.model.get_image_metrics_and_images(outputs, batch)[0])
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in ("psnr", "ssim")}


def table(compare: Compare, runs: list[dict]) -> Table:
    """Mean and standard deviation over the seeds."""
    out = Table(
        title=f"{compare.scene}, {compare.method}: held-out PSNR in dB, mean ± standard deviation over the seeds",
        box=box.MARKDOWN,
    )
    for heading in ("sampler", "seeds", *(f"{at} it." for at in compare.at), "median ms a step"):
        out.add_column(heading, justify="left" if heading == "sampler" else "right")
    for variant in dict.fromkeys(r["sampler"] for r in runs):
        mine = [r for r in runs if r["sampler"] == variant]
        cells = []
        for at in compare.at:
            psnr = [r["psnr"] for r in mine if r["iteration"] == at]
            cells.append(
                f"{np.mean(psnr):.2f} ± {np.std(psnr, ddof=1):.2f}" if len(psnr) > 1 else f"{np.mean(psnr):.2f}"
            )
        times = [1000 * r["seconds_per_step"] for r in mine if r["iteration"] == compare.at[-1]]
        out.add_row(variant, str(len(times)), *cells, f"{np.mean(times):.0f} ({min(times):.0f} - {max(times):.0f})")
    return out


def plot(compare: Compare, runs: list[dict]) -> Figure:
    """PSNR against iterations: the mean over the seeds, and each seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, variant in enumerate(dict.fromkeys(r["sampler"] for r in runs)):
        mine = [r for r in runs if r["sampler"] == variant]
        mean = [np.mean([r["psnr"] for r in mine if r["iteration"] == at]) for at in compare.at]
        axes.plot(compare.at, mean, color=f"C{number}", label=variant)
        axes.scatter([r["iteration"] for r in mine], [r["psnr"] for r in mine], color=f"C{number}", s=12, alpha=0.6)
    axes.set(xlabel="iterations", ylabel="PSNR of held-out views (dB)", title=f"{compare.scene}, {compare.method}")
    axes.legend()
    return figure


def main(compare: Compare) -> None:
    """Run what results.json does not have yet, then print the table."""
    if not torch.cuda.is_available():
        compat.prepare_cpu()
    compare.output.mkdir(parents=True, exist_ok=True)
    path = compare.output / "results.json"
    results: dict = json.loads(path.read_text()) if path.exists() else {"runs": []}
    settings = json.loads(json.dumps({name: getattr(compare, name) for name in SHARED}))
    if results.setdefault("settings", settings) != settings:
        raise UserError(
            f"{path} holds runs with other settings ({results['settings']}). Name another --output, or the same "
            f"settings."
        )
    results["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    results["device"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    )
    done = {(r["sampler"], r["seed"]) for r in results["runs"]}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for seed in compare.seeds:
        for variant in compare.variants:
            if (variant, seed) in done:
                continue
            with Progress(*columns, console=CONSOLE) as progress:
                results["runs"] += run(compare, variant, seed, progress)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1))
            part.replace(path)
    CONSOLE.print(table(compare, results["runs"]))
    plot(compare, results["runs"]).savefig(compare.output / "convergence.png", dpi=150)
    CONSOLE.print(f"{path} and convergence.png beside it have all of it.", soft_wrap=True)


def parse(arguments: list[str]) -> Compare:
    """Read the command line: a file in configs/, then flags that override it."""
    if not arguments or not Path(arguments[0]).is_file():
        raise UserError("name a file in configs/ first, such as configs/lite_lego.yaml.")
    settings = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    return tyro.cli(Compare, default=Compare(**values), args=arguments[1:])


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
