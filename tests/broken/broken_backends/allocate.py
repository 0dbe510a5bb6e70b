"""Backends whose memory is not what was asked for, or somebody else's."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from flexport_emulated.backend import EmulatedBackend
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import Place, breaks


@breaks(
    "test_allocations_do_not_overlap",
    "test_threads_that_allocate_at_once_get_memory_of_their_own",
)
class HasOnePieceOfEachSize(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        kept = self.__dict__.setdefault("kept", {})
        key = (tuple(shape), dtype, where)
        if key not in kept:
            kept[key] = super().allocate(shape, dtype, where)
        found: Tensor = kept[key]
        return found


@breaks("test_a_shape_may_be_any_sequence")
class WantsATuple(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        if not isinstance(shape, tuple):
            raise TypeError("a shape is a tuple")
        return super().allocate(shape, dtype, where)


@breaks("test_device_memory_is_all_on_one_device")
class KeepsBytesElsewhere(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        tensor = super().allocate(shape, dtype, where)
        return tensor.to("meta") if dtype is torch.uint8 else tensor


@breaks("test_host_memory_is_the_cpus")
class PinsOnTheDevice(EmulatedBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        return super().allocate(shape, dtype, "device")


@breaks("test_memory_allocated_in_inference_mode_can_be_written_outside_it")
class AllocatesAsItIsAsked(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        return torch.empty_like(super().allocate(shape, dtype, where))


@breaks("test_allocate_gives_the_shape_and_dtype_asked_for_contiguous")
class PadsItsRows(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        if len(shape) < 2:
            return super().allocate(shape, dtype, where)
        return super().allocate((*shape[:-1], shape[-1] + 3), dtype, where)[..., : shape[-1]]


@breaks("test_a_view_keeps_its_memory")
class HandsOutMemoryTwice(ToasterBackend):
    """A pool that takes a piece back with the tensor that it gave out, whatever views there are."""

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        super().__init__(memory_bytes)
        self._kept: dict[int, list[Tensor]] = {}

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        kept = self._kept.setdefault(math.prod(shape) * dtype.itemsize, [])
        whole = kept.pop() if kept else super().allocate(shape, dtype, where)
        given: Tensor = whole.view(dtype).view(tuple(shape))
        weakref.finalize(given, kept.append, whole)
        return given
