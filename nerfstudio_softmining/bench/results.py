"""results.json: what a comparison has measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from nerfstudio_softmining.errors import UserError


class Results:
    """results.json: what has been run, safe at every moment.

    Args:
        output: folder that it is in.
        at: iterations at which runs are evaluated.
        scenes: the settings of each scene; results of the same scenes with other settings are refused.
        may_grow: whether runs can be gone on with, to more evaluations after those that there are.
    """

    def __init__(self, output: Path, at: Sequence[int], scenes: dict[str, dict], may_grow: bool = False) -> None:
        self.path = output / "results.json"
        try:
            output.mkdir(parents=True, exist_ok=True)
            self.content: dict = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"--output is {output}, which cannot be used ({error}). Name another folder.") from error
        if not self.content.get("runs"):  # failures alone bind nobody
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
        self.content["device"] = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        self.content.setdefault("runs", [])
        self.content.setdefault("failures", {})

    def entries(self, scene: str, sampler: str, seed: int) -> list[dict]:
        """Evaluations of one run."""
        key = (scene, sampler, seed)
        return [entry for entry in self.content["runs"] if (entry["scene"], entry["sampler"], entry["seed"]) == key]

    def add(self, scene: str, sampler: str, seed: int, entry: dict) -> None:
        """Keep an evaluation."""
        self.content["runs"].append({"scene": scene, "sampler": sampler, "seed": seed, **entry})
        self._write()

    def failed(self, name: str, reason: str) -> None:
        """Keep why a run failed."""
        self.content["failures"][name] = reason
        self._write()

    def succeeded(self, name: str) -> None:
        """Forget that a run failed before."""
        if self.content["failures"].pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        part.replace(self.path)
