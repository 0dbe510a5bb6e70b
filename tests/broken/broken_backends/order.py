"""Backends whose copies and work come in the wrong order."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch
from flexport_emulated.backend import EmulatedBackend
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import Late, Told, breaks
from flexport.backend import Ticket


@breaks(
    "test_device_work_after_wait_may_overwrite_the_source",
    "test_device_work_after_wait_may_overwrite_the_destination",
    "test_device_work_after_wait_sees_the_copy",
    "test_kernels_after_wait_see_the_copy",
    "test_a_buffer_is_used_again_and_again",
    "test_tickets_are_waited_for_in_one_order_and_joined_in_another",
    "test_copies_and_work_of_many_threads_do_not_mix",
    "test_work_in_another_thread_after_wait_sees_the_copy",
    "test_a_copy_after_wait_sees_the_copy_waited_for",
    "test_a_chain_of_copies_carries_the_values_through",
)
class WaitsForNothing(Late):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        ticket: Any = super().copy_async(src, dst)
        ticket.wait = lambda: None
        return ticket  # type: ignore[no-any-return]


@breaks("test_a_wait_in_another_thread_orders_work_in_this_one")
class WaitsInTheIssuersThreadAlone(Late):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        ticket, issuer = super().copy_async(src, dst), threading.get_ident()
        return Told(lambda: ticket.join() if threading.get_ident() == issuer else None)


@breaks(
    "test_sync_waits_for_copies", "test_sync_in_another_thread_waits_for_the_copies_of_this_one"
)
class SyncsNothing(Late):
    def sync(self) -> None:
        self._must_be_open("sync")


@breaks("test_hundreds_of_copies_in_both_directions_all_arrive")
class LosesCopiesInALongQueue(Late):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        if max(len(lane._waiting) for lane in self._lanes.values()) >= 256:
            return Told(lambda: None)
        return super().copy_async(src, dst)


@breaks("test_a_second_copy_after_wait_overwrites_the_first")
class CopiesTheLastFirst(Late):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        super().copy_async(src, dst)
        self._lanes[self._link(src, dst)]._waiting.rotate(1)
        ticket: Any = Told(self.sync)
        ticket.wait = lambda: None
        return ticket  # type: ignore[no-any-return]


@breaks(
    "test_a_ticket_can_be_waited_for_and_joined_again",
    "test_a_ticket_can_be_joined_by_many_threads",
)
class UsesUpItsTickets(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        left = [super().copy_async(src, dst)]
        return Told(lambda: left.pop().join())


@breaks("test_a_ticket_is_a_ticket")
class GivesHalfATicket(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Any:
        super().copy_async(src, dst)
        return SimpleNamespace(join=lambda: None)


@breaks(
    "test_a_copy_sees_the_device_work_issued_before_it",
    "test_a_copy_sees_the_kernels_issued_before_it",
    "test_a_copy_does_not_overtake_work_that_reads_its_destination",
)
class CopiesAtOnce(EmulatedBackend):
    """On a slow device, whose queue is never empty."""

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        super().__init__(memory_bytes=memory_bytes)
        compute: Any = self._device.compute
        give = compute.give
        compute.give = lambda work, **options: give(work, **{**options, "cost_s": 2e-3})

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        with torch.inference_mode():
            getattr(dst, "in_arena", dst).copy_(getattr(src, "in_arena", src))
        return Told(lambda: None)


@breaks("test_sync_with_nothing_to_do_returns")
class SyncsAfterWorkOnly(ToasterBackend):
    def sync(self) -> None:
        raise RuntimeError("nothing was issued")
