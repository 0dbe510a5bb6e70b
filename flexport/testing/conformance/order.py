"""Laws of what comes before what: copies, device work, and tickets in every order and thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flexport.backend import Backend, Ticket
from flexport.testing.conformance.tensors import (
    PLACES,
    Place,
    in_threads,
    on_host,
    placed,
    some,
)

__all__ = ["OrderLaws"]

MANY = 400
"""More copies than any reasonable queue has places."""


class OrderLaws:
    """A copy follows the device work issued before it, and `wait` puts later work behind it."""

    def test_a_ticket_is_a_ticket(self, backend: Backend) -> None:
        ticket = backend.copy_async(
            placed(backend, torch.ones(3), "host"), placed(backend, torch.ones(3))
        )

        assert isinstance(ticket, Ticket)
        ticket.join()

    @pytest.mark.parametrize("dst", PLACES)
    def test_a_copy_sees_the_device_work_issued_before_it(
        self, backend: Backend, dst: Place
    ) -> None:
        values = placed(backend, torch.ones(512, 512))
        target = backend.allocate(values.shape, values.dtype, dst)

        for _ in range(50):
            values = values * 1.0 + 1.0
        backend.copy_async(values, target).join()

        assert set(on_host(backend, target).flatten().tolist()) == {51.0}

    def test_a_copy_sees_the_kernels_issued_before_it(self, backend: Backend) -> None:
        x_TD, weight_DD = placed(backend, torch.ones(256, 256)), placed(backend, torch.eye(256))
        target = backend.allocate((256, 256), torch.float32, "host")

        for _ in range(20):
            x_TD = backend.matmul(x_TD, weight_DD)
        backend.copy_async(x_TD, target).join()

        assert set(target.flatten().tolist()) == {1.0}

    @pytest.mark.parametrize("src", PLACES)
    def test_a_copy_does_not_overtake_work_that_reads_its_destination(
        self, backend: Backend, src: Place
    ) -> None:
        source = placed(backend, torch.full((512, 512), 100.0), src)
        target = placed(backend, torch.ones(512, 512))

        total = target * 1.0
        for _ in range(30):
            total = total + target
        backend.copy_async(source, target).join()

        assert set(on_host(backend, total).flatten().tolist()) == {31.0}
        assert set(on_host(backend, target).flatten().tolist()) == {100.0}

    def test_device_work_after_wait_sees_the_copy(self, backend: Backend) -> None:
        data = some((512, 512), torch.float32)
        source = placed(backend, data, "host")
        target = placed(backend, torch.zeros(512, 512))

        backend.copy_async(source, target).wait()
        doubled = target * 2

        assert torch.equal(on_host(backend, doubled), data * 2)

    def test_kernels_after_wait_see_the_copy(self, backend: Backend) -> None:
        data = some((512, 512), torch.float32)
        source, eye_DD = placed(backend, data, "host"), placed(backend, torch.eye(512))
        target = placed(backend, torch.zeros(512, 512))

        backend.copy_async(source, target).wait()
        out_TF = backend.matmul(target, eye_DD)

        # Some kernels round float32 operands to shorter ones; a missed copy would be all zero.
        assert float((on_host(backend, out_TF) - data).abs().max()) < 1e-2

    def test_work_in_another_thread_after_wait_sees_the_copy(self, backend: Backend) -> None:
        data = some((512, 512), torch.float32)
        source = placed(backend, data, "host")
        target = placed(backend, torch.zeros(512, 512))
        found: list[torch.Tensor] = []

        backend.copy_async(source, target).wait()
        in_threads(lambda _: found.append(target * 2), count=1)

        assert torch.equal(on_host(backend, found[0]), data * 2)

    def test_a_wait_in_another_thread_orders_work_in_this_one(self, backend: Backend) -> None:
        data = some((512, 512), torch.float32)
        source = placed(backend, data, "host")
        target = placed(backend, torch.zeros(512, 512))

        ticket = backend.copy_async(source, target)
        in_threads(lambda _: ticket.wait())
        doubled = target * 2

        assert torch.equal(on_host(backend, doubled), data * 2)

    def test_a_copy_after_wait_sees_the_copy_waited_for(self, backend: Backend) -> None:
        data = some((256, 256), torch.float32)
        source = placed(backend, data, "host")
        middle = backend.allocate(data.shape, data.dtype)
        target = backend.allocate(data.shape, data.dtype, "host")

        backend.copy_async(source, middle).wait()
        backend.copy_async(middle, target).join()

        assert torch.equal(target, data)

    def test_a_chain_of_copies_carries_the_values_through(self, backend: Backend) -> None:
        data = some((256, 256), torch.float32)
        source = placed(backend, data, "host")
        stations = [backend.allocate(data.shape, data.dtype) for _ in range(3)]
        target = backend.allocate(data.shape, data.dtype, "host")

        for station in stations:
            backend.copy_async(source, station).wait()
            source = station
        backend.copy_async(source, target).join()

        assert torch.equal(target, data)

    def test_a_second_copy_after_wait_overwrites_the_first(self, backend: Backend) -> None:
        sources = [placed(backend, torch.full((300,), float(n)), "host") for n in range(20)]
        target = backend.allocate((300,), torch.float32)

        for source in sources:
            backend.copy_async(source, target).wait()
        backend.sync()

        assert set(on_host(backend, target).tolist()) == {19.0}

    @pytest.mark.parametrize(
        "order", [list, lambda tickets: tickets[::-1], lambda tickets: tickets[::2] + tickets[1::2]]
    )
    def test_tickets_are_waited_for_in_one_order_and_joined_in_another(
        self, backend: Backend, order: Callable[[list[Ticket]], list[Ticket]]
    ) -> None:
        data = [some((97,), torch.float32, seed=number) for number in range(32)]
        sources = [placed(backend, values, "host") for values in data]
        targets = [placed(backend, torch.zeros(97)) for _ in data]

        tickets = [
            backend.copy_async(source, target)
            for source, target in zip(sources, targets, strict=True)
        ]
        for ticket in order(tickets):
            ticket.wait()
        sums = [target + target for target in targets]
        for ticket in reversed(order(tickets)):
            ticket.join()

        for values, doubled in zip(data, sums, strict=True):
            assert torch.equal(on_host(backend, doubled), values * 2)

    def test_hundreds_of_copies_in_both_directions_all_arrive(self, backend: Backend) -> None:
        data = some((MANY, 97), torch.float32)
        rows = placed(backend, data, "host")
        there = backend.allocate((MANY, 97), torch.float32)
        here = placed(backend, some((MANY, 97), torch.float32, seed=1))
        back = backend.allocate((MANY, 97), torch.float32, "host")

        tickets = []
        for number in range(MANY):
            tickets.append(backend.copy_async(rows[number], there[number]))
            tickets.append(backend.copy_async(here[number], back[number]))
        for ticket in reversed(tickets):
            ticket.join()

        assert torch.equal(on_host(backend, there), data)
        assert torch.equal(back, on_host(backend, here))

    def test_a_ticket_can_be_waited_for_and_joined_again(self, backend: Backend) -> None:
        source = placed(backend, torch.ones(3), "host")
        ticket = backend.copy_async(source, backend.allocate((3,), torch.float32))

        ticket.wait()
        ticket.wait()
        ticket.join()
        ticket.wait()
        ticket.join()

    def test_a_ticket_can_be_joined_by_many_threads(self, backend: Backend) -> None:
        data = some((512, 512), torch.float32)
        target = backend.allocate(data.shape, data.dtype, "host")
        ticket = backend.copy_async(placed(backend, data), target)

        def work(_: int) -> None:
            ticket.join()
            assert torch.equal(target, data)

        in_threads(work)

    def test_copies_and_work_of_many_threads_do_not_mix(self, backend: Backend) -> None:
        def work(seed: int) -> None:
            staged = backend.allocate((128, 128), torch.float32)
            target = backend.allocate((128, 128), torch.float32, "host")
            for step in range(8):
                data = some((128, 128), torch.float32, seed=10 * seed + step)
                source = backend.allocate(data.shape, data.dtype, "host").copy_(data)
                backend.copy_async(source, staged).wait()
                changed = staged * 2 + 1
                backend.copy_async(changed, target).join()
                assert torch.equal(target, data * 2 + 1)

        in_threads(work)

    def test_sync_waits_for_copies(self, backend: Backend) -> None:
        data = some((512, 512), torch.float32)
        targets = [backend.allocate(data.shape, data.dtype, "host") for _ in range(4)]
        source = placed(backend, data)

        for target in targets:
            backend.copy_async(source, target)
        backend.sync()

        assert all(torch.equal(target, data) for target in targets)

    def test_sync_in_another_thread_waits_for_the_copies_of_this_one(
        self, backend: Backend
    ) -> None:
        data = some((512, 512), torch.float32)
        target = backend.allocate(data.shape, data.dtype, "host")

        backend.copy_async(placed(backend, data), target)
        in_threads(lambda _: backend.sync())

        assert torch.equal(target, data)

    def test_sync_with_nothing_to_do_returns(self, backend: Backend) -> None:
        backend.sync()
        backend.sync()
