"""Several processes that train together: what they share of the rays of a step, and in checkpoints."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from nerfstudio.utils import comms
from torch import Tensor

from nerfstudio_softmining.samplers.base import MiningBatch
from nerfstudio_softmining.samplers.images import TrainingImages


def share(batch: MiningBatch, num_rays: int, images: TrainingImages) -> MiningBatch | None:
    """Return the rays of a step in all processes; None where one process trains.

    Does not wait for the device. Rays on images that this process has not cached are among them with an importance and
    error of NaN, which samplers leave out.

    Args:
        batch: the rays of this process, with their importance and error.
        num_rays: rays that each process shares, the same number in all of them; of more, an even selection.
        images: the images that this process has cached.
    """
    if comms.get_world_size() == 1:
        return None
    assert batch.importance is not None and batch.error is not None
    device, count = batch.importance.device, len(batch.indices)
    rows = torch.cat(
        (
            batch.indices.to(device),
            *(part.detach().to(device)[:, None] for part in (batch.density_ratio, batch.importance, batch.error)),
        ),
        dim=1,
    ).float()  # which holds whole numbers up to 2^24
    if count > num_rays:
        rows = rows[torch.arange(num_rays, device=device) * count // num_rays]
    elif count < num_rays:
        filling = torch.full((num_rays - count, rows.shape[1]), torch.nan, device=device)
        filling[:, :4] = rows[0, :4]
        rows = torch.cat((rows, filling))
    everywhere = [torch.empty_like(rows) for _ in range(comms.get_world_size())]
    dist.all_gather(everywhere, rows)
    rows = torch.cat(everywhere)
    is_cached = images.cache_index.to(device)[rows[:, 0].long()] >= 0
    rows = torch.where(is_cached[:, None], rows, torch.cat((rows.new_zeros(4), rows.new_full((2,), torch.nan))))
    indices = torch.where(is_cached[:, None], rows[:, :3].long(), batch.indices[0].to(device))
    ratio, importance, error = rows[:, 3:].unbind(dim=1)
    return MiningBatch(indices, torch.where(is_cached, ratio, 1.0), 0, importance=importance, error=error)


def gather(state: Any, device: torch.device | str) -> list[Any]:
    """Return the states of all processes to the first one, and nothing to the others. All of them have to call this.

    Args:
        state: dictionaries, lists, tensors and numbers, as a checkpoint holds them.
        device: device of this process. Tensors of the states that come back are on the CPU.
    """
    world_size, is_first = comms.get_world_size(), comms.get_rank() == 0
    if world_size == 1:
        return [state]
    states: list[Any] = [None] * world_size
    # NCCL sends through the current device, which nerfstudio leaves at the first GPU in all processes
    is_cuda = torch.device(device).type == "cuda"
    with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
        dist.gather_object(_to_cpu(state), states if is_first else None)
    return states if is_first else []


def _to_cpu(state: Any) -> Any:
    """Return a state with its tensors on the CPU."""
    if isinstance(state, dict):
        return {key: _to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_to_cpu, state))
    return state.cpu() if isinstance(state, Tensor) else state
