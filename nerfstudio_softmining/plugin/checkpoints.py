"""Checkpoints of a training: written whole, read safely, and fitted to a model of other images."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn

from nerfstudio_softmining.errors import UserError
from nerfstudio_softmining.files import naming_file
from nerfstudio_softmining.plugin import compat


def write(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint beside its place and move it there, so that a crash leaves a whole file or none.

    Raises:
        CannotWriteError: if it cannot be written. Nothing is left of it then.
    """
    # nerfstudio takes every file among the checkpoints for one
    part = path.parent.with_name("incomplete.ckpt")
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nerfstudio. No code in it runs, with torch 2.4 and newer.

    Raises:
        UserError: if it is missing, damaged, or something else.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}. Check --load-dir, --load-step and --load-checkpoint.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=compat.allow_numpy_scalars_in_checkpoints())
    except Exception as error:  # torch raises almost anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"the checkpoint {path} cannot be read ({reason}). Use another one.") from error
    if not isinstance(state, dict) or not {"step", "pipeline", "optimizers"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of nerfstudio. Use another one.")
    return state


def read_newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the newest checkpoint in a folder that is whole. Name those that are not.

    Raises:
        UserError: if there is none.
    """
    paths = sorted(folder.glob("step-*.ckpt"), reverse=True)
    for path in paths:
        try:
            return path, read(path)
        except UserError as error:
            CONSOLE.print(str(error), style="yellow", markup=False)
    found = f"{len(paths)} checkpoints, none of which can be read" if paths else "no checkpoints"
    inner = folder / "nerfstudio_models"
    hint = f"Set it to {inner}." if inner.is_dir() else "Set it to the nerfstudio_models folder of a run."
    raise UserError(f"--load-dir is {folder}, which has {found}. {hint}")


def fitted_parameters(model: nn.Module, saved: dict[str, Any], num_images: int) -> tuple[dict[str, Any], list[str]]:
    """Fit the parameters of a checkpoint to a model.

    What belongs to single images, such as poses, starts anew where the data set has another number of them.

    Args:
        model: the model.
        saved: parameters by name.
        num_images: number of training images of the model.

    Returns:
        Parameters that fit, and the names of those that start anew.

    Raises:
        UserError: if anything else is missing, or has another shape.
    """
    fitted, anew = dict(saved), []
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        other = saved.get(name)
        if other is None and name not in parameters:
            continue
        if other is not None and other.shape == value.shape:
            continue
        is_by_image = value.dim() > 0 and len(value) == num_images
        if is_by_image and (other is None or other.shape[1:] == value.shape[1:]):
            fitted[name] = value
            anew.append(name)
            continue
        found = "is missing" if other is None else f"has the shape {list(other.shape)}"
        raise UserError(
            f"the checkpoint does not fit {type(model).__name__}: its parameter {name} {found}, and that of the model "
            f"has the shape {list(value.shape)}. Use the method and the settings that the checkpoint was trained with, "
            "which are in the config.yml of its run."
        )
    return fitted, anew


def load_optimizers(optimizers: dict[str, torch.optim.Optimizer], saved: dict[str, Any]) -> None:
    """Load the state of optimizers. Those of other parameters start anew, which is said.

    Args:
        optimizers: the optimizers by parameter group.
        saved: their states in a checkpoint.
    """
    for group, optimizer in optimizers.items():
        try:
            optimizer.load_state_dict(saved[group])
        except (KeyError, ValueError):
            CONSOLE.print(
                f"[yellow]The checkpoint has no state of the optimizer of {group}, which starts anew.[/yellow]"
            )
            continue
        for parameter, state in list(optimizer.state.items()):
            if any(part.shape != parameter.shape for part in state.values() if _is_by_entry(part)):
                del optimizer.state[parameter]


def _is_by_entry(value: Any) -> bool:
    """Return whether a part of an optimizer's state has an entry for each entry of the parameter."""
    return isinstance(value, Tensor) and value.dim() > 0


def not_finite(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Yield the names of parameters that are not finite. Waits for the device once, and again only for those."""
    named = list(parameters)
    # a sum that overflows is as far gone
    if named and not bool(torch.stack([value.detach().float().sum() for _, value in named]).isfinite().all()):
        yield from (name for name, value in named if not value.isfinite().all())
