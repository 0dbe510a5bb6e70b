"""The address spaces of emulated accelerators, as torch devices.

Torch keeps one kind of device free for others, "privateuseone"; each open accelerator takes a
number of it. So `tensor.device` tells host and device apart, and what torch offers for any
device (`torch.tensor(..., device=x.device)`, `x.to(device)`) makes device tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import backend_registration

from flexport_emulated.device_tensor import DeviceTensor

if TYPE_CHECKING:
    from flexport_emulated.device import Device

__all__ = ["enter", "leave"]

KIND = "privateuseone"

_devices: WeakValueDictionary[int, Device] = WeakValueDictionary()
_lock = threading.Lock()
_library: torch.library.Library | None = None
"""Keeps the kernels below registered."""


def enter(device: Device) -> torch.device:
    """The torch device of a new accelerator: the lowest number that is free."""
    with _lock:
        _register()
        number = next(number for number in range(128) if number not in _devices)
        _devices[number] = device
    return torch.device(KIND, number)


def leave(device: Device) -> None:
    """The accelerator is closed, and its number free."""
    with _lock:
        number = device.torch_device.index
        if _devices.get(number) is device:
            del _devices[number]


def _register() -> None:
    """Once a process: tell torch that Python has this device's kernels."""
    global _library  # noqa: PLW0603 - torch has one registry a process, too
    if _library is not None:
        return
    # Experimental in torch, but the only way to have a device without compiling one.
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no devices written in Python; use a later one"
        )
    setup()
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("arange.start", _arange, "PrivateUse1")
    _library.impl("arange.start_step", _arange, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")


def _device(device: torch.device) -> Device:
    number = device.index or 0
    found = _devices.get(number)
    if found is None:
        raise RuntimeError(f"no emulated accelerator is open as {KIND}:{number}")
    found.check("a factory")
    return found


def _empty(
    size: Sequence[int], *, device: torch.device, dtype: torch.dtype | None = None, **_: Any
) -> Tensor:
    return _device(device).make(size, None, dtype or torch.get_default_dtype())


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> Tensor:
    made = _device(device).make(size, stride, dtype or torch.get_default_dtype())
    made.awaits_upload = True
    return made


def _arange(
    start: float,
    end: float,
    step: float = 1,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    **_: Any,
) -> Tensor:
    # Torch's own would make an empty tensor first and then change its shape.
    like = torch.arange(start, end, step, dtype=dtype, device="meta")
    made = _device(device).make(like.shape, None, like.dtype)
    made.home.run(torch.ops.aten.arange.start_out, (start, end, step), {"out": made})
    return made


def _copy_from(src: Tensor, dst: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor(..., device=)` fills its result with."""
    if not isinstance(dst, DeviceTensor) or isinstance(src, DeviceTensor):
        raise RuntimeError(f"a copy from {src.device} to {dst.device} is not one of torch.tensor's")
    dst.home.run(torch.ops.aten.copy_.default, (dst, src), {})
    return dst
