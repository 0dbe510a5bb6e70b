"""Lanes move bytes in order, say what they moved, and keep no error to themselves."""

from __future__ import annotations

import threading
import weakref
from functools import partial

import pytest

from flexport.store.lanes import DONE, Lane, Trouble


@pytest.fixture
def trouble():
    return Trouble()


@pytest.fixture
def lane(trouble):
    lane = Lane("disk_to_host", 2, trouble)
    yield lane
    lane.close()


def note(numbers, number):
    numbers.append(number)
    return number


def fail(words):
    def task():
        raise OSError(words)

    return task


def test_a_job_is_done_when_all_its_tasks_are_and_its_bytes_are_counted(lane):
    moved: list[int] = []

    job = lane.submit([partial(note, moved, number) for number in (10, 20, 30)])
    job.join()

    assert job.done
    assert sorted(moved) == [10, 20, 30]
    assert lane.moved_bytes == 60
    assert lane.busy_s > 0


def test_one_thread_does_tasks_in_the_order_in_which_they_came(trouble):
    lane = Lane("host_to_disk", 1, trouble)
    order: list[int] = []

    jobs = [lane.submit([partial(note, order, number)]) for number in range(20)]
    jobs[-1].join()
    lane.close()

    assert order == list(range(20))


def test_urgent_tasks_go_before_all_that_wait(trouble):
    lane = Lane("disk_to_host", 1, trouble)
    order: list[int] = []
    gate = threading.Event()

    lane.submit([lambda: int(gate.wait())])
    last = lane.submit([partial(note, order, number) for number in (4, 5)])
    lane.submit([partial(note, order, number) for number in (1, 2)], urgent=True)
    lane.submit([partial(note, order, 3)], urgent=True)
    gate.set()
    last.join()
    lane.close()

    assert order == [1, 2, 3, 4, 5]


def test_the_first_error_is_raised_by_its_job_and_by_every_check(lane, trouble):
    trouble.check()

    job = lane.submit([fail("first")])
    with pytest.raises(OSError, match="first"):
        job.join()
    with pytest.raises(OSError, match="second"):
        lane.submit([fail("second")]).join()

    with pytest.raises(OSError, match="first"):
        trouble.check()


def test_what_follows_a_job_follows_only_if_it_went_well(lane):
    followed = []

    lane.submit([lambda: 1, lambda: 1], then=lambda: followed.append("well")).join()
    with pytest.raises(OSError, match="no"):
        lane.submit([lambda: 1, fail("no")], then=lambda: followed.append("badly")).join()

    assert followed == ["well"]


def test_an_error_of_what_follows_is_the_jobs(lane):
    def follow():
        raise ValueError("after")

    with pytest.raises(ValueError, match="after"):
        lane.submit([lambda: 1], then=follow).join()


def test_closing_ends_the_threads_and_fails_what_was_not_begun(trouble):
    lane = Lane("disk_to_host", 1, trouble)
    began, go_on = threading.Event(), threading.Event()

    def slow():
        began.set()
        go_on.wait()
        return 1

    running = lane.submit([slow])
    queued = lane.submit([lambda: 1])
    began.wait()
    closer = threading.Thread(target=lane.close)
    closer.start()
    with pytest.raises(RuntimeError, match="closed"):
        queued.join()
    go_on.set()
    closer.join()

    running.join()
    assert not [t for t in threading.enumerate() if t.name.startswith("flexport")]


def test_no_tasks_are_done_at_once(lane):
    lane.submit([]).join()
    DONE.join()

    assert DONE.done


def test_a_job_that_is_done_holds_nothing_of_what_came_after_it():
    """Its ticket may be kept for long, and `then` knows of buffers."""
    lane = Lane("disk_to_host", 1, Trouble())
    passed: list[bytearray] = []

    class Buffer(bytearray):
        """One that a weak reference can watch."""

    buffer = Buffer(8)
    watched = weakref.ref(buffer)

    def then(held: bytearray = buffer) -> None:
        passed.append(held[:4])

    job = lane.submit([lambda: 8], then)
    job.join()
    lane.close()
    del buffer, then

    assert watched() is None
    assert passed == [bytearray(4)]
    assert job.done
