"""What a training step costs: methods in turn, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer
from nerfstudio.scripts.train import _set_random_seed
from nerfstudio.utils.rich_utils import CONSOLE
from rich.text import Text
from torch.profiler import ProfilerActivity, profile

from nerfstudio_softmining import files
from nerfstudio_softmining.bench.preset import Preset, Scene, trainer_config
from nerfstudio_softmining.bench.report import make_table, markdown_file
from nerfstudio_softmining.bench.results import device_name, make_progress
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.plugin import compat

STAGES = ("draw", "rays", "batch", "forward", "loss", "backward", "optimizers", "update")
"""Parts of a step: choosing pixels, their rays, the rest of making a batch, the model, its losses, the backward pass,
the optimizers, and what methods do after a step (the update of a sampler, a schedule)."""
PROFILED_STEPS = 10


@dataclass
class Cost:
    """What a method costs on a scene."""

    seconds: list[float]
    """Median time of a step, for each round but the first."""
    stages: dict[str, float]
    """Median time of each stage of a step in seconds."""
    operations: int
    """Kernels of a step on a GPU, operations of torch on a CPU."""
    start_up: float
    """Seconds from the start of the process to the end of the first step."""
    host_memory: int
    """Peak memory of the process, and memory of its own processes, in bytes."""
    device_memory: int
    """Peak memory of the GPU in bytes."""


def run_step_time(preset: Preset, data: Path, output: Path) -> bool:
    """Time the steps of a preset's samplers and methods in turn, then write step_time.json and report.md.

    Args:
        preset: what to time.
        data: folder that the scenes' folders are in.
        output: folder for everything that comes out.

    Returns:
        Whether every method was timed.
    """
    with files.naming_file(output):
        output.mkdir(parents=True, exist_ok=True)
    costs: dict[str, dict[str, Cost]] = {}
    failures: dict[str, str] = {}
    with make_progress(transient=True) as progress:
        task = progress.add_task("rounds", total=preset.rounds * len(preset.samplers) * len(preset.scenes))
        for scene in preset.scenes:
            progress.update(task, description=scene.title)
            costs[scene.title] = _measure(
                preset, scene, data, output / "runs", failures, lambda: progress.advance(task)
            )
            content = {path: {name: asdict(cost) for name, cost in of.items()} for path, of in costs.items()}
            files.write(json.dumps(content, indent=1), output / "step_time.json")
    with markdown_file(output / "report.md") as console:
        console.print(f"# {preset.title}\n")
        console.print(f"{device_name()}; torch {torch.__version__}. Median over {preset.rounds - 1} rounds (range).\n")
        for path, of_scene in costs.items():
            if not of_scene:
                continue
            tables, name = make_tables(of_scene), files.file_name(path)
            CONSOLE.rule(Text(path))
            console.print(f"\n## {path}\n")
            for table in tables:
                CONSOLE.print(table)
                console.print(table)
            files.save_figure(plot_stages(of_scene), output / f"{name}_stages.png", dpi=130)
            console.print(f"\n![Stages of a step]({name}_stages.png)")
        for name, reason in failures.items():
            console.print(f"\n{name} failed: {reason}", soft_wrap=True)
    CONSOLE.print(f"{output / 'report.md'} has all of it, with plots.", soft_wrap=True, markup=False)
    return not failures


def _measure(
    preset: Preset, scene: Scene, data: Path, runs: Path, failures: dict[str, str], on_round: Callable[[], None]
) -> dict[str, Cost]:
    """Return the cost of each sampler and method on a scene. What fails is left out, and its reason is kept."""
    spawn = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection, list[float]]] = {}

    def ask(name: str, question: str) -> Any:
        connection = workers[name][1]
        try:
            if question:
                connection.send(question)
            answer = connection.recv()
        except (EOFError, BrokenPipeError):
            answer = UserError("its process ended. Was it killed for its memory?")
        if not isinstance(answer, UserError):
            return answer
        failures[f"{scene.title}, {name}"] = str(answer)
        CONSOLE.print(f"{scene.title}, {name} failed: {answer}", style="red", markup=False)
        _end(workers.pop(name)[0])
        return None

    try:
        for name in preset.samplers:  # one after another, so that their start-ups are not each other's
            ours, theirs = spawn.Pipe()
            arguments = (theirs, scene, name, preset.seeds[0], data, runs, preset.steps, time.monotonic())
            process = spawn.Process(target=_work, args=arguments)
            process.start()
            theirs.close()
            workers[name] = (process, ours, [])
            ask(name, "")
        for _ in range(preset.rounds):
            for name in list(workers):
                seconds = ask(name, "time")
                if seconds is not None:
                    workers[name][2].append(float(np.median(seconds)))
                on_round()
        return {
            name: Cost(seconds=rounds[1:], **rest)
            for name, (_, _, rounds) in list(workers.items())
            if (rest := ask(name, "profile")) is not None
        }
    finally:
        for process, _, _ in workers.values():
            _end(process)


def _end(process: Any) -> None:
    """End a process, and those that a ParallelDataManager has started there, which would live on."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.join()


