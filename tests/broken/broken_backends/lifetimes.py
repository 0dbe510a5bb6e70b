"""Backends that let go of tensors too early, or of copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from broken_backends.allocate import HandsOutMemoryTwice
from broken_backends.parts import Late, Place, Told, breaks
from flexport.backend import Ticket


@breaks(
    "test_a_copy_holds_its_source",
    "test_a_copy_holds_the_view_that_is_its_source",
    "test_a_copy_holds_its_destination",
)
class HoldsNothingDuringACopy(HandsOutMemoryTwice):
    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        super().__init__(memory_bytes)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        self._waiting.append((src.view_as(src), dst.view_as(dst)))
        return Told(self._copy)

    def _copy(self) -> None:
        while self._waiting:
            super().copy_async(*self._waiting.pop(0))


@breaks("test_a_ticket_may_be_dropped")
class ForgetsACopyWithItsTicket(Late):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        return Told(lambda: super(ForgetsACopyWithItsTicket, self).copy_async(src, dst).join())


@breaks("test_the_host_may_overwrite_the_source_after_join")
class JoinsNothing(Late):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        super().copy_async(src, dst)
        return Told(lambda: None)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        self.sync()
        return super().allocate(shape, dtype, where)
