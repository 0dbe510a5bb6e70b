"""The fake device keeps the contract, and catches what it is there to catch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from flexport.backend import AttentionSpec, Backend
from flexport.errors import OutOfMemory
from flexport.testing.conformance import BackendConformance
from flexport.testing.discrete import Call, DiscreteBackend


class TestDiscrete(BackendConformance):
    @pytest.fixture(params=[(False, False), (True, False), (False, True)], ids=str)
    def backend(self, request: pytest.FixtureRequest) -> Iterator[Backend]:
        late, unified = request.param
        backend = DiscreteBackend(late=late, unified=unified)
        yield backend
        backend.close()


@pytest.fixture
def fake() -> Iterator[DiscreteBackend]:
    backend = DiscreteBackend(memory_bytes=1000)
    yield backend
    backend.close()


def test_it_is_not_unified_unless_asked_to_be_and_never_addressable(fake: DiscreteBackend) -> None:
    with closing(DiscreteBackend(unified=True)) as one_pool:
        kinds = [(f.unified, f.addressable) for f in (fake.capabilities, one_pool.capabilities)]

    assert kinds == [(False, False), (True, False)]
    assert fake.capabilities.memory_bytes == 1000


def test_fresh_memory_holds_nan(fake: DiscreteBackend) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert bool(fake.allocate((5,), dtype).isnan().all())
        assert bool(fake.allocate((5,), dtype, "host").isnan().all())


def test_device_memory_is_bounded_and_comes_back(fake: DiscreteBackend) -> None:
    held = fake.allocate((600,), torch.uint8)

    with pytest.raises(OutOfMemory, match="400 of 1000"):
        fake.allocate((401,), torch.uint8)
    view = held[:10]
    del held
    gc.collect()
    assert fake.used_bytes == 600  # a view keeps its memory
    del view
    gc.collect()

    assert fake.used_bytes == 0
    assert fake.allocate((1000,), torch.uint8).numel() == 1000
    assert fake.peak_bytes == 1000


def test_host_memory_does_not_count_as_the_devices(fake: DiscreteBackend) -> None:
    host = fake.allocate((5000,), torch.uint8, "host")

    assert fake.used_bytes == 0
    assert host.numel() == 5000


def test_where_memory_is_unified_the_hosts_counts_too() -> None:
    with closing(DiscreteBackend(memory_bytes=1000, unified=True)) as fake:
        host = fake.allocate((600,), torch.uint8, "host")

        with pytest.raises(OutOfMemory, match="400 of 1000"):
            fake.allocate((401,), torch.uint8)
        del host
        gc.collect()

        assert fake.used_bytes == 0


def test_kernels_refuse_host_memory(fake: DiscreteBackend) -> None:
    host = fake.allocate((2, 2), torch.float32, "host").fill_(1)
    device = fake.allocate((2, 2), torch.float32).fill_(1)
    page = fake.allocate((1, 1, 2, 2), torch.float32, "host").fill_(1)
    spec = AttentionSpec(length=2, scale=1.0)

    for arguments in ((host, device), (device, host), (device, device, host[0])):
        with pytest.raises(RuntimeError, match="in host memory"):
            fake.matmul(*arguments)
    with pytest.raises(RuntimeError, match="in host memory"):
        fake.attention(torch.ones(1, 1, 1, 2), [page], [page], spec)


def test_the_diary_tells_links_and_bytes(fake: DiscreteBackend) -> None:
    host = fake.allocate((8,), torch.float32, "host").zero_()
    device = fake.allocate((8,), torch.float32)

    fake.copy_async(host, device).wait()
    fake.copy_async(device[:2], host[:2]).join()
    fake.copy_async(device[:3], device[4:7]).join()
    fake.matmul(device.view(2, 4), device.view(2, 4))

    assert fake.calls == [
        Call("allocate", 32),
        Call("allocate", 32),
        Call("host_to_device", 32),
        Call("device_to_host", 8),
        Call("within", 12),
        Call("matmul", 32),
    ]
    assert fake.moved_bytes("host_to_device") == 32


def test_held_copies_do_not_begin_until_they_are_let_go(fake: DiscreteBackend) -> None:
    host = fake.allocate((4,), torch.float32, "host").fill_(3)
    device = fake.allocate((4,), torch.float32)

    with fake.copies_held():
        ticket = fake.copy_async(host, device)
        seen_while_held = device.clone()
    ticket.join()

    assert bool(seen_while_held.isnan().all())
    assert device.tolist() == [3] * 4


def test_a_late_copy_shows_a_forgotten_wait() -> None:
    fake = DiscreteBackend(late=True)
    host = fake.allocate((4,), torch.float32, "host").fill_(3)
    device = fake.allocate((4,), torch.float32)

    ticket = fake.copy_async(host, device)

    assert bool(device.isnan().all())
    ticket.wait()
    assert device.tolist() == [3] * 4
    fake.close()


def test_a_late_copy_shows_a_source_that_was_changed_too_early() -> None:
    fake = DiscreteBackend(late=True)
    host = fake.allocate((4,), torch.float32, "host").fill_(3)
    device = fake.allocate((4,), torch.float32)

    ticket = fake.copy_async(host, device)
    host.fill_(9)
    ticket.join()

    assert device.tolist() == [9] * 4
    fake.close()


def test_closing_finishes_the_copies_under_way() -> None:
    fake = DiscreteBackend()
    host = fake.allocate((4,), torch.float32, "host").fill_(3)
    device = fake.allocate((4,), torch.float32)

    fake.copy_async(host, device)
    fake.close()

    assert device.tolist() == [3] * 4
