"""The conformance suite catches what it is there to catch: backends with one fault each.

Each is made of a right one, which passes the whole suite elsewhere: faults of bookkeeping and of
kernels are put into the toaster, whose work is done when a verb returns; faults of order into
devices that have queues.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from flexport_emulated.backend import EmulatedBackend
from flexport_toaster.backend import ToasterBackend
from torch import Tensor
from torch.utils import backend_registration

from flexport.backend import AttentionSpec, Backend, Capabilities, PackedMatrix, Ticket
from flexport.errors import OutOfMemory
from flexport.testing import BackendConformance, DiscreteBackend
from flexport.testing.conformance.packed import PackedLaws

Place = Literal["device", "host"]

Catch = tuple[type, str]

CATCHES: list[Catch] = []
"""Broken backends, each with a law that it breaks."""


def breaks(*laws: str) -> Callable[[type], type]:
    """Enter a class into the list."""

    def enter(broken: type) -> type:
        CATCHES.extend((broken, law) for law in laws)
        return broken

    return enter


# capabilities


@breaks("test_capabilities_do_not_change_with_what_is_done")
class SaysWhatIsFreeNow(ToasterBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(self._capabilities, memory_bytes=self._free_bytes)


@breaks("test_capabilities_can_be_written_to_a_report_and_be_a_key")
class SaysAList(ToasterBackend):
    @property
    def capabilities(self) -> Capabilities:
        dtypes: Any = ["float32"]
        return replace(self._capabilities, dtypes=dtypes)


@breaks("test_capabilities_are_plain_facts_that_do_not_change")
class SaysTheSameDtypeTwice(ToasterBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(self._capabilities, dtypes=("float32", "float32"))


@breaks("test_only_a_device_that_shares_the_hosts_tensors_is_addressable")
class SaysThatTheHostMayRead(EmulatedBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, addressable=True)


@breaks("test_every_dtype_that_is_listed_computes")
class ListsADtypeWithoutAKernel(ToasterBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(self._capabilities, dtypes=("float32", "float16"))

    def attention(self, q_NHLE: Tensor, *others: Any) -> Tensor:
        if q_NHLE.dtype is torch.float16:
            raise RuntimeError("not implemented for 'Half'")
        return super().attention(q_NHLE, *others)


@breaks("test_pages_of_the_width_it_likes_best_are_taken")
class HasNoKernelForItsOwnPages(ToasterBackend):
    def attention(self, q_NHLE: Tensor, keys: Sequence[Tensor], *others: Any) -> Tensor:
        if any(page.shape[2] == self.capabilities.page_tokens for page in keys):
            raise RuntimeError("pages of 16 columns are not implemented")
        return super().attention(q_NHLE, keys, *others)


# memory


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


# lifetimes


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


class Told:
    """A ticket that calls what it is told to."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def wait(self) -> None:
        self._call()

    def join(self) -> None:
        self._call()


class Late(DiscreteBackend):
    """Copies as late as the contract allows; right as it is."""

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        super().__init__(memory_bytes=memory_bytes, late=True)


@breaks("test_a_ticket_may_be_dropped")
class ForgetsACopyWithItsTicket(Late):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        return Told(lambda: super(ForgetsACopyWithItsTicket, self).copy_async(src, dst).join())


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


@breaks("test_the_host_may_overwrite_the_source_after_join")
class JoinsNothing(Late):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        super().copy_async(src, dst)
        return Told(lambda: None)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        self.sync()
        return super().allocate(shape, dtype, where)


# order


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


# what is copied


