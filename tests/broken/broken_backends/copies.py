"""Backends that copy something else."""

from __future__ import annotations

import math

import torch
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import Told, breaks
from flexport.backend import Ticket


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
