"""Experts that stream: one by one, through a window of memory that is set aside for them.

Which experts a sweep needs is known only when the router of their layer has seen its tokens. So
only picked ones move, in their order, as many ahead as the window holds; unless a visit has so
many tokens that hardly any expert will be left out: then they start as early as the layer's other
weights do. While a sweep has more visits to a layer, as many of its experts stay as find room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flexport.models.spec import Experts
from flexport.store.pool import Promise
from flexport.store.store import Lease, Store

__all__ = ["ExpertStream", "ExpertWindow", "Moving", "will_pick_nearly_all"]

NEARLY_ALL = 0.95
"""Share of the experts that a visit is expected to pick, from which on they need not be waited
for: what moves for nothing is less than what the link would stand idle for."""


def will_pick_nearly_all(experts: Experts, num_tokens: int) -> bool:
    """Whether so many tokens leave hardly an expert out, if all are picked equally often."""
    left_out = (1 - experts.top_k / experts.num_experts) ** num_tokens
    return 1 - left_out >= NEARLY_ALL


@dataclass(frozen=True, slots=True)
class Moving:
    """How something streams: the bytes it takes of device and host, and how it sets out."""

    device_bytes: int
    host_bytes: int
    decoded_bytes: int
    """Of device memory, what copies in the dtype computed in take."""
    start: Callable[[], Sequence[Lease]]


class ExpertWindow:
    """The memory through which all layers' experts stream, one user at a time."""

    def __init__(self, store: Store, num_bytes: tuple[int, int], decoded_bytes: int) -> None:
        """Sets aside so many bytes of device and host; raises OutOfMemory.

        Of the device decoded_bytes more, for one expert that is decoded.
        """
        self._promises = [
            Promise(pool, size)
            for pool, size in zip((store.device, store.host), num_bytes, strict=True)
        ]
        self.decoded = Promise(store.device, decoded_bytes)
        self._queue: deque[ExpertStream] = deque()
        """Streams that have experts to start early, in the order in which they will be used."""
        self._early: list[ExpertStream] = []
        """Streams that have started some early and were not used yet, in that order."""

    def start(self, moving: Moving) -> Sequence[Lease] | None:
        """Let an expert set out; None if there is no room for it."""
        sizes = (moving.device_bytes, moving.host_bytes)
        if any(size > own.left_bytes for size, own in zip(sizes, self._promises, strict=True)):
            return None
        for size, own in zip(sizes, self._promises, strict=True):
            own.draw(size)
        return moving.start()

    def end(self, moving: Moving, leases: Sequence[Lease]) -> None:
        """The expert's memory is free again."""
        for lease in leases:
            lease.release()
        for size, own in zip((moving.device_bytes, moving.host_bytes), self._promises, strict=True):
            own.add(size)

    def join(self, stream: ExpertStream) -> None:
        """Start the stream's experts as soon as those of streams before it have set out."""
        self._queue.append(stream)
        self._early.append(stream)
        self.advance()

    def leave(self, stream: ExpertStream) -> None:
        """The stream starts nothing early any more."""
        for streams in (self._queue, self._early):
            if stream in streams:
                streams.remove(stream)

    def make_room(self) -> None:
        """Take back one expert that came early for the latest layer; it will have to come again."""
        stream = next(stream for stream in reversed(self._early) if stream.holds_any)
        stream.give_up_last()

    def advance(self) -> None:
        """Start what there is room for."""
        while self._queue and self._queue[0].start_early():
            self._queue.popleft()


class ExpertStream:
    """The experts of one layer during one sweep."""

    def __init__(self, window: ExpertWindow, movings: dict[int, Moving]) -> None:
        """`movings` are the experts that do not stay in memory, as a whole or in part."""
        self.window = window
        self._movings = movings
        self._under_way: dict[int, Sequence[Lease]] = {}
        self._early = deque(sorted(movings))

    def begin(self) -> None:
        """Let all experts set out in turn, picked or not."""
        self.window.join(self)

    def start_early(self) -> bool:
        """Start what there is room for; True if that was the last."""
        while self._early:
            expert = self._early[0]
            if expert not in self._under_way:
                leases = self.window.start(self._movings[expert])
                if leases is None:
                    return False
                self._under_way[expert] = leases
            self._early.popleft()
        return True

    def arrivals(self, picked: Sequence[int], *, stay: bool) -> Iterator[Sequence[Lease]]:
        """The leases of each picked expert, in turn; nothing of experts that are in memory.

        A lease's ticket is still to be waited for. An expert is let go of when the next one is asked
        for, unless it is to `stay` for another visit of the sweep and its room is not needed.
        """
        self.window.leave(self)
        self._early.clear()
        wanted = deque(expert for expert in picked if expert in self._movings)
        self._end(set(self._under_way) - set(wanted) if not stay else set())
        used: list[int] = []
        for expert in picked:
            if expert not in self._movings:
                yield ()
                continue
            self._start_wanted(wanted, used)
            assert wanted.popleft() == expert
            yield self._under_way[expert]
            if stay:
                used.append(expert)
            else:
                self._end({expert})
            if not wanted:
                self.window.advance()

    def close(self) -> None:
        """Let go of all that came."""
        self.window.leave(self)
        self._end(set(self._under_way))
        self.window.advance()

    def _start_wanted(self, wanted: Sequence[int], used: list[int]) -> None:
        """Start the next experts, as far as there is room; the very next one in any case."""
        for number, expert in enumerate(wanted):
            while expert not in self._under_way:
                leases = self.window.start(self._movings[expert])
                if leases is not None:
                    self._under_way[expert] = leases
                elif used:
                    # The last one used: those before it will be asked for earlier the next time.
                    self._end({used.pop()})
                elif number:
                    return
                elif self._under_way:
                    self.give_up_last()
                else:
                    self.window.make_room()

    @property
    def holds_any(self) -> bool:
        """Whether experts have set out that were not let go of."""
        return bool(self._under_way)

    def give_up_last(self) -> None:
        """Let go of the expert that would be used last."""
        self._end({max(self._under_way)})

    def _end(self, experts: set[int]) -> None:
        for expert in experts:
            self.window.end(self._movings[expert], self._under_way.pop(expert))
