"""Lanes: one thread each, which does its pieces of work in the order in which they were given.

A piece may have a cost, which is the least time it takes. Time is kept as a queue on a real
device would: a piece begins when it was given or when the one before it ended, whichever is
later, so that what a thread oversleeps is not added up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

__all__ = ["Fault", "Faults", "Lane"]

Fault = BaseException | type[BaseException]
"""An error, or a kind of error that is made when it is raised."""


@dataclass(slots=True, eq=False)
class _Task:
    """One piece of work."""

    work: Callable[[], None]
    end: Callable[[BaseException | None], None] | None
    after: threading.Event | None
    cost_s: float
    can_fail: bool
    given_s: float


class Faults:
    """Errors that a test has put on a lane's way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[tuple[int, Fault]] = []
        self.num_begun = 0
        """Pieces of work that could have failed."""

    def plan(self, number: int, error: Fault) -> None:
        """Raise `error`, once, in place of a piece of work: 0 is the next one to begin."""
        with self._lock:
            self._planned.append((self.num_begun + number, error))

    def meet(self) -> None:
        """A piece of work begins: raise what is planned for it."""
        with self._lock:
            number, self.num_begun = self.num_begun, self.num_begun + 1
            due = [plan for plan in self._planned if plan[0] == number]
            self._planned = [plan for plan in self._planned if plan[0] != number]
        if due:
            raise due[0][1]


class Lane:
    """A queue of work and the thread that does it."""

    def __init__(
        self,
        name: str,
        on_error: Callable[[BaseException], None],
        faults: Faults | None = None,
    ) -> None:
        """`on_error` hears of what fails and has no `end` of its own."""
        self.name = name
        self.faults = faults or Faults()
        self.busy_s = 0.0
        """How long it has worked, waiting not included."""
        self._on_error = on_error
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_given = 0
        self._num_done = 0
        self._free_s = 0.0
        self._open = True
        self._thread = threading.Thread(
            target=self._work, name=f"flexport-emulated {name}", daemon=True
        )
        self._thread.start()

    def give(
        self,
        work: Callable[[], None],
        *,
        end: Callable[[BaseException | None], None] | None = None,
        after: threading.Event | None = None,
        cost_s: float = 0.0,
        can_fail: bool = False,
    ) -> None:
        """Queue a piece of work.

        It begins when `after` is set; `end` is called when its cost has passed, with its error.
        Faults that are planned meet only what `can_fail`.
        """
        task = _Task(work, end, after, cost_s, can_fail, time.perf_counter())
        with self._lock:
            if not self._open:
                raise RuntimeError(f"the lane {self.name} of the emulated accelerator is closed")
            self._num_given += 1
            self._tasks.put(task)

    @property
    def idle(self) -> bool:
        """Whether all that was given by now is done."""
        return self._num_done == self._num_given

    def mark(self) -> threading.Event | None:
        """An event for the end of all that was given by now; None if that is past."""
        with self._lock:
            if self.idle or not self._open:
                return None
        event = threading.Event()
        self.give(event.set)
        return event

    def drain(self) -> None:
        """Block until all that was given by now is done."""
        reached = self.mark()
        if reached is not None:
            reached.wait()

    def close(self) -> None:
        """Finish what was given and end the thread."""
        with self._lock:
            self._open = False
            self._tasks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            self._do(task)
            # What a task holds must not live until the next one comes.
            del task

    def _do(self, task: _Task) -> None:
        ready_s = task.given_s
        if task.after is not None and not task.after.is_set():
            task.after.wait()
            ready_s = time.perf_counter()
        begin_s = max(ready_s, self._free_s) if task.cost_s else time.perf_counter()
        error: BaseException | None = None
        try:
            if task.can_fail:
                self.faults.meet()
            task.work()
        except BaseException as caught:  # noqa: BLE001 - it is raised again where it is waited for
            error = caught
        now_s = time.perf_counter()
        self._free_s = max(now_s, begin_s + task.cost_s)
        if self._free_s > now_s:
            time.sleep(self._free_s - now_s)
        self.busy_s += max(0.0, self._free_s - begin_s)
        if task.end is not None:
            task.end(error)
        elif error is not None:
            self._on_error(error)
        # Last: who finds the lane idle must find the error, too.
        self._num_done += 1