@breaks("test_a_copy_is_exact")
class RoundsWhatItCopies(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        return super().copy_async(src.to(torch.bfloat16).to(src.dtype), dst)


@breaks("test_a_copy_of_nothing_and_of_one_number_work")
class RefusesEmptyCopies(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        if src.numel() == 0:
            raise ValueError("a copy of nothing")
        return super().copy_async(src, dst)


@breaks("test_a_copy_of_rows_leaves_the_rest_alone")
class WritesBeforeTheBeginning(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        if dst.storage_offset():
            dst.as_strided((2,), (1,), dst.storage_offset() - 1).zero_()
        return super().copy_async(src, dst)


@breaks("test_a_copy_may_fill_a_tensor_made_in_inference_mode")
class CopiesAsItIsAsked(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        super().copy_async(src, dst.detach().clone())
        dst.copy_(src)
        return Told(lambda: None)


@breaks(
    "test_a_copy_between_slices_leaves_the_rest_alone",
    "test_a_copy_goes_by_place_and_not_by_memory",
    "test_copies_into_interleaved_parts_leave_each_other_alone",
)
class CopiesMemoryAndNotPlaces(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        flat = (src.numel(),), (1,)
        return super().copy_async(src.as_strided(*flat), dst.as_strided(*flat))


@breaks("test_a_copy_may_begin_and_end_at_any_byte")
class CopiesWordsOfFourBytes(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        skew = dst.storage_offset() % 4 if dst.dtype is torch.uint8 else 0
        return super().copy_async(
            src, dst.as_strided(dst.shape, dst.stride(), dst.storage_offset() - skew)
        )


@breaks("test_a_copy_keeps_every_bit")
class CopiesNumbersAndNotBits(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        ticket = super().copy_async(src, dst)
        if dst.dtype is torch.float32:
            dst.masked_fill_(dst.isnan(), math.nan)
        return ticket


@breaks("test_a_large_copy_arrives_to_the_last_byte")
class CopiesWholeBlocks(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        whole = src.numel() // 4096 * 4096
        if src.dim() == 1 and whole and src.shape == dst.shape:
            src, dst = src[:whole], dst[:whole]
        return super().copy_async(src, dst)


@breaks("test_a_copy_leaves_its_source_as_it_was")
class MovesAndDoesNotCopy(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        ticket = super().copy_async(src, dst)
        if src.numel() == 64:
            src.zero_()
        return ticket


@breaks("test_copies_of_one_source_fill_disjoint_parts_of_one_destination")
class CopiesASourceOnce(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        done = self.__dict__.setdefault("done", set())
        if src.numel() == 300 and (src.data_ptr(), dst.dim()) in done:
            return Told(lambda: None)
        done.add((src.data_ptr(), dst.dim()))
        return super().copy_async(src, dst)


# errors


@breaks("test_a_copy_between_unlike_tensors_is_an_error_that_is_told_once")
class ConvertsSilently(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        if src.shape == dst.shape:
            src = src.to(dst.dtype)
        return super().copy_async(src, dst)


@breaks("test_a_copy_between_unlike_tensors_is_an_error_that_is_told_once")
class ForgetsErrorsAtSync(DiscreteBackend):
    def sync(self) -> None:
        self._failed.clear()
        super().sync()


@breaks("test_a_copy_between_unlike_tensors_is_an_error_that_is_told_once")
class TellsErrorsForEver(DiscreteBackend):
    def sync(self) -> None:
        failed = self._failed[:]
        try:
            super().sync()
        finally:
            self._failed += failed


@breaks("test_an_error_is_told_by_every_join_of_its_ticket")
class TellsOneJoinerAlone(DiscreteBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        ticket: Any = super().copy_async(src, dst)
        left = [ticket]
        return Told(lambda: left.pop().join() if left else None)


@breaks("test_an_error_is_its_own_copys_and_no_others", "test_after_an_error_the_backend_goes_on")
class NeverRecovers(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        try:
            return super().copy_async(src, dst)
        except ValueError:
            self._is_open = False
            raise


@breaks("test_a_product_of_unlike_sizes_is_an_error")
class MultipliesWhatThereIs(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        return super().matmul(x_TD, weight_FD[:, : x_TD.shape[1]], bias_F)


# matmul


@breaks("test_every_product_has_memory_of_its_own")
class HasOneResult(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        scratch = self.__dict__.setdefault("scratch", {})
        kept: Tensor = scratch.setdefault(out_TF.shape, out_TF)
        return kept.copy_(out_TF)


@breaks(
    "test_matmul_is_accurate",
    "test_products_accumulate_in_float32_or_better",
)
class RoundsItsSums(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = torch.zeros(x_TD.shape[0], weight_FD.shape[0], dtype=torch.bfloat16)
        for x_Td, weight_Fd in zip(x_TD.split(32, 1), weight_FD.split(32, 1), strict=True):
            out_TF += x_Td @ weight_Fd.T
        return out_TF.float() if bias_F is None else out_TF.float() + bias_F


@breaks("test_a_row_that_is_not_finite_spoils_itself_alone")
class ScalesAllRowsTogether(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        scale = x_TD.abs().max() if x_TD.numel() else 1.0
        return super().matmul(x_TD / scale, weight_FD) * scale + (0 if bias_F is None else bias_F)


@breaks(
    "test_matmul_takes_views_of_larger_tensors",
    "test_matmul_takes_rows_that_are_columns_in_memory",
    "test_matmul_takes_every_other_row",
)
class IgnoresStridesOfX(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        return super().matmul(x_TD.as_strided(x_TD.shape, (x_TD.shape[1], 1)), weight_FD, bias_F)


@breaks("test_matmul_leaves_its_arguments_as_they_were")
class AddsTheBiasInPlace(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        x_TD.mul_(2)
        return out_TF


@breaks("test_a_product_takes_its_operands_as_they_are_when_it_is_issued")
class RemembersWeightsByAddress(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        packed = self.__dict__.setdefault("packed", {})
        kept_FD = packed.setdefault(weight_FD.data_ptr(), weight_FD.clone())
        return super().matmul(x_TD, kept_FD, bias_F)


class Packs(ToasterBackend):
    """A toaster that packs weights; right as it is."""

    def pack(self, weight_FD: Tensor) -> Tensor:
        return weight_FD.clone()


@breaks("test_matmul_on_a_packed_weight_is_accurate")
class PacksInPlace(Packs):
    def pack(self, weight_FD: Tensor) -> Tensor:
        torch.as_strided(weight_FD, (weight_FD.numel(),), (1,)).mul_(2)
        return weight_FD


@breaks("test_a_packed_weight_may_have_been_a_view")
class PacksFromTheBeginningOfMemory(Packs):
    def pack(self, weight_FD: Tensor) -> Tensor:
        return weight_FD.as_strided(weight_FD.shape, weight_FD.stride(), 0).clone()


@breaks("test_the_features_of_a_result_can_be_cut_into_heads")
class AddsAColumn(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        return torch.cat([out_TF, out_TF[:, :1]], 1)


# packed products


def in_8_bits(x_TD: Tensor) -> Tensor:
    """Each token in 127 steps up to its largest feature; NaN where that is infinite."""
    steps_T1 = x_TD.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (x_TD / steps_T1).round() * steps_T1


class MultipliesPackedBread(ToasterBackend):
    """A toaster that multiplies with packed matrices; right as it is."""

    def multiplies(self, form: str, dtype: torch.dtype, num_tokens: int) -> bool:
        return form in ("int8", "int4")

    def settle(self, matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
        return replace(matrix, parts=tuple(part.clone() for part in matrix.parts))

    def matmul_packed(
        self, x_TD: Tensor, matrices: Sequence[PackedMatrix], biases_F: Sequence[Any]
    ) -> list[Tensor]:
        seen_TD = x_TD if x_TD.dtype is torch.float32 else self.rounded(x_TD.float())
        products = [self.matmul(seen_TD, self.values(matrix)) for matrix in matrices]
        return [
            (product_TF if bias_F is None else product_TF + bias_F).to(x_TD.dtype)
            for product_TF, bias_F in zip(products, biases_F, strict=True)
        ]

    def rounded(self, x_TD: Tensor) -> Tensor:
        """What a product in a narrow dtype sees: 8 bits, and 8 of what they leave."""
        return in_8_bits(x_TD) + in_8_bits(x_TD - in_8_bits(x_TD))

    def values(self, matrix: PackedMatrix) -> Tensor:
        codes, scales = matrix.parts
        if matrix.form == "int8":
            return codes * scales[:, None]
        codes_FD = torch.cat([codes & 15, codes >> 4], 2).transpose(1, 2).flatten(0, 1).float() - 8
        pairs_FG2 = scales.float().transpose(1, 2).flatten(0, 1)
        scales_FD, zeros_FD = pairs_FG2.repeat_interleave(matrix.group, 1).unbind(-1)
        num_out, num_in = matrix.shape
        return (codes_FD * scales_FD[:, :num_in] + zeros_FD[:, :num_in])[:num_out]


class TestPackedBread(PackedLaws):
    """No backend of flexport's own multiplies in float32, so the laws are seen to hold here."""

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = MultipliesPackedBread()
        yield backend
        backend.close()


PACKED_ACCURATE = "test_a_product_with_a_packed_matrix_is_accurate"


@breaks(PACKED_ACCURATE)
class RoundsInFloat32Too(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        return [out.to(x_TD.dtype) for out in super().matmul_packed(x_TD.half(), *others)]


@breaks(PACKED_ACCURATE)
class SwapsTheHalves(MultipliesPackedBread):
    def values(self, matrix: PackedMatrix) -> Tensor:
        codes, scales = matrix.parts
        swapped = codes << 4 | codes >> 4 if matrix.form == "int4" else codes
        return super().values(replace(matrix, parts=(swapped, scales)))


@breaks(PACKED_ACCURATE)
class LeavesOutTheShorterGroup(MultipliesPackedBread):
    def values(self, matrix: PackedMatrix) -> Tensor:
        values_FD = super().values(matrix)
        values_FD[:, matrix.shape[1] // (matrix.group or 1) * (matrix.group or 1) :] = 0
        return values_FD


@breaks(PACKED_ACCURATE)
class GivesRowsOfNothingNoWeight(MultipliesPackedBread):
    """Multiplies what belongs to nothing by zero."""

    def values(self, matrix: PackedMatrix) -> Tensor:
        return super().values(matrix) + 0 * matrix.parts[1].sum()


@breaks("test_a_product_with_a_packed_matrix_takes_views")
class IgnoresStridesOfPackedX(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        return super().matmul_packed(x_TD.as_strided(x_TD.shape, (x_TD.shape[1], 1)), *others)


@breaks("test_a_token_with_one_huge_feature_is_as_accurate_as_others")
class RoundsOnce(MultipliesPackedBread):
    def rounded(self, x_TD: Tensor) -> Tensor:
        return in_8_bits(x_TD)


@breaks("test_a_token_of_zeros_gives_the_bias")
class DividesByTheLargest(MultipliesPackedBread):
    def rounded(self, x_TD: Tensor) -> Tensor:
        largest_T1 = x_TD.abs().amax(1, keepdim=True)
        return super().rounded(x_TD / largest_T1) * largest_T1


@breaks("test_a_tokens_packed_product_does_not_depend_on_its_neighbours")
class RoundsAllTokensAlike(MultipliesPackedBread):
    def rounded(self, x_TD: Tensor) -> Tensor:
        return in_8_bits(x_TD.reshape(1, -1)).view_as(x_TD)


@breaks("test_packed_matrices_together_give_what_each_gives_alone")
class AddsTheFirstBiasAlone(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, matrices: Any, biases_F: Any) -> list[Tensor]:
        biases_F = [biases_F[0], *[None] * (len(matrices) - 1)]
        return super().matmul_packed(x_TD, matrices, biases_F)


@breaks("test_a_settled_matrix_gives_what_it_gave_unsettled")
class SettlesWithRoundedScales(MultipliesPackedBread):
    def settle(self, matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
        codes, scales = matrix.parts
        return replace(matrix, parts=(codes.clone(), scales.bfloat16().to(scales.dtype)))


@breaks("test_a_settled_matrix_takes_any_number_of_tokens")
class SettlesForSteps(MultipliesPackedBread):
    """It would decode for more tokens than that, which it does not say where it settles."""

    def multiplies(self, form: str, dtype: torch.dtype, num_tokens: int) -> bool:
        return super().multiplies(form, dtype, num_tokens) and num_tokens <= 64

    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        if len(x_TD) > 64:
            raise RuntimeError("more than 64 tokens are not implemented")
        return super().matmul_packed(x_TD, *others)


@breaks("test_a_settled_matrix_has_memory_of_its_own")
class SettlesWhereItLies(MultipliesPackedBread):
    def settle(self, matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
        return matrix


@breaks("test_a_token_that_is_not_finite_spoils_its_own_packed_product_alone")
class HidesWhatIsNotFinite(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        return super().matmul_packed(x_TD.nan_to_num(), *others)


@breaks("test_a_token_that_is_not_finite_spoils_its_own_packed_product_alone")
class LooksForTheLargestOfAll(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        return super().matmul_packed(x_TD + 0 * x_TD.max(), *others)


@breaks("test_a_packed_product_leaves_its_arguments_as_they_were")
class UnpacksInPlace(MultipliesPackedBread):
    def values(self, matrix: PackedMatrix) -> Tensor:
        values_FD = super().values(matrix)
        matrix.parts[0].zero_()
        return values_FD


@breaks("test_every_packed_product_has_memory_of_its_own")
class HasOnePackedProduct(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        kept = self.__dict__.setdefault("kept", {})
        results = super().matmul_packed(x_TD, *others)
        return [kept.setdefault((out.shape, out.dtype), out).copy_(out) for out in results]


@breaks("test_packed_products_work_in_inference_mode_and_then_outside_it")
class RoundsIntoABufferOfInferenceMode(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        buffer_TD = self.__dict__.setdefault("buffers", {}).setdefault(
            x_TD.dtype, torch.empty_like(x_TD)
        )
        return super().matmul_packed(buffer_TD.copy_(x_TD), *others)


@breaks("test_a_form_that_nobody_knows_is_not_multiplied")
class MultipliesWhateverComes(MultipliesPackedBread):
    def multiplies(self, form: str, dtype: torch.dtype, num_tokens: int) -> bool:
        return True


# attention


class Attends(ToasterBackend):
    """A toaster with something to do around its attention; right as it is."""

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        keys, values = list(keys_NKGE), list(values_NKGE)
        q_NHLE, keys, values, spec = self.before(q_NHLE, keys, values, spec)
        out_NHLE = super().attention(q_NHLE, keys, values, spec)
        return self.after(out_NHLE, q_NHLE, keys, values, spec)

    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, spec

    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        return out


ACCURATE = "test_attention_is_accurate_and_reads_nothing_past_the_length"


@breaks(ACCURATE, "test_any_attention_is_accurate")
class IgnoresTheWindow(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, window=None)


@breaks(ACCURATE, "test_a_rows_attention_does_not_depend_on_its_neighbours")
class IgnoresTheStarts(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        starts = spec.starts and (min(spec.starts),) * len(spec.starts)
        return q, keys, values, replace(spec, starts=starts)


@breaks(ACCURATE, "test_a_soft_cap_tames_large_scores")
class IgnoresTheSoftCap(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, soft_cap=None)


@breaks(ACCURATE)
class IgnoresTheSlopes(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, slopes=None)


@breaks(ACCURATE)
class IgnoresTheSinks(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, sinks=None)


@breaks(ACCURATE)
class IsAlwaysCausal(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, causal=True)


@breaks("test_attention_takes_any_scale", "test_large_scores_of_both_signs_are_accurate")
class RoundsTheScale(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, scale=2.0 ** round(math.log2(spec.scale)))


@breaks(ACCURATE)
class SharesKeysInTurns(Attends):
    """Query head h uses key/value head h % K."""

    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        num_heads, num_kv_heads = q.shape[1], keys[0].shape[1]
        order = torch.arange(num_heads).view(-1, num_kv_heads).T.flatten()
        return q[:, order], keys, values, spec


@breaks(ACCURATE)
class GivesThePastNoWeight(Attends):
    """Multiplies what lies past the length by zero."""

    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        return out.add_(0 * sum(page.sum() for page in values))


@breaks(
    "test_attention_takes_keys_in_either_order",
    "test_attention_takes_parts_of_one_projection",
    "test_attention_takes_pages_as_the_cache_lays_them_out",
    "test_attention_takes_a_chunk_behind_parts_of_pages",
)
class IgnoresStridesOfPages(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        keys = [page.as_strided(page.shape, torch.empty(page.shape).stride()) for page in keys]
        return q, keys, values, spec


@breaks("test_attention_takes_pages_that_begin_anywhere")
class AlignsPages(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        values = [
            page.as_strided(page.shape, page.stride(), page.storage_offset() // 4 * 4)
            for page in values
        ]
        return q, keys, values, spec


@breaks("test_attention_takes_queries_head_by_head")
class IgnoresStridesOfQueries(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        _, h, num_queries, e = q.shape
        return q.as_strided(q.shape, (h * num_queries * e, e, h * e, 1)), keys, values, spec


@breaks("test_large_scores_do_not_overflow")
class TakesTheExponentOfTheScore(Attends):
    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        largest = (q @ keys[0].nan_to_num().mT * spec.scale).amax().exp()
        return out.mul_(largest / largest)


@breaks("test_equal_keys_share_the_weight_equally")
class LeavesTheFirstOut(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, starts=(1,) * q.shape[0] if q.shape[2] == 1 else None)


@breaks("test_attention_leaves_its_arguments_as_they_were")
class ScalesQueriesInPlace(Attends):
    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        q.mul_(spec.scale)
        return out


@breaks("test_every_attention_has_memory_of_its_own")
class HasOneAttention(Attends):
    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        kept: Tensor = self.__dict__.setdefault("scratch", {}).setdefault(out.shape, out)
        return kept.copy_(out)


@breaks("test_a_row_of_the_cache_that_is_not_finite_spoils_itself_alone")
class ScalesAllQueriesTogether(Attends):
    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        return out + 0 * q.sum()


@breaks("test_an_attention_takes_the_cache_as_it_is_when_it_is_issued")
class RemembersPagesByAddress(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        kept = self.__dict__.setdefault("kept", {})
        keys, values = (
            [kept.setdefault(page.data_ptr(), page.clone()) for page in pages]
            for pages in (keys, values)
        )
        return q, keys, values, spec


# all together


@breaks("test_plain_torch_works_on_device_tensors", "test_plain_torch_and_kernels_keep_their_order")
class KnowsItsOwnVerbsOnly(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        tensor = super().allocate(shape, dtype, where)
        return tensor.as_subclass(Opaque) if where == "device" else tensor


class Opaque(Tensor):
    """A tensor that takes part in few operations."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.sqrt, Tensor.sqrt, Tensor.__add__, Tensor.add):
            raise NotImplementedError(f"{func} is not implemented for this device")
        return super().__torch_function__(func, types, args, kwargs or {})


@breaks("test_kernels_work_in_inference_mode_and_then_outside_it")
class KeepsABufferOfInferenceMode(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        buffers = self.__dict__.setdefault("buffers", {})
        buffer_TD = buffers.setdefault(threading.get_ident(), torch.empty_like(x_TD))
        return super().matmul(buffer_TD.copy_(x_TD), weight_FD, bias_F)


@breaks("test_verbs_may_be_called_from_many_threads")
class LetsOneThreadIn(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("this thread has no context")
        return super().matmul(x_TD, weight_FD, bias_F)


@breaks("test_results_of_one_thread_are_read_in_another")
class TakesResultsBackWithTheThread(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        if threading.current_thread() is not threading.main_thread():
            weakref.finalize(threading.current_thread(), out_TF.fill_, math.nan)
        return out_TF


@breaks("test_close_may_be_called_twice_and_ends_the_other_verbs")
class WorksOnWhenClosed(ToasterBackend):
    def sync(self) -> None:
        pass


@breaks("test_close_ends_well_with_copies_under_way")
class ClosesInTheMiddle(Late):
    def close(self) -> None:
        if any(lane._waiting for lane in self._lanes.values()):
            raise RuntimeError("copies are under way")
        super().close()


SUITE = """
import pytest
from flexport.testing import BackendConformance

class TestBroken(BackendConformance):
    @pytest.fixture
    def backend(self, broken):
        backend = broken()
        yield backend
        backend.close()

    @pytest.fixture
    def small_backend(self, broken):
        backend = broken(memory_bytes=1 << 20)
        yield backend
        backend.close()
"""


class Run:
    """A pytest plug-in that gives the class under test, and listens."""

    def __init__(self, broken: type) -> None:
        self._broken = broken
        self.failed: list[str] = []
        """The phases that failed: "setup", "call" or "teardown"."""

    @pytest.fixture
    def broken(self) -> type:
        """The backend's class."""
        return self._broken

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest."""
        if report.failed:
            self.failed.append(report.when or "")


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test file as a stranger writes it."""
    path = tmp_path_factory.mktemp("stranger") / "test_stranger.py"
    path.write_text(SUITE)
    return path


@pytest.mark.parametrize(
    ("broken", "law"), CATCHES, ids=[f"{broken.__name__}-{law[5:]}" for broken, law in CATCHES]
)
def test_a_broken_backend_is_caught(broken: type, law: str, suite: Path) -> None:
    if issubclass(broken, EmulatedBackend) and not hasattr(
        backend_registration, "_setup_privateuseone_for_python_backend"
    ):
        pytest.skip("this torch has no devices written in Python")
    run = Run(broken)

    # In this process, since torch takes seconds to import. Not by pytester, which would forget
    # what torch has imported meanwhile.
    pytest.main(
        [
            f"{suite}::TestBroken::{law}",
            "-x",
            *("--rootdir", str(suite.parent), "-c", os.devnull, "--import-mode=importlib"),
            *("--capture=no", "-p", "no:cacheprovider", "-p", "no:faulthandler"),
        ],
        plugins=[run],
    )

    assert run.failed[:1] == ["call"]


def test_every_law_has_been_seen_to_fail() -> None:
    laws = {name for name in dir(BackendConformance) if name.startswith("test_")}

    assert {law for _, law in CATCHES} <= laws
    assert sorted(laws - {law for _, law in CATCHES}) == []
