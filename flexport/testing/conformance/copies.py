"""Laws of what `copy_async` copies: all of the source, to its place, and nothing else.

A backend that knows only flat copies meets all the ways here in which tensors may lie.
"""

from __future__ import annotations

import pytest
import torch

from flexport.backend import Backend
from flexport.testing.conformance.tensors import (
    COPIED_DTYPES,
    PATHS,
    Place,
    on_host,
    placed,
    some,
)

__all__ = ["CopyLaws"]


class CopyLaws:
    """One copy at a time, or some at once that have nothing to do with each other."""

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    @pytest.mark.parametrize("dtype", COPIED_DTYPES)
    def test_a_copy_is_exact(self, backend: Backend, dtype: str, src: Place, dst: Place) -> None:
        data = some((33, 7), getattr(torch, dtype))
        source = placed(backend, data, src)
        target = backend.allocate(data.shape, data.dtype, dst)

        backend.copy_async(source, target).join()

        assert torch.equal(on_host(backend, target), data)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_keeps_every_bit(self, backend: Backend, src: Place, dst: Place) -> None:
        # Both zeros, infinities, subnormals, and NaNs with a payload.
        bits = torch.tensor([0, -(2**31), 0x7F800000, 1, 0x7FC12345, 0x7F812345, -1, 0x00400000])
        data = bits.to(torch.int32).view(torch.float32)
        target = backend.allocate(data.shape, data.dtype, dst)

        backend.copy_async(placed(backend, data, src), target).join()

        assert torch.equal(on_host(backend, target).view(torch.int32), data.view(torch.int32))

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_of_nothing_and_of_one_number_work(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        for data in (torch.zeros(0, 3), torch.tensor(2.5)):
            target = backend.allocate(data.shape, data.dtype, dst)

            backend.copy_async(placed(backend, data, src), target).join()

            assert torch.equal(on_host(backend, target), data)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_large_copy_arrives_to_the_last_byte(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        data = torch.arange((2 << 20) + 3, dtype=torch.int32)
        target = backend.allocate(data.shape, data.dtype, dst)

        backend.copy_async(placed(backend, data, src), target).join()

        assert torch.equal(on_host(backend, target), data)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_between_slices_leaves_the_rest_alone(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        # Columns of a page: what a cache writes. They are strided on both sides.
        data = some((2, 3, 8, 4), torch.float32)
        before = some((2, 3, 16, 4), torch.float32)
        source, target = placed(backend, data, src), placed(backend, before, dst)

        backend.copy_async(source[:, :, 1:6], target[:, :, 9:14]).join()

        expected = before.clone()
        expected[:, :, 9:14] = data[:, :, 1:6]
        assert torch.equal(on_host(backend, target), expected)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_of_rows_leaves_the_rest_alone(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        data, before = some((8, 5), torch.bfloat16), some((16, 5), torch.bfloat16)
        source, target = placed(backend, data, src), placed(backend, before, dst)

        backend.copy_async(source[2:7], target[11:16]).join()

        expected = before.clone()
        expected[11:16] = data[2:7]
        assert torch.equal(on_host(backend, target), expected)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_may_begin_and_end_at_any_byte(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        # Bundles are bytes. Some devices' copies want multiples of four.
        data, before = some((80,), torch.uint8), some((80,), torch.uint8, seed=1)
        source = placed(backend, data, src)
        for begin, at, count in ((0, 1, 5), (1, 0, 7), (3, 2, 33), (5, 5, 1), (7, 13, 50)):
            target = placed(backend, before, dst)

            backend.copy_async(source[begin : begin + count], target[at : at + count]).join()

            expected = before.clone()
            expected[at : at + count] = data[begin : begin + count]
            assert torch.equal(on_host(backend, target), expected)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_goes_by_place_and_not_by_memory(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        data = some((6, 5, 4), torch.float32)
        source = placed(backend, data, src)
        turned = backend.allocate((4, 5, 6), torch.float32, dst)
        back = backend.allocate(data.shape, torch.float32, src)

        backend.copy_async(source.transpose(0, 2), turned).join()
        backend.copy_async(turned, back.transpose(0, 2)).join()

        assert torch.equal(on_host(backend, turned), data.transpose(0, 2))
        assert torch.equal(on_host(backend, back), data)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_leaves_its_source_as_it_was(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        data = some((64,), torch.float32)
        source = placed(backend, data, src)

        backend.copy_async(source, backend.allocate(data.shape, data.dtype, dst)).join()

        assert torch.equal(on_host(backend, source), data)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_copies_of_one_source_fill_disjoint_parts_of_one_destination(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        data, before = some((300,), torch.float32), some((10, 300), torch.float32, seed=1)
        source, target = placed(backend, data, src), placed(backend, before, dst)

        tickets = [backend.copy_async(source, target[row]) for row in range(9)]
        for ticket in tickets:
            ticket.join()

        assert torch.equal(on_host(backend, target[:9]), data.expand(9, -1))
        assert torch.equal(on_host(backend, target[9]), before[9])

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_copies_into_interleaved_parts_leave_each_other_alone(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        # One that reads a stretch, changes its part and writes it back would undo the others.
        data = some((4, 100), torch.float32)
        sources = [placed(backend, row, src) for row in data]
        target = placed(backend, torch.zeros(100, 4), dst)

        tickets = [
            backend.copy_async(source, target[:, place]) for place, source in enumerate(sources)
        ]
        for ticket in tickets:
            ticket.join()

        assert torch.equal(on_host(backend, target), data.T)

    def test_a_copy_may_fill_a_tensor_made_in_inference_mode(self, backend: Backend) -> None:
        data = some((9,), torch.float32)
        source = placed(backend, data)
        with torch.inference_mode():
            target = source * 0

        backend.copy_async(source, target).join()

        assert torch.equal(on_host(backend, target), data)
