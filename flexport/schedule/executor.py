"""The one loop of flexport: fetch ahead, compute, write back.

What a visit needs is fetched ahead, as far as there is room for it, and what it leaves is
written back behind, both as neighbours in the sequence of visits. There is no barrier: a visit
waits for its own copies only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from flexport.backend import Ticket
from flexport.schedule.order import Visit

__all__ = ["LAG", "Work", "execute"]

LAG = 2
"""Visits that a device has to do beside the one that it computes. More would gain nothing, and a
copy that a reader starts late, when the bytes are there, is behind all that was issued by then. For
as long pages are not fetched again: what a visit writes comes home when the device has computed
it, and whoever fetches it waits for that."""


class Work(Protocol):
    """What the loop asks of the engine. None of these calls waits for a copy but `wait`."""

    def has_room_for(self, visit: Visit) -> bool:
        """Whether what the visit needs can be fetched now, beside all that was fetched ahead."""

    def fetch(self, visit: Visit) -> None:
        """Start the copies that the visit needs."""

    def ready(self, visit: Visit) -> Ticket:
        """The copies that the visit has to wait for; raises what has failed anywhere by now."""

    def compute(self, visit: Visit) -> None:
        """Compute the visit, unless its batch has ended meanwhile."""

    def write_back(self, visit: Visit) -> None:
        """Start the copies of what the visit left, and let go of what it had fetched."""


def execute(visits: Iterable[Visit | None], work: Work) -> Iterator[Visit]:
    """Run the visits in order; yields each one when it has been computed.

    A None among the visits means that the next one depends on the visits before it.
    """
    source = iter(visits)
    upcoming: Visit | None = None
    ahead: deque[Visit] = deque()
    more = True
    while more or ahead:
        while more:
            if upcoming is None:
                upcoming, more = _next(source)
            # The nearest visit goes in any case: it was planned to fit on its own.
            if upcoming is None or (ahead and not work.has_room_for(upcoming)):
                break
            work.fetch(upcoming)
            ahead.append(upcoming)
            upcoming = None
        assert ahead or not more, "the order waits for a visit, and none is under way"
        if not ahead:
            return
        now = ahead.popleft()
        work.ready(now).wait()
        work.compute(now)
        work.write_back(now)
        yield now


def _next(source: Iterator[Visit | None]) -> tuple[Visit | None, bool]:
    """The next visit, if it is known, and whether there may be more."""
    try:
        return next(source), True
    except StopIteration:
        return None, False
