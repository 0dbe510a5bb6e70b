"""A pool never hands out more than its cap, and hands out the same memory again."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexport.errors import OutOfMemory
from flexport.store.pool import GRAIN, Pool, Promise


class Memory:
    """Makes tensors and knows how much of what it made is still held."""

    def __init__(self):
        self.held_bytes = 0
        self.num_made = 0

    def make(self, num_bytes):
        tensor = torch.empty(num_bytes, dtype=torch.uint8)
        self.held_bytes += num_bytes
        self.num_made += 1
        weakref.finalize(tensor, self._gone, num_bytes)
        return tensor

    def _gone(self, num_bytes):
        self.held_bytes -= num_bytes


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 6 * GRAIN)),
        st.tuples(st.just("give back"), st.integers(0, 99)),
        st.tuples(st.just("reserve"), st.integers(0, 4 * GRAIN)),
        st.tuples(st.just("unreserve"), st.integers(0, 99)),
    ),
    max_size=40,
)


@given(steps=STEPS)
def test_what_is_used_and_what_is_spare_together_stay_below_the_cap(steps):
    memory = Memory()
    pool = Pool("device", 10 * GRAIN, memory.make)
    buffers, reserved = [], []

    for verb, number in steps:
        try:
            if verb == "take":
                buffers.append(pool.take(number))
                assert buffers[-1].num_bytes >= number
            elif verb == "reserve":
                pool.reserve(number)
                reserved.append(number)
            elif verb == "give back" and buffers:
                pool.give_back(buffers.pop(number % len(buffers)))
            elif verb == "unreserve" and reserved:
                pool.unreserve(reserved.pop(number % len(reserved)))
        except OutOfMemory:
            assert pool.rounded(number) > pool.free_bytes or number > pool.free_bytes
        gc.collect(0)

        in_use = sum(buffer.num_bytes for buffer in buffers) + sum(reserved)
        assert pool.used_bytes == in_use
        assert memory.held_bytes + sum(reserved) <= pool.capacity_bytes
        assert in_use <= pool.peak_bytes <= pool.capacity_bytes


@given(steps=STEPS)
def test_pools_beside_each_other_stay_below_one_cap_together(steps):
    memories = [Memory(), Memory()]
    first = Pool("device", 10 * GRAIN, memories[0].make)
    pools = [first, first.beside(memories[1].make)]
    buffers = []

    for verb, number in steps:
        own = number % 2
        try:
            if verb == "take":
                buffers.append((own, pools[own].take(number)))
            elif verb == "give back" and buffers:
                place = number % len(buffers)
                pools[buffers[place][0]].give_back(buffers.pop(place)[1])
        except OutOfMemory:
            assert pools[own].rounded(number) > first.free_bytes
        gc.collect(0)

        in_use = [sum(b.num_bytes for own, b in buffers if own == kind) for kind in (0, 1)]
        assert [pool.used_bytes for pool in pools] == [sum(in_use)] * 2
        # Each buffer is of its own pool's memory, and all that was made is below the cap.
        assert all(memory.held_bytes >= used for memory, used in zip(memories, in_use, strict=True))
        assert sum(memory.held_bytes for memory in memories) <= first.capacity_bytes


def test_spare_buffers_of_one_kind_make_room_for_the_other():
    memory, other = Memory(), Memory()
    pool = Pool("device", 4 * GRAIN, memory.make)
    beside = pool.beside(other.make)
    for buffer in [pool.take(GRAIN) for _ in range(4)]:
        pool.give_back(buffer)
    del buffer

    taken = beside.take(3 * GRAIN)
    gc.collect()

    assert (memory.held_bytes, other.held_bytes) == (GRAIN, 3 * GRAIN)
    beside.give_back(taken)
    assert pool.take(3 * GRAIN).bytes_B is not taken.bytes_B


def test_a_buffer_that_came_back_is_handed_out_again():
    memory = Memory()
    pool = Pool("host", 4 * GRAIN, memory.make)

    for _ in range(10):
        pool.give_back(pool.take(GRAIN + 1))

    assert memory.num_made == 1


def test_a_refused_taker_is_told_what_there_is():
    pool = Pool("host", 2 * GRAIN, Memory().make)
    pool.take(GRAIN)

    with pytest.raises(OutOfMemory, match=r"host: 8.00 KiB asked for, 4.00 KiB of 8.00 KiB free"):
        pool.take(GRAIN + 1)


def test_a_taker_may_wait_for_somebody_to_give_back():
    pool = Pool("host", GRAIN, Memory().make)
    first = pool.take(1)

    def wait():
        giver = threading.Thread(target=pool.give_back, args=(first,))
        giver.start()
        giver.join()
        return True

    again = pool.take(1, wait)

    assert again is first


def test_memory_that_could_not_be_made_is_not_counted():
    def make(num_bytes):
        raise OutOfMemory("none")

    pool = Pool("device", 4 * GRAIN, make)

    with pytest.raises(OutOfMemory, match="none"):
        pool.take(1)
    assert pool.used_bytes == 0


def test_a_promise_keeps_others_out_and_lets_its_owner_in():
    pool = Pool("device", 4 * GRAIN, Memory().make)
    promise = Promise(pool, 3 * GRAIN)

    with pytest.raises(OutOfMemory):
        pool.take(2 * GRAIN)
    promise.draw(2 * GRAIN)
    buffer = pool.take(2 * GRAIN)
    promise.close()
    promise.close()

    assert pool.used_bytes == buffer.num_bytes


def test_a_promise_that_can_not_be_kept_is_not_made():
    pool = Pool("device", GRAIN, Memory().make)

    with pytest.raises(OutOfMemory):
        Promise(pool, GRAIN + 1)
    assert pool.used_bytes == 0
