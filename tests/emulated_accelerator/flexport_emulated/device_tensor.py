"""A tensor in the accelerator's own address space.

It is a wrapper around a tensor that lies in the arena, and no operation sees through it but
those of `operations`: what reaches it beside a tensor of host memory is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flexport_emulated.arena import Memory
    from flexport_emulated.device import Device

__all__ = ["DeviceTensor", "tensors_in"]


class DeviceTensor(Tensor):
    """A tensor on an emulated accelerator."""

    in_arena: Tensor
    """The same in host memory, which lanes compute with and nobody else may."""
    memory: Memory
    home: Device
    awaits_upload: bool
    """It was made for an explicit transfer (`.to(device)`), whose values come next."""

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory, home: Device) -> DeviceTensor:
        # A tensor born in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            self: DeviceTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=home.torch_device,
            )
        self.in_arena = inner
        self.memory = memory
        self.home = home
        self.awaits_upload = False
        return self

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub is no class method
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Hand an operation to the device that its tensors are on, if they are all on one."""
        home = _one_home(func, args, kwargs or {})
        return home.run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """The values as Python numbers; torch's own refuses subclasses."""
        return self.cpu().tolist()

    # A debugger that shows a tensor must not wait for a lane.
    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, on {self.device})"

    def __dlpack__(self, **_: Any) -> Any:
        raise RuntimeError("device memory can't be read by the host: copy it first")


def tensors_in(values: object) -> list[Tensor]:
    """All tensors among the arguments of an operation, or its results."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


def _one_home(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Device:
    """The device of all tensors; single numbers in host memory may stand beside them."""
    home: Device | None = None
    foreign = False
    for tensor in tensors_in(args) + tensors_in(kwargs):
        if isinstance(tensor, DeviceTensor):
            foreign |= home is not None and tensor.home is not home
            home = tensor.home
        else:
            foreign |= tensor.dim() > 0
    assert home is not None, func
    if foreign and not _is_upload(func, args):
        listed = ", ".join(
            f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors_in((args, kwargs))
        )
        raise RuntimeError(
            f"{func} mixes tensors of different memories: {listed}; copy_async is the way across"
        )
    return home


def _is_upload(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether it is the second half of `.to(device)`, which torch makes of two operations."""
    return (
        func is torch.ops.aten.copy_.default
        and isinstance(args[0], DeviceTensor)
        and args[0].awaits_upload
    )
