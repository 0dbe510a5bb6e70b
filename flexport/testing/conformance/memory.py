"""Laws of a device that is full: what it refuses, what it gives back, and what works meanwhile.

They need a `small_backend`, whose memory is little and hard. Memory is asked for in sixteenths of
it, of which two may go to the rounding of a device's allocator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexport.backend import Backend
from flexport.errors import OutOfMemory
from flexport.testing.conformance.problems import AttentionCase, AttentionProblem, Product
from flexport.testing.conformance.tensors import in_threads, on_host, placed, some

__all__ = ["MemoryLaws"]

PIECES = 16

ROUNDING_PIECES = 2


class MemoryLaws:
    """Every byte is counted once, as long as somebody holds it and no longer."""

    def test_a_device_holds_what_it_says_and_no_more(self, small_backend: Backend) -> None:
        held = _fill(small_backend)

        assert PIECES - ROUNDING_PIECES <= len(held) <= PIECES
        for number, tensor in enumerate(held):
            tensor.fill_(number)
        for number, tensor in enumerate(held):
            assert set(tensor[::4096].tolist()) == {number}

    def test_what_is_dropped_can_be_had_again(self, small_backend: Backend) -> None:
        held = _fill(small_backend)

        for number in range(len(held)):
            del held[number]
            held.insert(number, _dropped_piece(small_backend))
            with pytest.raises(OutOfMemory):
                _piece(small_backend)

    def test_what_failed_took_nothing(self, small_backend: Backend) -> None:
        held = [_piece(small_backend) for _ in range(PIECES // 2)]

        for _ in range(2 * PIECES):
            with pytest.raises(OutOfMemory):
                _piece(small_backend, PIECES)

        held += _fill(small_backend)
        assert PIECES - ROUNDING_PIECES <= len(held) <= PIECES

    def test_a_view_counts_as_all_that_it_keeps(self, small_backend: Backend) -> None:
        whole = _piece(small_backend, PIECES - 4)

        part = whole[7:8]
        del whole
        gc.collect()
        with pytest.raises(OutOfMemory):
            _piece(small_backend, PIECES // 2)
        del part
        gc.collect()

        assert _piece(small_backend, PIECES - 4).numel() > 0

    def test_memory_of_many_sizes_can_be_used_as_one_piece_again(
        self, small_backend: Backend
    ) -> None:
        unit = small_backend.capabilities.memory_bytes // (8 * PIECES)
        for _ in range(3):
            held = [
                small_backend.allocate((unit * (1 + number * 5 % 7),), torch.uint8)
                for number in range(24)
            ]
            del held[1::2]  # not in the order in which they came
            held.clear()
            gc.collect()

            assert _piece(small_backend, PIECES - ROUNDING_PIECES).numel() > 0
            gc.collect()

    def test_threads_count_together(self, small_backend: Backend) -> None:
        def work(_: int) -> None:
            for number in range(40):
                held = [_piece(small_backend) for _ in range(1 + number % 3)]
                assert held[-1].numel() > 0
                del held  # before the next ones are asked for

        in_threads(work)
        gc.collect()

        assert PIECES - ROUNDING_PIECES <= len(_fill(small_backend)) <= PIECES

    def test_host_memory_does_not_count(self, small_backend: Backend) -> None:
        held = _fill(small_backend)

        host = small_backend.allocate(
            (small_backend.capabilities.memory_bytes,), torch.uint8, "host"
        )

        assert host.numel() > len(held)

    def test_a_full_device_still_copies(self, small_backend: Backend) -> None:
        num_bytes = small_backend.capabilities.memory_bytes // PIECES
        data = some((num_bytes,), torch.uint8)
        source = placed(small_backend, data, "host")
        target = small_backend.allocate(data.shape, data.dtype, "host")
        held = _fill(small_backend)

        for there in held:
            small_backend.copy_async(source, there).wait()
        small_backend.copy_async(held[0], held[-1]).wait()
        small_backend.copy_async(held[-1], target).join()

        assert torch.equal(target, data)

    def test_a_full_device_computes_right_or_is_out_of_memory(self, small_backend: Backend) -> None:
        product = Product.draw((64, 32, 48), torch.float32, with_bias=True)
        attention = AttentionProblem.draw(AttentionCase(pages=(16, 16), length=30, queries=4))
        operands, pages = product.on_device(small_backend), attention.on_device(small_backend)
        held = _fill(small_backend, pieces=8 * PIECES)

        kernels: list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = [
            (lambda: small_backend.matmul(*operands), product.check),
            (lambda: small_backend.attention(*pages), attention.check),
        ]
        for compute, check in kernels:
            # There may be room for one result; soon there is none.
            results: list[Tensor] = []
            try:
                for _ in range(64):
                    results.append(compute())
                    small_backend.sync()
            except OutOfMemory:
                pass
            del held[-4:]
            gc.collect()
            for result in [*results, compute()]:
                check(on_host(small_backend, result))

    def test_a_kept_ticket_keeps_no_memory_once_its_copy_is_done(
        self, small_backend: Backend
    ) -> None:
        tickets = []
        for _ in range(2 * PIECES):
            there = _dropped_piece(small_backend)
            here = small_backend.allocate(there.shape, there.dtype, "host").fill_(1)
            tickets.append(small_backend.copy_async(here, there))
            tickets[-1].join()
            del there, here

        assert len(tickets) == 2 * PIECES
        assert len(_fill(small_backend)) >= PIECES - ROUNDING_PIECES

    def test_a_copy_gives_its_memory_back_when_it_is_done(self, small_backend: Backend) -> None:
        for _ in range(4):
            there = _piece(small_backend, PIECES // 2)
            here = small_backend.allocate(there.shape, there.dtype, "host").fill_(1)

            small_backend.copy_async(here, there)
            del here, there
            small_backend.sync()
            gc.collect()

        assert len(_fill(small_backend)) >= PIECES - ROUNDING_PIECES


def _piece(backend: Backend, count: int = 1, *, pieces: int = PIECES) -> Tensor:
    """Bytes on the device: `count` of `pieces` equal parts of all that it has."""
    num_bytes = backend.capabilities.memory_bytes // pieces * count
    return backend.allocate((num_bytes,), torch.uint8)


def _dropped_piece(backend: Backend) -> Tensor:
    """One part, for which room was made by dropping others, perhaps in a cycle."""
    try:
        return _piece(backend)
    except OutOfMemory:
        gc.collect()
        return _piece(backend)


def _fill(backend: Backend, *, pieces: int = PIECES) -> list[Tensor]:
    """As many equal parts of the device's memory as it gives."""
    held: list[Tensor] = []
    try:
        while len(held) <= 2 * pieces:
            held.append(_piece(backend, pieces=pieces))
    except OutOfMemory:
        pass
    return held
