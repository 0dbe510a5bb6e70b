"""Pinned host memory: exact, shared where small, bounded, and gone when nothing needs it."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from flexport_cuda import pinned
from flexport_cuda.pinned import HostMemory
from hypothesis import given
from hypothesis import strategies as st

from flexport.errors import OutOfMemory

MIB = 1 << 20


class Registry:
    """What is pinned, as the card's driver would know it."""

    def __init__(self, most_bytes: int = 1 << 50) -> None:
        self.most_bytes = most_bytes
        self.pinned: dict[int, int] = {}
        self.num_calls = 0

    def register(self, address: int, num_bytes: int) -> str | None:
        self.num_calls += 1
        assert address % 4096 == num_bytes % 4096 == 0
        if num_bytes > self.most_bytes:
            return "out of memory"
        self.pinned[address] = num_bytes
        return None

    def unregister(self, address: int) -> None:
        del self.pinned[address]

    @property
    def total_bytes(self) -> int:
        return sum(self.pinned.values())


def make(registry: Registry, bound_bytes: int = 1 << 50) -> HostMemory:
    return HostMemory(registry.register, registry.unregister, bound_bytes)


def test_large_requests_are_pinned_to_the_page_and_not_to_a_power_of_two() -> None:
    registry = Registry()
    memory = make(registry)

    kept = [memory.allocate((17 * MIB + 1,), torch.uint8) for _ in range(5)]

    assert len(kept) == 5
    assert registry.total_bytes == memory.pinned_bytes == 5 * (17 * MIB + 4096)


def test_small_requests_share_slabs_that_grow_with_what_there_is() -> None:
    registry = Registry()
    memory = make(registry)

    kept = [memory.allocate((MIB,), torch.uint8) for _ in range(200)]

    assert len(kept) == 200
    assert sorted(registry.pinned.values()) == [
        size * MIB for size in (4, 4, 8, 16, 32, 64, 64, 64)
    ]


def test_a_tensor_in_it_is_as_any_other() -> None:
    memory = make(Registry())

    for shape in ((), (7,), (3, 5, 2), (0, 4)):
        tensor = memory.allocate(shape, torch.int64)
        assert tuple(tensor.shape) == shape
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 4096 == 0
        tensor.fill_(3)


def test_a_slab_is_unpinned_when_the_last_view_in_it_goes() -> None:
    registry = Registry()
    memory = make(registry)
    tensor = memory.allocate((65 * MIB,), torch.uint8)
    view = tensor[MIB : 2 * MIB].view(torch.float32)

    del tensor
    gc.collect()
    assert registry.total_bytes == 65 * MIB
    view.fill_(1.0)
    del view
    gc.collect()

    assert registry.pinned == {}
    assert memory.pinned_bytes == memory.held_bytes == 0


def test_what_comes_and_goes_is_pinned_once() -> None:
    registry = Registry()
    memory = make(registry)
    kept = memory.allocate((MIB,), torch.uint8)

    for _ in range(100):
        memory.allocate((20 * MIB,), torch.uint8)
        memory.allocate((3000,), torch.uint8)

    assert kept.numel() == MIB
    assert registry.num_calls == 2


def test_spare_slabs_are_kept_up_to_a_bound_and_none_after_close() -> None:
    registry = Registry()
    memory = make(registry)

    for _ in range(3):
        kept = [memory.allocate((30 * MIB,), torch.uint8) for _ in range(4)]
        del kept
        gc.collect()
        assert registry.total_bytes <= pinned.SPARE_BYTES
    memory.close()

    assert registry.pinned == {}


@pytest.mark.parametrize("how", ["bound", "refusal"])
def test_what_can_not_be_pinned_is_pageable_and_told_once(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(most_bytes=20 * MIB if how == "refusal" else 1 << 50)
    memory = make(registry, bound_bytes=20 * MIB if how == "bound" else 1 << 50)

    with caplog.at_level(logging.WARNING):
        kept = [memory.allocate((size * MIB,), torch.uint8).zero_() for size in (17, 30, 40)]

    assert memory.pinned_bytes == registry.total_bytes == 17 * MIB
    assert len(caplog.records) == 1
    assert "several times slower" in caplog.records[0].getMessage()
    if how == "bound":
        assert "set FLEXPORT_CUDA_PINNED for more" in caplog.records[0].getMessage()
    del kept
    gc.collect()
    memory.close()
    assert registry.pinned == {}


def test_a_size_that_could_not_be_pinned_is_not_tried_again_and_a_smaller_one_is() -> None:
    registry = Registry(most_bytes=20 * MIB)
    memory = make(registry)

    kept = [memory.allocate((size * MIB,), torch.uint8) for size in (30, 30, 31, 17)]

    assert len(kept) == 4
    assert registry.num_calls == 2
    assert memory.pinned_bytes == 17 * MIB


def test_a_tensor_may_end_while_its_memory_is_being_handed_out() -> None:
    registry = Registry()
    memory = make(registry)
    tensor = memory.allocate((100 * MIB,), torch.uint8)

    with memory._lock:  # as when the collector runs within `allocate`
        del tensor
        gc.collect()
    assert registry.total_bytes == 100 * MIB
    memory.allocate((1,), torch.uint8)

    assert registry.total_bytes == pinned.SMALLEST_SLAB_BYTES


def test_more_than_there_is_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match=f"asked for {1 << 60} bytes of host memory, about"):
        make(Registry()).allocate((1 << 60,), torch.uint8)


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 4096, 5000, 70_000, 300_000]), st.integers(0, 5)),
        max_size=60,
    )
)
def test_nothing_overlaps_whatever_comes_and_goes(steps: list[tuple[int, int]]) -> None:
    registry = Registry()
    memory = make(registry)
    kept: list[torch.Tensor] = []
    for number, (num_bytes, num_ended) in enumerate(steps):
        kept.append(memory.allocate((num_bytes,), torch.uint8).fill_(number))
        assert all(int(t.min()) == int(t.max()) for t in kept)
        del kept[: max(0, num_ended - 3)]

    assert [int(t[0]) for t in kept] == list(range(len(steps)))[len(steps) - len(kept) :]
    kept.clear()
    assert all(slab.is_empty for slab in memory._slabs)


def test_the_bound_is_half_of_the_machine_or_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psutil

    monkeypatch.delenv("FLEXPORT_CUDA_PINNED", raising=False)
    assert pinned.pinned_bound_bytes() == psutil.virtual_memory().total // 2
    monkeypatch.setenv("FLEXPORT_CUDA_PINNED", "3GB")
    assert pinned.pinned_bound_bytes() == 3 << 30
