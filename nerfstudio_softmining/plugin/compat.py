"""Every workaround for nerfstudio and torch versions, each with its reason and when it can go."""

from __future__ import annotations

import contextlib
import importlib
import random
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.external import TCNN_EXISTS
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torchmetrics.functional import structural_similarity_index_measure as torchmetrics_ssim

from nerfstudio_softmining.errors import UserError

SSIM_SIDE = 11
"""Least pixels of each side for SSIM, whose window is that large."""
LPIPS_SIDE = 31
"""Least pixels of each side that AlexNet, LPIPS' network, leaves anything of."""


def prepare(device: torch.device | str) -> None:
    """Set up the process for one of this plugin's methods. Called when such a method runs, never at import.

    Args:
        device: where training or evaluation runs.

    Raises:
        UserError: for a device that lacks what the samplers need.
    """
    if torch.device(device).type == "mps":
        raise UserError("--machine.device-type is mps, which has no 64-bit floating point. Set it to cpu.")
    allow_numpy_scalars_in_checkpoints()
    if torch.device(device).type == "cpu":
        prepare_cpu()


def allow_numpy_scalars_in_checkpoints() -> bool:
    """Let torch >= 2.6 load nerfstudio's checkpoints, whose learning rates are numpy scalars.

    Returns:
        Whether `weights_only=True` loads them now, which runs no code of theirs. torch before 2.4 cannot.

    Can go when nerfstudio's three `torch.load` calls say `weights_only=False` (nerfstudio#3683).
    """
    if not hasattr(torch.serialization, "add_safe_globals"):  # torch before 2.4, which loads anything
        return False
    rebuild_scalar: Any = np.float64(0).__reduce__()[0]  # its module is private, and moved with numpy 2
    torch.serialization.add_safe_globals([rebuild_scalar, np.dtype, type(np.dtype(np.float64))])
    return True


def implementation() -> Literal["tcnn", "torch"]:
    """Return the network implementation to use: tiny-cuda-nn where it can be, else torch's.

    Can go when nerfstudio falls back by itself before the configuration is saved.
    """
    return "tcnn" if TCNN_EXISTS and torch.cuda.is_available() else "torch"


def device_type() -> Literal["cpu", "cuda"]:
    """Return the device to train on. Can go when nerfstudio's default is not always "cuda"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_cpu() -> None:
    """Make training on the CPU quick and repeatable. Call before the first parallel operation, as threads inherit it.

    On a white background gradients become so small that a step takes ten times as long unless they are rounded to zero.
    And torch adds up the gradient of a hash grid in whatever order its threads come unless told otherwise, so that a
    resumed run would not equal an uninterrupted one. Can go when nerfstudio does so.
    """
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if hasattr(torch.utils, "deterministic"):  # torch 2.2
        # for debugging, and not free; the module makes the attribute itself, which pyright does not see
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def has_fused_adam(device: torch.device | str) -> bool:
    """Return whether torch's Adam updates parameters on this device in one kernel.

    torch before 2.4 has that on CUDA only, and refuses `fused=True` elsewhere. Can go when torch 2.4 is required.
    """
    try:
        torch.optim.Adam([torch.zeros(1, device=device)], fused=True)
    except RuntimeError:
        return False
    return True


def warn_if_tcnn_is_missing() -> None:
    """Warn that the slower implementation runs. Can go with [implementation][]."""
    if not TCNN_EXISTS:
        CONSOLE.print(
            "[yellow]tiny-cuda-nn is not installed: the torch implementation runs, which is slower on a GPU "
            "(`softmining doctor` tells how to install it).[/yellow]"
        )


def allow_camera_export(dataset: InputDataset) -> None:
    """Let `ns-export cameras` read cameras that have no metadata, which it refuses for nerfacto.

    Can go when `collect_camera_poses_for_dataset` does without.
    """
    if dataset.cameras.metadata is None:
        dataset.cameras.metadata = {}


def loss_scale(scaler: torch.cuda.amp.GradScaler | None) -> Tensor | None:
    """Copy the scale that the scaler is about to apply, on its device; None where losses are not scaled.

    `GradScaler.get_scale` waits for the device. Can go when torch offers the scale as a tensor.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    scale = scaler._scale
    return torch.tensor(scaler.get_scale()) if scale is None else scale.clone()


