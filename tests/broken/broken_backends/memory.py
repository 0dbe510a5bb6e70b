"""Backends that count or hold their memory wrongly."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import Place, breaks
from flexport.backend import Ticket
from flexport.errors import OutOfMemory


@breaks(
    "test_what_is_dropped_can_be_had_again",
    "test_memory_of_many_sizes_can_be_used_as_one_piece_again",
    "test_threads_count_together",
    "test_a_copy_gives_its_memory_back_when_it_is_done",
)
class NeverGivesBack(ToasterBackend):
    def _give(self, num_bytes: int) -> None:
        super()._give(min(0, num_bytes))


@breaks(
    "test_a_device_holds_what_it_says_and_no_more",
    "test_an_allocation_without_room_raises_out_of_memory",
)
class CountsNothing(ToasterBackend):
    def _give(self, num_bytes: int) -> None:
        pass

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        try:
            return super().allocate(shape, dtype, where)
        except OutOfMemory as error:
            raise MemoryError from error


@breaks("test_what_failed_took_nothing")
class CountsWhatFailed(ToasterBackend):
    def _give(self, num_bytes: int) -> None:
        self._free_bytes += num_bytes
        if self._free_bytes < 0:
            raise OutOfMemory("no room")


@breaks("test_a_view_counts_as_all_that_it_keeps")
class CountsTensorsAndNotMemory(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        tensor = super().allocate(shape, dtype, "host")
        if where == "device":
            num_bytes = tensor.numel() * tensor.element_size()
            self._give(-num_bytes)
            weakref.finalize(tensor, self._give, num_bytes)
        return tensor


@breaks("test_host_memory_does_not_count")
class CountsHostMemory(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        return super().allocate(shape, dtype, "device")


@breaks("test_memory_of_many_sizes_can_be_used_as_one_piece_again")
class Fragments(ToasterBackend):
    """Keeps what was dropped for the next of the same size, and for no other."""

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        super().__init__(memory_bytes)
        self._kept: dict[int, list[Tensor]] = {}

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        if where == "host":
            return super().allocate(shape, dtype, where)
        kept = self._kept.setdefault(math.prod(shape) * dtype.itemsize, [])
        whole = kept.pop() if kept else super().allocate(shape, dtype)
        given: Tensor = whole.view(dtype).view(tuple(shape))
        weakref.finalize(given, kept.append, whole)
        return given


@breaks("test_a_full_device_computes_right_or_is_out_of_memory")
class CrashesWhenFull(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        try:
            return self.allocate(out_TF.shape, out_TF.dtype).copy_(out_TF)
        except OutOfMemory as error:
            raise RuntimeError("the allocator has no more") from error


@breaks("test_a_full_device_still_copies")
class CopiesThroughDeviceMemory(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        staged = self.allocate(src.shape, src.dtype).copy_(src)
        return super().copy_async(staged, dst)


@breaks("test_a_kept_ticket_keeps_no_memory_once_its_copy_is_done")
class TicketHoldsItsTensors(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        ticket: Any = super().copy_async(src, dst)
        ticket.tensors = (src, dst)
        return ticket  # type: ignore[no-any-return]


@breaks("test_a_copy_gives_its_memory_back_when_it_is_done")
class HoldsEveryCopy(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        self.__dict__.setdefault("held", []).append(dst)
        return super().copy_async(src, dst)
