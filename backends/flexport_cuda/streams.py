"""Copies beside the kernels: a stream for each direction, ordered by events, and tickets.

A copy starts behind all work that kernels were given before it, and behind the copies of its own
stream; nothing else orders it. Each direction has a stream for small copies beside that for large
ones, which are cut: what the card is to compute next (token ids, a result of the CPU's) must not
queue behind a whole sweep's weights, and a copy engine takes turns between streams, copy by copy.
Copies within the card run among the kernels, which they would share the card's memory with anyway.
Copies may be started from any thread: all threads compute on the card's default stream, and a
point in that stream is behind what every one of them has issued.

A copy's tensors are kept here until the card has passed it: torch's `record_stream` does that for
device memory alone, and its caching host allocator for its own pinned memory alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flexport.backend import Ticket
from flexport_cuda.runtime import Event, Runtime, Stream

__all__ = ["Copies"]

SMALL_BYTES = 4 << 20
"""A third of a millisecond on a PCIe 3.0 link: queries and results of some hundred rows, not weights."""

CUT_BYTES = 16 << 20
"""Large copies go in parts of this, each far longer than the 10 us that starting one costs."""


class Copies:
    """The copies of one card."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._up, self._up_small, self._down, self._down_small = (
            _Queue(runtime.compute, runtime.new_stream()) for _ in range(4)
        )
        self._queues = (self._up, self._up_small, self._down, self._down_small)

    def start(self, src: Tensor, dst: Tensor) -> Ticket:
        """Start dst[:] = src. Raises ValueError or RuntimeError for what can't be copied."""
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError(
                f"a copy needs one shape and dtype: source has {tuple(src.shape)} {src.dtype}, "
                f"destination {tuple(dst.shape)} {dst.dtype}"
            )
        here, there = self._is_host(src), self._is_host(dst)
        is_small = src.numel() * src.element_size() < SMALL_BYTES
        if here and not there:
            return (self._up_small if is_small else self._up).start(src, dst)
        if there and not here:
            return (self._down_small if is_small else self._down).start(src, dst)
        compute = self._runtime.compute
        if here:
            # The host does it, so it is the host that has to wait for its turn.
            compute.record().synchronize()
            with torch.inference_mode():
                dst.copy_(src)
        else:
            compute.copy(src, dst)
        return _Ticket(compute.record(), compute, _nothing)

    def finish(self) -> None:
        """Block until all copies are done, and let go of their tensors."""
        for queue in self._queues:
            queue.finish()

    def reap(self) -> None:
        """Let go of the tensors of copies that are done."""
        for queue in self._queues:
            queue.reap()

    @property
    def num_held(self) -> int:
        """Copies whose tensors are kept."""
        return sum(queue.num_held for queue in self._queues)

    def _is_host(self, tensor: Tensor) -> bool:
        if tensor.device.type == "cpu":
            return True
        if tensor.device != self._runtime.device:
            raise RuntimeError(
                f"copy_async was given a tensor on {tensor.device}, not on {self._runtime.device}"
            )
        return False


class _Queue:
    """One stream of copies, and what they hold."""

    def __init__(self, compute: Stream, stream: Stream) -> None:
        self._compute = compute
        self._stream = stream
        self._held: deque[tuple[Event, list[tuple[Tensor, Tensor]]]] = deque()
        self._lock = threading.Lock()

    @property
    def num_held(self) -> int:
        """Copies whose tensors are kept."""
        return len(self._held)

    def start(self, src: Tensor, dst: Tensor) -> Ticket:
        """Give the stream a copy."""
        self.reap()
        self._stream.wait(self._compute.record())
        parts = list(_cut(src, dst))
        for part, place in parts:
            self._stream.copy(part, place)
        done = self._stream.record()
        self._held.append((done, parts))
        return _Ticket(done, self._compute, self.reap)

    def reap(self) -> None:
        """Let go of what is done; the stream passes its points in the order of the queue."""
        let_go = []
        with self._lock:
            while self._held and self._held[0][0].query():
                let_go.append(self._held.popleft())
        # Only here do the tensors go: freeing memory may take locks of its own.

    def finish(self) -> None:
        """Wait for the last copy, and let go of all; on a card that is lost none goes on."""
        try:
            self._stream.record().synchronize()
        except RuntimeError:
            self._held.clear()
            raise
        self.reap()


class _Ticket:
    """A copy under way."""

    __slots__ = ("_compute", "_done", "_let_go")

    def __init__(self, done: Event, compute: Stream, let_go: Callable[[], None]) -> None:
        self._done = done
        self._compute = compute
        self._let_go = let_go

    def wait(self) -> None:
        """Let kernels given from now on run after the copy; returns at once."""
        self._compute.wait(self._done)

    def join(self) -> None:
        """Block until the copy is done; raises what went wrong on the card."""
        self._done.synchronize()
        self._let_go()


def _cut(src: Tensor, dst: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The copy in parts of CUT_BYTES; strided tensors stay whole."""
    per_part = CUT_BYTES // src.element_size()
    if src.numel() <= per_part or not (src.is_contiguous() and dst.is_contiguous()):
        yield src, dst
        return
    yield from zip(src.view(-1).split(per_part), dst.view(-1).split(per_part), strict=True)


def _nothing() -> None:
    """Nothing is held."""
