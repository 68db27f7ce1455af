"""A device that exists in tests only: tensors on it hold real values, but mixing devices and waiting are noticed.

On a GPU, an operation on tensors of two devices fails, and reading a value makes the host wait. On the CPU neither
shows. Within a [VirtualDevice][], tensors made or moved with `device=DEVICE` are computed on the CPU, backward pass
included, and

- an operation that mixes them with tensors of the CPU raises [MixedDevicesError][], as CUDA would;
- an operation for which CUDA makes the host wait is recorded, with the line of code that asked for it.

torch's own FakeTensorMode finds the same without values; but ray generation reads values, and the backward pass of fake
CUDA tensors needs CUDA.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
"""Stands for the GPU. torch runs its backward pass without a driver, and nothing else here uses it."""
PACKAGES = ("nerfstudio", "nerfstudio_softmining")
READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operations whose result, or its size, the host has to know."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"_to_copy", "copy_"}


class MixedDevicesError(RuntimeError):
    """An operation had tensors of two devices."""


class VirtualTensor(Tensor):
    """A tensor that says it is on [DEVICE][] and computes on the CPU."""

    values: Tensor
    # without it torch 2.1 makes results on the host, such as those of `.cpu()`, tensors of this class
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, values: Tensor) -> VirtualTensor:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.values = values
        return made

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"VirtualTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {}, None)


class VirtualDevice(ExitStack):
    """Within this, [DEVICE][] is a GPU that does not mix with the CPU, and whose waits are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """Where the host waited, as `file:function: operation`, innermost place in one of [PACKAGES][]."""
        self.num_operations = 0
        """Operations on the device: kernels, more or less."""

    def __enter__(self) -> VirtualDevice:
        super().__enter__()
        self.enter_context(patch.object(torch, "Generator", _Generator))
        self.enter_context(_Functions())
        self.enter_context(_Operations(self))
        return self


class _Generator(torch.Generator):
    """A source of randomness that can be on [DEVICE][]."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == DEVICE.type else device)


class _Functions(TorchFunctionMode):
    """What torch does to tensors of a meta device before operations are dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.tolist and isinstance(args[0], VirtualTensor):
            return args[0].cpu().tolist()
        if func is Tensor.__getitem__ and isinstance(args[0], VirtualTensor) and _is_list_of_numbers(args[1]):
            return args[0][torch.tensor(args[1]).to(DEVICE)]
        return func(*args, **kwargs)


def _is_list_of_numbers(index: Any) -> bool:
    return isinstance(index, list) and all(isinstance(part, int) for part in index)


class _Operations(TorchDispatchMode):
    def __init__(self, device: VirtualDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {}, self.device)


def _run(func: Any, args: tuple, kwargs: dict, device: VirtualDevice | None) -> Any:
    virtual: dict[int, VirtualTensor] = {}
    on_host: list[Tensor] = []
    devices: set[str] = set()

    def unwrap(part: Any) -> Any:
        if isinstance(part, VirtualTensor):
            virtual[id(part.values)] = part
            return part.values
        if isinstance(part, Tensor):
            on_host.append(part)
        elif isinstance(part, torch.device):
            devices.add(part.type)
            return torch.device("cpu")
        return part

    positional, named = _map(unwrap, args), _map(unwrap, kwargs)
    if not virtual and DEVICE.type not in devices:
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    to_host = "cpu" in devices or (name == "copy_" and not isinstance(args[0], VirtualTensor))
    is_mixed = any(part.dim() > 0 for part in on_host)
    if is_mixed and name not in COPIES | INDEXING:
        raise MixedDevicesError(f"{func} has tensors of the device and of the host, in {_place()}")
    if device is not None:
        device.num_operations += 1
        reads = name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        is_masked = name in INDEXING and any(
            isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        if reads or is_masked or is_mixed or (name in COPIES and to_host):
            device.waits.append(f"{_place()}: {name}")
    result = func(*positional, **named)
    if to_host:
        return args[0] if name == "copy_" else result

    def wrap(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        return virtual[id(part)] if id(part) in virtual else VirtualTensor(part)

    return _map(wrap, result)


def _map(function: Any, thing: Any) -> Any:
    """Apply a function to all that lists, tuples and dictionaries hold."""
    if isinstance(thing, (list, tuple)):
        return type(thing)([_map(function, part) for part in thing])
    if isinstance(thing, dict):
        return {key: _map(function, part) for key, part in thing.items()}
    return function(thing)


def _place() -> str:
    """Return file and function of the innermost call in one of [PACKAGES][]."""
    frame = sys._getframe()
    while frame is not None:
        for package in PACKAGES:
            if f"/{package}/" in frame.f_code.co_filename:
                file = frame.f_code.co_filename.rsplit(f"/{package}/", 1)[1]
                return f"{package}/{file}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"