class Lpips:
    """LPIPS that is built at its first use and can be missing: its weights are downloaded.

    No `nn.Module`, so that its weights stay out of checkpoints. Where they cannot be had, this says so once and
    returns NaN, as it does of images that are too small for its network. Can go when nerfstudio builds its models
    without internet (nerfstudio#2415).
    """

    _metric: torch.nn.Module | None = None
    is_missing = False
    """Whether the weights could not be had."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._arguments, self._options = arguments, options

    def __call__(self, prediction: Tensor, truth: Tensor) -> Tensor:
        if not Lpips.is_missing and Lpips._metric is None:
            Lpips._metric = self._build()
        if Lpips._metric is None or min(truth.shape[-2:]) < LPIPS_SIDE:
            return torch.tensor(float("nan"))
        return Lpips._metric.to(prediction.device)(prediction, truth)

    def _build(self) -> torch.nn.Module | None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        previous = socket.getdefaulttimeout()
        socket.setdefaulttimeout(10.0)  # a firewall may swallow the request
        try:
            with fork_random_state():  # building draws weights
                return LearnedPerceptualImagePatchSimilarity(*self._arguments, **self._options)
        except (OSError, RuntimeError) as error:
            Lpips.is_missing = True
            CONSOLE.print(
                f"[yellow]LPIPS is left out of the metrics: its weights are not in {torch.hub.get_dir()}/checkpoints "
                f"and could not be downloaded ({error}).[/yellow]"
            )
            return None
        finally:
            socket.setdefaulttimeout(previous)


def ssim(prediction: Tensor, truth: Tensor, **options: Any) -> Any:
    """Return torchmetrics' SSIM, or NaN of images without a whole window, of which it raises or takes a mean of none.

    Can go when torchmetrics returns NaN itself.
    """
    if min(truth.shape[-2:]) < SSIM_SIDE:
        return torch.tensor(float("nan"), device=truth.device)
    return torchmetrics_ssim(prediction, truth, **options)


@contextlib.contextmanager
def lenient_metrics() -> Iterator[None]:
    """Within this, models that build LPIPS and SSIM get [Lpips][] and [ssim][], wherever they have imported these."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    ours = {
        "LearnedPerceptualImagePatchSimilarity": (LearnedPerceptualImagePatchSimilarity, Lpips),
        "structural_similarity_index_measure": (torchmetrics_ssim, ssim),
    }
    replaced = [
        (module, name)
        for module in list(sys.modules.values())
        for name, (original, _) in ours.items()
        if getattr(module, "__dict__", {}).get(name) is original
    ]
    for module, name in replaced:
        setattr(module, name, ours[name][1])
    try:
        yield
    finally:
        for module, name in replaced:
            setattr(module, name, ours[name][0])


@contextlib.contextmanager
def sdf_grid_in_torch() -> Iterator[None]:
    """Within this, nerfstudio's SDF fields have a grid without tiny-cuda-nn, too.

    Can go when nerfstudio has one in torch.
    """
    from nerfstudio.fields import sdf_field

    from nerfstudio_softmining.plugin.hash_encoding import SDFGrid

    module: Any = sdf_field
    original = module.tcnn
    if not TCNN_EXISTS:
        module.tcnn = SimpleNamespace(Encoding=SDFGrid)
    try:
        yield
    finally:
        module.tcnn = original


def require_ray_marching() -> None:
    """Refuse methods that march through an occupancy grid where nerfacc's CUDA kernels are missing.

    Can go when nerfacc marches on CPUs.
    """
    if not torch.cuda.is_available():
        reason = "there is no CUDA GPU here"
    else:
        try:
            if importlib.import_module("nerfacc.cuda._backend")._C is not None:
                return
            reason = "nerfacc has not built them, as it found no CUDA toolkit (nvcc)"
        except Exception as error:  # it builds them at its import, which may fail in any way
            reason = f"nerfacc cannot build them ({error!r})"
    raise UserError(
        f"instant-ngp marches along rays by nerfacc's CUDA kernels, and {reason}. Train softmining-nerfacto, or "
        "softmining-nerfacto-lite without a GPU."
    )


def random_state() -> dict:
    """Return the state of every source of randomness that training uses, as a checkpoint can hold it.

    Can go when nerfstudio's checkpoints keep it.
    """
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)), int(numpy_state["state"]["pos"])),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    """Restore a [random_state][]. Devices that are not there now are left out."""
    random.setstate(state["python"])
    key, position = state["numpy"]
    legacy = np.random.get_state(legacy=False)
    legacy["state"].update(key=key.numpy().astype(np.uint32), pos=position)
    np.random.set_state(legacy)
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])


def seed_everything(seed: int) -> None:
    """Seed every source of randomness that training uses."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def fork_random_state(device: torch.device | str = "cpu") -> Iterator[None]:
    """Within this, randomness is drawn from torch without moving what is drawn after it.

    Args:
        device: where it is drawn, beside the CPU.
    """
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        yield


def no_autocast(device: torch.device | str) -> contextlib.AbstractContextManager:
    """Switch mixed precision off within this. Can go when nerfstudio's ray generation works in half precision."""
    kind = torch.device(device).type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else contextlib.nullcontext()
