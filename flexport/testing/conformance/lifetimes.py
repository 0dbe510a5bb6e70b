"""Laws of who holds what, and how long: a copy owns its two ends until it is done.

Memory given up too early shows when it is handed out again and overwritten, so each test asks for
more of the same size at once.
"""

from __future__ import annotations

import gc

import pytest
import torch

from flexport.backend import Backend
from flexport.testing.conformance.tensors import PATHS, PLACES, Place, on_host, placed, some

__all__ = ["LifetimeLaws"]

NUM_ITEMS = 1 << 18


class LifetimeLaws:
    """The caller may drop, or overwrite on the device, what a copy is still busy with."""

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_holds_its_source(self, backend: Backend, src: Place, dst: Place) -> None:
        data = some((NUM_ITEMS,), torch.float32)
        target = backend.allocate(data.shape, data.dtype, dst)
        source = placed(backend, data, src)

        ticket = backend.copy_async(source, target)
        del source
        gc.collect()
        others = [backend.allocate(data.shape, data.dtype, src).zero_() for _ in range(4)]
        ticket.join()

        assert torch.equal(on_host(backend, target), data)
        assert len(others) == 4

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_holds_the_view_that_is_its_source(
        self, backend: Backend, src: Place, dst: Place
    ) -> None:
        data = some((4, NUM_ITEMS // 4), torch.float32)
        target = backend.allocate((NUM_ITEMS // 8,), data.dtype, dst)
        whole = placed(backend, data, src)

        ticket = backend.copy_async(whole[2, ::2], target)
        del whole
        gc.collect()
        others = [backend.allocate(data.shape, data.dtype, src).zero_() for _ in range(4)]
        ticket.join()

        assert torch.equal(on_host(backend, target), data[2, ::2])
        assert len(others) == 4

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_holds_its_destination(self, backend: Backend, src: Place, dst: Place) -> None:
        source = placed(backend, some((NUM_ITEMS,), torch.float32), src)
        target = backend.allocate(source.shape, source.dtype, dst)

        ticket = backend.copy_async(source, target)
        del target
        gc.collect()
        others = [backend.allocate(source.shape, source.dtype, dst).fill_(7) for _ in range(4)]
        ticket.join()

        assert all(bool((on_host(backend, other) == 7).all()) for other in others)

    @pytest.mark.parametrize("where", PLACES)
    def test_a_ticket_may_be_dropped(self, backend: Backend, where: Place) -> None:
        other: Place = "host" if where == "device" else "device"
        data = some((NUM_ITEMS,), torch.float32)
        target = backend.allocate(data.shape, data.dtype, other)

        # Nothing of the copy has a name here.
        backend.copy_async(placed(backend, data, where), target)
        gc.collect()
        backend.sync()

        assert torch.equal(on_host(backend, target), data)

    @pytest.mark.parametrize("dst", PLACES)
    def test_device_work_after_wait_may_overwrite_the_source(
        self, backend: Backend, dst: Place
    ) -> None:
        data = some((NUM_ITEMS,), torch.float32)
        source = placed(backend, data)
        target = backend.allocate(data.shape, data.dtype, dst)

        ticket = backend.copy_async(source, target)
        ticket.wait()
        source.fill_(-1)
        ticket.join()

        assert torch.equal(on_host(backend, target), data)

    @pytest.mark.parametrize("src", PLACES)
    def test_device_work_after_wait_may_overwrite_the_destination(
        self, backend: Backend, src: Place
    ) -> None:
        source = placed(backend, some((NUM_ITEMS,), torch.float32), src)
        target = backend.allocate(source.shape, source.dtype)

        backend.copy_async(source, target).wait()
        target.fill_(7)
        backend.sync()

        assert bool((on_host(backend, target) == 7).all())

    def test_the_host_may_overwrite_the_source_after_join(self, backend: Backend) -> None:
        data = some((NUM_ITEMS,), torch.float32)
        source = placed(backend, data, "host")
        target = backend.allocate(data.shape, data.dtype)

        backend.copy_async(source, target).join()
        source.zero_()

        assert torch.equal(on_host(backend, target), data)

    def test_a_buffer_is_used_again_and_again(self, backend: Backend) -> None:
        """As staging is: filled, read by device work, and filled anew, with no join between."""
        data = [some((256, 256), torch.float32, seed=number) for number in range(12)]
        sources = [placed(backend, values, "host") for values in data]
        staged = backend.allocate((256, 256), torch.float32)
        targets = [backend.allocate((256, 256), torch.float32, "host") for _ in data]

        tickets = []
        for source, target in zip(sources, targets, strict=True):
            backend.copy_async(source, staged).wait()
            doubled = staged * 2
            tickets.append(backend.copy_async(doubled, target))
            del doubled
        for ticket in tickets:
            ticket.join()

        assert all(
            torch.equal(target, values * 2) for values, target in zip(data, targets, strict=True)
        )
