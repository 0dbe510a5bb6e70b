"""Laws of `allocate`: memory that is what was asked for, and nobody else's while it lives."""

from __future__ import annotations

import gc

import pytest
import torch

from flexport.backend import Backend
from flexport.errors import OutOfMemory
from flexport.testing.conformance.tensors import (
    COPIED_DTYPES,
    PLACES,
    Place,
    in_threads,
    on_host,
    placed,
)

__all__ = ["AllocateLaws"]


class AllocateLaws:
    """Shapes, places and owners."""

    @pytest.mark.parametrize("where", PLACES)
    @pytest.mark.parametrize("dtype", COPIED_DTYPES)
    def test_allocate_gives_the_shape_and_dtype_asked_for_contiguous(
        self, backend: Backend, dtype: str, where: Place
    ) -> None:
        for shape in ((), (7,), (3, 5, 2), (0, 4), (1025, 1024)):
            tensor = backend.allocate(shape, getattr(torch, dtype), where)

            assert tuple(tensor.shape) == shape
            assert tensor.dtype is getattr(torch, dtype)
            assert tensor.is_contiguous()

    def test_a_shape_may_be_any_sequence(self, backend: Backend) -> None:
        for shape in ([2, 3], (2, 3), torch.Size([2, 3])):
            assert tuple(backend.allocate(shape, torch.float32).shape) == (2, 3)

    def test_host_memory_is_the_cpus(self, backend: Backend) -> None:
        # On some devices a "pinned" tensor is in truth a device tensor.
        assert backend.allocate((4,), torch.float32, "host").device.type == "cpu"

    def test_device_memory_is_all_on_one_device(self, backend: Backend) -> None:
        first = backend.allocate((4,), torch.float32)
        second = backend.allocate((4,), torch.uint8)

        assert first.device == second.device

    @pytest.mark.parametrize("where", PLACES)
    def test_allocations_do_not_overlap(self, backend: Backend, where: Place) -> None:
        tensors = [backend.allocate((17,), torch.int32, where) for _ in range(9)]

        for number, tensor in enumerate(tensors):
            tensor.fill_(number)

        backend.sync()
        assert [set(tensor.tolist()) for tensor in tensors] == [{n} for n in range(9)]

    @pytest.mark.parametrize("where", PLACES)
    def test_a_view_keeps_its_memory(self, backend: Backend, where: Place) -> None:
        shape = (64, 1024)
        whole = placed(backend, torch.full(shape, 3.0), where)

        part = whole[5]
        del whole
        gc.collect()
        others = [backend.allocate(shape, torch.float32, where).fill_(-1) for _ in range(4)]

        assert set(on_host(backend, part).tolist()) == {3.0}
        assert len(others) == 4

    def test_threads_that_allocate_at_once_get_memory_of_their_own(self, backend: Backend) -> None:
        mine: list[list[torch.Tensor]] = [[] for _ in range(4)]

        def work(number: int) -> None:
            for size in range(1, 40):
                for where in PLACES:
                    tensor = backend.allocate((size * 16,), torch.float32, where)
                    mine[number].append(tensor.fill_(number))

        in_threads(work, count=len(mine))

        for number, tensors in enumerate(mine):
            assert all(set(on_host(backend, tensor).tolist()) == {number} for tensor in tensors)

    @pytest.mark.parametrize("where", PLACES)
    def test_memory_allocated_in_inference_mode_can_be_written_outside_it(
        self, backend: Backend, where: Place
    ) -> None:
        with torch.inference_mode():
            tensors = [backend.allocate((n,), torch.float32, where) for n in (4, 2 << 20)]

        for tensor in tensors:
            tensor.zero_()

        assert all(float(tensor.sum()) == 0 for tensor in tensors)

    def test_an_allocation_without_room_raises_out_of_memory(self, backend: Backend) -> None:
        with pytest.raises(OutOfMemory):
            backend.allocate((1 << 50,), torch.uint8)

        # It gave nothing, and took nothing from what comes next.
        assert placed(backend, torch.ones(3)).tolist() == [1, 1, 1]
        backend.sync()
