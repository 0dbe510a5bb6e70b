"""Lanes: a few threads that move bytes in one direction, first come, first served.

A lane knows how long it was busy and how much it moved. The first error of any lane is kept in
a shared `Trouble`, so that a run hears of it at its next step, even if nobody waits for the copy
that failed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["DONE", "Job", "Lane", "Trouble", "Watch"]


class Trouble:
    """The first error of a group of lanes."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def report(self, error: BaseException) -> None:
        """Keep the error, if it is the first."""
        with self._lock:
            self._error = self._error or error

    def check(self) -> None:
        """Raise what has gone wrong by now, if anything."""
        if self._error is not None:
            raise self._error


class Job:
    """Tasks given to a lane together; a ticket that is done when all of them are."""

    def __init__(self, num_tasks: int, then: Callable[[], None] | None = None) -> None:
        """`then` is called once, by whoever ends the last task, if all went well."""
        self._left = num_tasks
        self._then = then
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._lock = threading.Lock()
        if num_tasks == 0:
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether every task has ended, well or not."""
        return self._done.is_set()

    def join(self) -> None:
        """Block until it is done; raises the first error of its tasks."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    wait = join

    def finish_task(self, error: BaseException | None) -> None:
        """One task has ended."""
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if self._left:
                return
        then, self._then = self._then, None  # whoever keeps the ticket keeps no buffers with it
        if then is not None and self._error is None:
            try:
                then()
            except Exception as caught:  # noqa: BLE001 - it is raised again by join
                self._error = caught
        self._done.set()


DONE = Job(0)
"""A ticket for what needs no copy."""


class Watch(Protocol):
    """Who wants to know what each lane does."""

    def __call__(
        self,
        lane: str,
        thread: int,
        label: str,
        started_s: float,
        ended_s: float,
        num_bytes: int = 0,
    ) -> None:
        """A task has ended; times are those of `time.perf_counter`."""


class Lane:
    """One direction of one link."""

    def __init__(
        self, name: str, num_threads: int, trouble: Trouble, watch: Watch | None = None
    ) -> None:
        self.name = name
        self._watch = watch
        self.moved_bytes = 0
        self._busy_s = 0.0
        self._num_busy = 0
        self._busy_since_s = 0.0
        self._trouble = trouble
        self._tasks: deque[tuple[Callable[[], int], Job, str]] = deque()
        self._urgent: deque[tuple[Callable[[], int], Job, str]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"flexport {name} {i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one of its threads was moving bytes."""
        with self._changed:
            running_s = time.perf_counter() - self._busy_since_s if self._num_busy else 0.0
            return self._busy_s + running_s

    def submit(
        self,
        tasks: Sequence[Callable[[], int]],
        then: Callable[[], None] | None = None,
        *,
        urgent: bool = False,
        label: str = "",
    ) -> Job:
        """Queue tasks, each of which gives the number of bytes it moved.

        `then` is called when the last one has ended, if none has failed. Urgent tasks go before
        all others that wait: somebody stands still until they are done, or soon will. `label` is
        for whoever watches.
        """
        job = Job(len(tasks), then)
        with self._changed:
            assert self._open, f"lane {self.name} is closed"
            queue = self._urgent if urgent else self._tasks
            queue.extend((task, job, label) for task in tasks)
            self._changed.notify_all()
        return job

    def wait_until_idle(self) -> None:
        """Block until all that was queued has ended, and is counted."""
        with self._changed:
            while self._open and (self._urgent or self._tasks or self._num_busy):
                self._changed.wait()

    def close(self) -> None:
        """Drop what is queued, let running tasks end, and stop the threads."""
        with self._changed:
            self._open = False
            dropped = [*self._urgent, *self._tasks]
            self._urgent.clear()
            self._tasks.clear()
            self._changed.notify_all()
        for _, job, _ in dropped:
            job.finish_task(RuntimeError(f"lane {self.name} was closed"))
        for thread in self._threads:
            thread.join()

    def _work(self, thread: int) -> None:
        while True:
            with self._changed:
                while self._open and not (self._urgent or self._tasks):
                    self._changed.wait()
                if not self._open:
                    return
                task, job, label = (self._urgent or self._tasks).popleft()
                started_s = time.perf_counter()
                if self._num_busy == 0:
                    self._busy_since_s = started_s
                self._num_busy += 1
            error: BaseException | None = None
            moved_bytes = 0
            try:
                moved_bytes = task()
            except BaseException as caught:  # noqa: BLE001 - it is raised again where it is waited for
                error = caught
                self._trouble.report(caught)
            with self._changed:
                self.moved_bytes += moved_bytes
                self._num_busy -= 1
                if self._num_busy == 0:
                    self._busy_s += time.perf_counter() - self._busy_since_s
                    self._changed.notify_all()
            if self._watch is not None:
                self._watch(self.name, thread, label, started_s, time.perf_counter(), moved_bytes)
            # Whoever hears that the job is done may need the room of the task's buffers at once.
            del task
            job.finish_task(error)
            del job, error
