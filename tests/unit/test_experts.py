"""Experts stream through a window: those picked, in their order, and never more than it holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexport.engine.experts import ExpertStream, ExpertWindow, Moving, will_pick_nearly_all
from flexport.models.spec import Experts, Mlp
from flexport.planner.footprint import expert_window_bytes
from flexport.store.pool import GRAIN, Pool

EXPERTS = Experts(num_experts=32, top_k=4, mlp=Mlp(size=8, activation="silu", gated=True))


class Memory:
    """A pool, and what is asked of it."""

    def __init__(self, num_bytes: int) -> None:
        def make(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.uint8)

        self.pool = Pool("device", num_bytes, make)
        self.store = SimpleNamespace(device=self.pool, host=Pool("host", 0, make))
        self.started: list[Any] = []

    def moving(self, key: Any, num_grains: int) -> Moving:
        def start() -> Any:
            self.started.append(key)
            return [Lease(self.pool, num_grains * GRAIN)]

        return Moving(device_bytes=num_grains * GRAIN, host_bytes=0, decoded_bytes=0, start=start)


class Lease:
    """Takes memory until it is released, once."""

    def __init__(self, pool: Pool, num_bytes: int) -> None:
        self._pool, self._buffer = pool, pool.take(num_bytes)
        self.is_released = False

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True
        self._pool.give_back(self._buffer)


def window_for(layers: list[list[int]]) -> tuple[Memory, ExpertWindow]:
    """A window of the smallest size that the plan may give, and nothing beside it."""
    largest = max(size for sizes in layers for size in sizes)
    num_bytes = min(max(map(sum, layers)), 2 * largest) * GRAIN
    memory = Memory(num_bytes)
    return memory, ExpertWindow(memory.store, (num_bytes, 0), 0)  # type: ignore[arg-type]


def used(stream: ExpertStream, picked: list[int], *, stay: bool = False) -> list[int]:
    """What arrives, checked to be there while it is used."""
    seen = []
    for expert, leases in zip(picked, stream.arrivals(picked, stay=stay), strict=True):
        assert not any(lease.is_released for lease in leases)  # type: ignore[attr-defined]
        seen.append(expert)
    return seen


@st.composite
def layers_and_visits(draw):
    num_experts = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(1, 5), min_size=num_experts, max_size=num_experts)
    layers = draw(st.lists(sizes, min_size=1, max_size=3))
    picks = st.lists(st.integers(0, num_experts - 1), unique=True).map(sorted)
    visits = draw(
        st.lists(
            st.lists(picks, min_size=1, max_size=3), min_size=len(layers), max_size=len(layers)
        )
    )
    early = draw(st.lists(st.booleans(), min_size=len(layers), max_size=len(layers)))
    in_memory = draw(st.sets(st.integers(0, num_experts - 1), max_size=num_experts - 1))
    return layers, visits, early, in_memory


@given(job=layers_and_visits())
def test_picked_experts_arrive_whatever_came_early_and_all_memory_comes_back(job):
    layers, visits, early, in_memory = job
    memory, window = window_for(layers)
    streams = [
        ExpertStream(
            window,
            {
                expert: memory.moving((layer, expert), size)
                for expert, size in enumerate(sizes)
                if expert not in in_memory
            },
        )
        for layer, sizes in enumerate(layers)
    ]
    for stream, comes_early in zip(streams, early, strict=True):
        if comes_early:
            stream.begin()

    for stream, of_layer in zip(streams, visits, strict=True):
        for number, picked in enumerate(of_layer):
            assert used(stream, picked, stay=number < len(of_layer) - 1) == picked
        stream.close()

    assert memory.pool.used_bytes == memory.pool.capacity_bytes  # the window has it all again
    assert all(expert not in in_memory for _, expert in memory.started)


def test_only_picked_experts_move():
    memory, window = window_for([[1] * 8])
    stream = ExpertStream(window, {expert: memory.moving(expert, 1) for expert in range(8)})

    used(stream, [1, 4, 6])

    assert memory.started == [1, 4, 6]


def test_an_expert_that_stays_moves_once_for_all_visits_of_a_sweep():
    memory = Memory(4 * GRAIN)
    window = ExpertWindow(memory.store, (4 * GRAIN, 0), 0)  # type: ignore[arg-type]
    stream = ExpertStream(window, {expert: memory.moving(expert, 1) for expert in range(4)})

    for last in (False, False, True):
        used(stream, [0, 1, 2, 3], stay=not last)

    assert memory.started == [0, 1, 2, 3]


def test_without_room_for_all_some_stay():
    memory = Memory(3 * GRAIN)
    window = ExpertWindow(memory.store, (3 * GRAIN, 0), 0)  # type: ignore[arg-type]
    stream = ExpertStream(window, {expert: memory.moving(expert, 1) for expert in range(4)})

    used(stream, [0, 1, 2, 3], stay=True)
    used(stream, [0, 1, 2, 3], stay=False)

    assert len(memory.started) == 6  # of 8, were none to stay


def test_experts_of_the_next_layer_set_out_when_the_last_one_of_this_layer_has():
    memory = Memory(4 * GRAIN)
    window = ExpertWindow(memory.store, (4 * GRAIN, 0), 0)  # type: ignore[arg-type]
    first, second = (
        ExpertStream(window, {e: memory.moving((layer, e), 1) for e in range(4)})
        for layer in (0, 1)
    )
    first.begin()
    second.begin()

    assert memory.started == [(0, e) for e in range(4)]
    used(first, [0, 1, 2, 3])
    first.close()

    assert memory.started == [(layer, e) for layer in (0, 1) for e in range(4)]


def test_the_window_holds_two_experts_or_a_layer():
    assert expert_window_bytes([[5], [3]]) == 5
    assert expert_window_bytes([[1 << 30] * 8]) == 2 << 30
    assert expert_window_bytes([[1 << 20] * 8]) == 8 << 20
    assert expert_window_bytes([[1 << 20] * 4096]) == 256 << 20


def test_many_tokens_pick_nearly_all_experts_and_few_do_not():
    assert will_pick_nearly_all(EXPERTS, 64)
    assert not will_pick_nearly_all(EXPERTS, 8)
