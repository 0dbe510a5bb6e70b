"""Copies beside the kernels: a stream for each direction, ordered by events, and tickets.

A copy starts behind all work that kernels were given before it, and behind the copies of its own
direction; nothing else orders it. Copies within the card run among the kernels, which they would
share the card's memory with anyway. Copies may be started from any thread: all threads compute on
the card's default stream, and a point in that stream is behind what every one of them has issued.

A copy's tensors are kept here until the card has passed it: torch's `record_stream` does that for
device memory alone, and its caching host allocator for its own pinned memory alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from flexport.backend import Ticket
from flexport_cuda.runtime import Event, Runtime, Stream

__all__ = ["Copies"]


class Copies:
    """The copies of one card."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._up = _Direction(runtime.compute, runtime.new_stream())
        self._down = _Direction(runtime.compute, runtime.new_stream())

    def start(self, src: Tensor, dst: Tensor) -> Ticket:
        """Start dst[:] = src. Raises ValueError or RuntimeError for what can't be copied."""
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError(
                f"a copy needs one shape and dtype: source has {tuple(src.shape)} {src.dtype}, "
                f"destination {tuple(dst.shape)} {dst.dtype}"
            )
        here, there = self._is_host(src), self._is_host(dst)
        if here and not there:
            return self._up.start(src, dst)
        if there and not here:
            return self._down.start(src, dst)
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
        self._up.finish()
        self._down.finish()

    def reap(self) -> None:
        """Let go of the tensors of copies that are done."""
        self._up.reap()
        self._down.reap()

    @property
    def num_held(self) -> int:
        """Copies whose tensors are kept."""
        return self._up.num_held + self._down.num_held

    def _is_host(self, tensor: Tensor) -> bool:
        if tensor.device.type == "cpu":
            return True
        if tensor.device != self._runtime.device:
            raise RuntimeError(
                f"copy_async was given a tensor on {tensor.device}, not on {self._runtime.device}"
            )
        return False


class _Direction:
    """One stream of copies, and what they hold."""

    def __init__(self, compute: Stream, stream: Stream) -> None:
        self._compute = compute
        self._stream = stream
        self._held: deque[tuple[Event, Tensor, Tensor]] = deque()
        self._lock = threading.Lock()

    @property
    def num_held(self) -> int:
        """Copies whose tensors are kept."""
        return len(self._held)

    def start(self, src: Tensor, dst: Tensor) -> Ticket:
        """Give the stream a copy."""
        self.reap()
        self._stream.wait(self._compute.record())
        self._stream.copy(src, dst)
        done = self._stream.record()
        self._held.append((done, src, dst))
        return _Ticket(done, self._compute, self.reap)

    def reap(self) -> None:
        """Let go of what is done; the stream passes its points in the order of the queue."""
        let_go = []
        with self._lock:
            while self._held and self._held[0][0].query():
                let_go.append(self._held.popleft())
        # Only here do the tensors go: freeing memory may take locks of its own.

    def finish(self) -> None:
        """Wait for the last copy, and let go of all."""
        self._stream.record().synchronize()
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


def _nothing() -> None:
    """Nothing is held."""
