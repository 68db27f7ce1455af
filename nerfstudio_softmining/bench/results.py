"""results.json, and what else `softmining bench` and `softmining image` share."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from nerfstudio.utils.rich_utils import CONSOLE
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nerfstudio_softmining import files
from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import CannotWriteError


class Results:
    """Evaluations and failures of runs, in results.json after every change.

    Args:
        output: folder that results.json is in.
        at: iterations at which runs are evaluated.
        scenes: settings of each scene; results of the same scenes with other settings are refused.
        may_grow: whether finished runs can go on to more evaluations.

    Raises:
        UserError: if the folder cannot be used, or has results with other settings.
    """

    def __init__(self, output: Path, at: Sequence[int], scenes: dict[str, dict], may_grow: bool = False) -> None:
        self.path = output / "results.json"
        try:
            output.mkdir(parents=True, exist_ok=True)
            self.content: dict = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"--output is {output}, which cannot be used ({error}). Name another folder.") from error
        if not self.content.get("runs"):  # a folder with nothing but failures can be used with any settings
            self.content = {}
        settings = json.loads(json.dumps({"at": at, "scenes": scenes}))
        before = self.content.setdefault("settings", settings)
        if may_grow and settings["at"][: len(before["at"])] == before["at"]:
            before["at"] = settings["at"]
        shared = before["scenes"].keys() & settings["scenes"].keys()
        if before["at"] != settings["at"] or any(before["scenes"][k] != settings["scenes"][k] for k in shared):
            raise UserError(
                f"{self.path} holds runs with other settings ({before}). Name another --output, or the same settings."
            )
        before["scenes"].update(settings["scenes"])
        self.content["versions"] = {name: version(name) for name in ("nerfstudio-softmining", "nerfstudio", "torch")}
        self.content["versions"]["python"] = platform.python_version()
        self.content["device"] = device_name()
        self.content.setdefault("runs", [])
        self.content.setdefault("failures", {})

    def entries(self, scene: str, sampler: str, seed: int) -> list[dict]:
        """Return the evaluations of one run."""
        key = (scene, sampler, seed)
        return [entry for entry in self.content["runs"] if (entry["scene"], entry["sampler"], entry["seed"]) == key]

    def add(self, scene: str, sampler: str, seed: int, entry: dict) -> None:
        """Add an evaluation."""
        self.content["runs"].append({"scene": scene, "sampler": sampler, "seed": seed, **entry})
        self._write()

    @contextlib.contextmanager
    def recording_failure(self, name: str) -> Iterator[None]:
        """Record and print an error of a run instead of raising it, so that the other runs can still be made."""
        failures = self.content["failures"]
        try:
            yield
        except CannotWriteError:
            raise
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
            CONSOLE.print(f"{name} failed: {failures[name]}", style="red", markup=False, highlight=False)
            self._write()
        else:
            if failures.pop(name, None) is not None:
                self._write()

    def _write(self) -> None:
        files.write(json.dumps(self.content, indent=1), self.path)


def device_name(device: str | None = None) -> str:
    """Return the name of the GPU, or the number of threads on the CPU; of the GPU if there is one by default."""
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"


def make_progress(transient: bool = False) -> Progress:
    """Return progress bars with counts and remaining times, which disappear in the end if `transient`."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=CONSOLE, transient=transient)


def write_bytes(picture: NDArray, path: Path) -> None:
    """Write values in [0, 255] as a picture of 8 bits, grey [h, w] or in the order RGB [h, w, 3]."""
    rgb = picture.round().astype(np.uint8)
    _, encoded = cv2.imencode(path.suffix, np.ascontiguousarray(rgb if rgb.ndim == 2 else rgb[..., ::-1]))
    files.write(encoded.tobytes(), path)


def check_flags(at: Sequence[int], **lists: Sequence[Any]) -> None:
    """Check the iterations of evaluations and other lists given as flags.

    Raises:
        UserError: if iterations do not rise, or another list is empty or has a value twice.
    """
    if not at or sorted(set(at)) != list(at) or at[0] < 1:
        raise UserError(f"--at is {list(at)}: it is iterations in rising order, such as 500 1000 2000.")
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} is {list(values)}: name at least one, and each once.")
