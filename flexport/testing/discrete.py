"""A fake device with memory of its own, for tests of what runs on top of a backend.

Its memory is host memory, its maths another backend's, but it behaves like a card: the device
budget is hard, fresh memory holds NaN, copies run beside the caller in one lane per direction,
and a kernel given host memory refuses. It keeps a diary of its verbs, so that a test can count
what moved.

What it can't see: a tensor that torch computed counts as the device's, since elementwise maths
on device tensors is plain torch; and memory that did not come from `allocate(..., "host")`
counts as the device's, too.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Backend, Capabilities, Ticket
from flexport.errors import OutOfMemory
from flexport.registry import open_backend

__all__ = ["Call", "DiscreteBackend"]

Link = Literal["host_to_device", "device_to_host", "within"]

_LINKS: tuple[Link, ...] = ("host_to_device", "device_to_host", "within")

_POISON = 0xFF
"""Fills fresh memory: every float that consists of such bytes is NaN, every signed int is -1."""


class Call(NamedTuple):
    """One entry of the diary."""

    verb: str
    """"allocate", "matmul", "attention", or the link that a copy went over."""
    num_bytes: int
    """Bytes allocated or copied; of the weight; of the pages of the cache."""


class DiscreteBackend:
    """The five verbs on a device that is not the host.

    With `late=True` there are no threads: a copy happens when something first depends on it (a
    `wait` or `join` of its ticket or of a later one on its link, or `sync`), which is as late as
    the contract allows. A missing wait then shows every time, as NaN.

    With `unified=True` its budget holds the host memory that it allocates, too.
    """

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        late: bool = False,
        unified: bool = False,
        inner: Backend | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.peak_bytes = 0
        self._owns_inner = inner is None
        self._inner = open_backend("cpu")[1] if inner is None else inner
        self._capabilities = replace(
            self._inner.capabilities,
            name="discrete (a fake in host memory)",
            memory_bytes=memory_bytes,
            unified=unified,
            addressable=False,
        )
        # Re-entrant: the collector may run a finalizer in a thread that holds it.
        self._lock = threading.RLock()
        self._used_bytes = 0
        self._host_storages: set[int] = set()
        self._failed: list[Exception] = []
        self._gate = threading.Event()
        self._gate.set()
        self._lanes = {link: _Lane(link, self._gate, threaded=not late) for link in _LINKS}
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """The inner backend's, but with the fake's own memory."""
        return self._capabilities

    @property
    def used_bytes(self) -> int:
        """Memory that counts against the budget: allocated, and still referred to."""
        return self._used_bytes

    def moved_bytes(self, link: Link) -> int:
        """Bytes of all copies over `link` so far."""
        return sum(call.num_bytes for call in list(self.calls) if call.verb == link)

    @contextmanager
    def copies_held(self) -> Iterator[None]:
        """While it lasts, copies are accepted but none begins. For threaded copies."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        """A contiguous tensor full of NaN (or -1), which counts unless it is another memory's."""
        self._must_be_open("allocate")
        num_bytes = math.prod(shape) * dtype.itemsize
        counts = where == "device" or self._capabilities.unified
        if counts:
            self._reserve(num_bytes)
        try:
            memory = _Memory(max(1, num_bytes))
        except (MemoryError, OverflowError) as error:
            if counts:
                self._release(num_bytes)
            raise OutOfMemory(f"asked for {num_bytes} bytes of {where} memory: {error}") from error
        with torch.inference_mode(False):
            bytes_B = torch.frombuffer(memory, dtype=torch.uint8).fill_(_POISON)
            tensor = bytes_B[:num_bytes].view(dtype).view(tuple(shape))
        if counts:
            weakref.finalize(memory, self._release, num_bytes)
        if where == "host":
            storage = _storage(tensor)
            with self._lock:
                self._host_storages.add(storage)
            weakref.finalize(memory, self._forget_host, storage)
        self.calls.append(Call("allocate", num_bytes))
        return tensor

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        """Queue the copy in its link's lane."""
        self._must_be_open("copy_async")
        link = self._link(src, dst)
        self.calls.append(Call(link, src.numel() * src.element_size()))
        copy = _Copy(src, dst, self._lanes[link], self._failed)
        self._lanes[link].add(copy.run)
        return copy

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """The inner backend's product of device tensors."""
        self._must_be_open("matmul")
        self._must_be_device("matmul", x_TD, weight_FD, bias_F)
        self.calls.append(Call("matmul", weight_FD.numel() * weight_FD.element_size()))
        return self._inner.matmul(x_TD, weight_FD, bias_F)

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """The inner backend's attention over device tensors."""
        self._must_be_open("attention")
        pages = [*keys_NKGE, *values_NKGE]
        self._must_be_device("attention", q_NHLE, *pages, spec.sinks)
        self.calls.append(
            Call("attention", sum(page.numel() * page.element_size() for page in pages))
        )
        return self._inner.attention(q_NHLE, keys_NKGE, values_NKGE, spec)

    def sync(self) -> None:
        """Block until all copies are done; raise the first error since the last call."""
        self._must_be_open("sync")
        for lane in self._lanes.values():
            lane.drain()
        self._inner.sync()
        with self._lock:
            failed = self._failed[:]
            self._failed.clear()
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Finish the copies under way and end the lanes; may be called twice."""
        if self._closed:
            return
        self._closed = True
        for lane in self._lanes.values():
            lane.close()
        if self._owns_inner:
            self._inner.close()

    def _reserve(self, num_bytes: int) -> None:
        with self._lock:
            free_bytes = self._capabilities.memory_bytes - self._used_bytes
            if num_bytes > free_bytes:
                raise OutOfMemory(
                    f"asked for {num_bytes} bytes of device memory, {free_bytes} of "
                    f"{self._capabilities.memory_bytes} are free"
                )
            self._used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._used_bytes)

    def _release(self, num_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= num_bytes

    def _forget_host(self, storage: int) -> None:
        with self._lock:
            self._host_storages.discard(storage)

    def _on_host(self, tensor: Tensor) -> bool:
        with self._lock:
            return _storage(tensor) in self._host_storages

    def _link(self, src: Tensor, dst: Tensor) -> Link:
        from_host, to_host = self._on_host(src), self._on_host(dst)
        if from_host == to_host:
            return "within"
        return "host_to_device" if from_host else "device_to_host"

    def _must_be_device(self, verb: str, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and self._on_host(tensor):
                raise RuntimeError(
                    f"{verb} was given a {tuple(tensor.shape)} tensor in host memory; copy it to "
                    "the device first"
                )

    def _must_be_open(self, verb: str) -> None:
        if self._closed:
            raise RuntimeError(f"{verb} was called on a discrete backend that is closed")


class _Memory(bytearray):
    """Bytes that a tensor lies in: one object per allocation, which a weak reference can watch.

    Not an mmap, which gives its address back before it tells weak references.
    """


class _Copy:
    """The ticket of one copy. It holds both tensors until the copy is done."""

    def __init__(self, src: Tensor, dst: Tensor, lane: _Lane, failed: list[Exception]) -> None:
        self._tensors: tuple[Tensor, Tensor] | None = (src, dst)
        self._lane = lane
        self._failed = failed
        self._done = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        """Do the copy; called once, by the lane."""
        assert self._tensors is not None, "a copy runs once"
        src, dst = self._tensors
        try:
            if src.shape != dst.shape or src.dtype != dst.dtype:
                raise ValueError(
                    f"a copy needs one shape and dtype: source has {tuple(src.shape)} "
                    f"{src.dtype}, destination {tuple(dst.shape)} {dst.dtype}"
                )
            # A tensor made in inference mode can be written to only in it.
            with torch.inference_mode():
                dst.copy_(src)
        except Exception as error:  # noqa: BLE001 - whatever it is, the ticket hands it on
            self._error = error
            self._failed.append(error)
        # Whoever hears that the copy is done may need the room of its tensors at once.
        self._tensors = None
        del src, dst
        self._done.set()

    def join(self) -> None:
        """Block until the copy is done; raise what it raised."""
        self._lane.finish(self._done)
        if self._error is not None:
            raise self._error

    wait = join  # this device computes in the calling thread


class _Lane:
    """Copies over one link, one after the other: in a thread, or as late as they may be."""

    def __init__(self, name: str, gate: threading.Event, *, threaded: bool) -> None:
        self._gate = gate
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._running = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._work, name=f"copy {name}", daemon=True)
            self._thread.start()

    def add(self, run: Callable[[], None]) -> None:
        """Queue a piece of work behind what is there."""
        with self._changed:
            self._waiting.append(run)
            self._changed.notify()

    def finish(self, done: threading.Event) -> None:
        """Return when `done` is set by work of this lane."""
        if self._thread is None:
            with self._running:
                while not done.is_set():
                    self._waiting.popleft()()
        done.wait()

    def drain(self) -> None:
        """Return when all that was queued so far is done."""
        reached = threading.Event()
        self.add(reached.set)
        self.finish(reached)

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self.drain()
        if self._thread is not None:
            with self._changed:
                self._closed = True
                self._changed.notify()
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._waiting) > 0)
                if self._closed:
                    return
                run = self._waiting.popleft()
            self._gate.wait()
            run()


def _storage(tensor: Tensor) -> int:
    """What all views of one allocation have in common."""
    return tensor.untyped_storage().data_ptr()