def _work(
    connection: Connection,
    scene: Scene,
    sampler: str,
    seed: int,
    data: Path,
    runs: Path,
    steps: int,
    started: float,
) -> None:
    """Set up a training, then answer questions about it through a connection. Runs in a process of its own."""
    warnings.simplefilter("ignore")  # nerfstudio's own, which each process would repeat
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the first process, which ends this one
    try:
        if not torch.cuda.is_available():
            compat.prepare_cpu()
        config = trainer_config(scene, sampler, seed, data, runs)
        _set_random_seed(seed)
        config.get_base_dir().mkdir(parents=True, exist_ok=True)  # a viewer logs there
        with compat.lenient_metrics():
            trainer: Trainer = config.setup(local_rank=0, world_size=1)
            trainer.setup(test_mode="test")
        trainer.pipeline.train()
        stepper = _Stepper(trainer)
        stepper.train(1)
        start_up = time.monotonic() - started  # of one clock for all processes
        connection.send("ready")
        while question := connection.recv():
            connection.send(stepper.train(steps) if question == "time" else stepper.profile(steps, start_up))
    except EOFError:
        pass
    except Exception as error:
        connection.send(UserError(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"))


class _Stepper:
    """Runs a trainer's steps as its own loop does, and times them.

    Args:
        trainer: a trainer that is set up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.step = trainer, 0
        trainer._init_viewer_state()  # does nothing without a viewer, nor does its update

    def train(self, steps: int) -> list[float]:
        """Train for some steps; return the seconds that each took."""
        seconds = []
        for _ in range(steps):
            start = _now()
            self._run_callbacks(TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            self.trainer.train_iteration(self.step)
            self._run_callbacks(TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
            self.trainer._update_viewer_state(self.step)
            seconds.append(_now() - start)
            self.step += 1
        return seconds

    def _run_callbacks(self, location: TrainingCallbackLocation) -> None:
        for callback in self.trainer.callbacks:
            callback.run_callback_at_location(self.step, location)

    def profile(self, steps: int, start_up: float) -> dict[str, Any]:
        """Train on, and return what a [Cost][] has beside the time of a step."""
        process = psutil.Process()
        memory = peak_memory() + sum(child.memory_info().rss for child in process.children(recursive=True))
        device_memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            self.train(PROFILED_STEPS)
        operations = sum(
            event.count
            for event in profiler.key_averages()
            if activity == ProfilerActivity.CUDA or "aten::" in event.key
        )
        return {
            "stages": self._stages(steps),
            "operations": round(operations / PROFILED_STEPS),
            "start_up": start_up,
            "host_memory": memory,
            "device_memory": device_memory,
        }

    def _stages(self, steps: int) -> dict[str, float]:
        """Return the median time of each stage. Methods of the trainer's parts are replaced by timed ones for good."""
        clock, pipeline = _StageClock(), self.trainer.pipeline
        manager: Any = pipeline.datamanager
        generator = getattr(manager, "train_ray_generator", None)
        for owner, names, stage in (
            (manager, ["next_train"], "batch"),
            (getattr(manager, "train_pixel_sampler", None), ["sample"], "draw"),
            (generator, ["forward", "mined", "differentiable"], "rays"),
            (pipeline.model, ["forward"], "forward"),
            (pipeline.model, ["get_metrics_dict", "get_loss_dict"], "loss"),
            (torch.Tensor, ["backward"], "backward"),
            (
                self.trainer.optimizers,
                ["zero_grad_some", "optimizer_scaler_step_some", "scheduler_step_all"],
                "optimizers",
            ),
            (self, ["_run_callbacks"], "update"),
        ):
            for name in names:
                if hasattr(owner, name):
                    setattr(owner, name, clock.timed(getattr(owner, name), stage))
        rows = []
        for _ in range(steps):
            clock.seconds.clear()
            self.train(1)
            rows.append({stage: clock.seconds[stage] for stage in STAGES})
        return {stage: float(np.median([row[stage] for row in rows])) for stage in STAGES}


class _StageClock:
    """Adds up the time of stages; that of a stage within another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, function: Callable, stage: str) -> Callable:
        """Return a function whose time counts for a stage."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = _now()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = _now() - start
                self.seconds[stage] += elapsed - self._inner.pop()
                if self._inner:
                    self._inner[-1] += elapsed

        return wrapper


def _now() -> float:
    """Return the time in seconds, once the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> int:
    """Return the most memory in bytes that this process has had."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_tables(costs: dict[str, Cost]) -> list[Any]:
    """Return the tables of one scene: a row for each sampler or method, the first of which others are compared with."""
    rows, stages = {}, {}
    first = np.median(next(iter(costs.values())).seconds)
    operations = "kernels a step" if torch.cuda.is_available() else "operations a step"
    for name, cost in costs.items():
        step = 1000 * np.array(cost.seconds)
        rows[name] = {
            "step, ms": f"{np.median(step):.1f} ({step.min():.1f} - {step.max():.1f})",
            "of the first": f"{np.median(cost.seconds) / first:.2f}",
            operations: f"{cost.operations:,}",
            "host memory, GB": f"{cost.host_memory / 1e9:.2f}",
            "device memory, GB": f"{cost.device_memory / 1e9:.2f}" if cost.device_memory else "",
            "start-up, s": f"{cost.start_up:.1f}",
        }
        stages[name] = {stage: f"{1000 * seconds:.2f}" for stage, seconds in cost.stages.items()}
    return [
        make_table(title, pd.DataFrame.from_dict(cells, orient="index").rename_axis("sampler"))
        for title, cells in (("Training step", rows), ("Stages of a step, ms", stages))
    ]


def plot_stages(costs: dict[str, Cost]) -> Figure:
    """Plot the stages of a step as one bar for each sampler or method."""
    figure = Figure(figsize=(8, 0.5 * len(costs) + 1.2), layout="constrained")
    axes = figure.subplots()
    milliseconds = pd.DataFrame({name: cost.stages for name, cost in costs.items()}).T[::-1] * 1000
    milliseconds.plot.barh(stacked=True, ax=axes, width=0.7, colormap="tab10")
    axes.set_xlabel("milliseconds a step")
    axes.legend(fontsize="small", ncols=1, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
