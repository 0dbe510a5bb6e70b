"""What `flexport_cuda` asks of torch.cuda, on the emulated accelerator: streams, events, pinning.

Its tensors are in an address space of their own, all device work is queued, and a stream is a
thread, so that what is not ordered by an event is not in order. A stream keeps no tensor alive,
as a real one doesn't: where nobody else has, the copy fails.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from flexport_emulated.device import Device
from flexport_emulated.device_tensor import DeviceTensor
from flexport_emulated.lanes import Lane
from torch import Tensor

from flexport.errors import OutOfMemory

__all__ = ["FakeCard", "FakeEvent", "FakeStream"]


class FakeEvent:
    """A point in a stream."""

    def __init__(self, device: Device, reached: threading.Event | None) -> None:
        self.reached = reached
        self._device = device

    def query(self) -> bool:
        return self.reached is None or self.reached.is_set()

    def synchronize(self) -> None:
        if self.reached is not None:
            self.reached.wait()
        self._device.check("synchronize")


class FakeStream:
    """A lane of the emulated accelerator."""

    def __init__(self, device: Device, lane: Lane) -> None:
        self.lane = lane
        self._device = device

    def record(self) -> FakeEvent:
        return FakeEvent(self._device, self.lane.mark())

    def wait(self, event: object) -> None:
        assert isinstance(event, FakeEvent), event
        if event.reached is not None:
            self.lane.give(lambda: None, after=event.reached)

    def copy(self, src: Tensor, dst: Tensor) -> None:
        refs = [weakref.ref(src), weakref.ref(dst)]
        written = dst.in_arena if isinstance(dst, DeviceTensor) else dst
        whole = None if self.lane is not self._device.compute else (src, dst)

        def run() -> None:
            there = [ref() for ref in refs] if whole is None else list(whole)
            tensors = [tensor for tensor in there if tensor is not None]
            if len(tensors) < 2:
                written.fill_(1)
                raise RuntimeError("a copy's tensors were let go before it was done")
            begin, end = (t.in_arena if isinstance(t, DeviceTensor) else t for t in tensors)
            with torch.inference_mode():
                end.copy_(begin)

        self.lane.give(run, can_fail=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it lasts, the stream takes work and begins none of it."""
        gate = threading.Event()
        self.lane.give(lambda: None, after=gate)
        try:
            yield
        finally:
            gate.set()


class FakeCard:
    """One card."""

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32"),
        most_pinned_bytes: int = 1 << 40,
    ) -> None:
        self._device = _Device(memory_bytes)
        self.device = self._device.torch_device
        self.name = "cuda:0 (a fake card)"
        self.dtypes = (dtypes, "it is a fake")
        self.has_fused_groups = "bfloat16" in dtypes
        self.computes_in_order = True
        self.compute = FakeStream(self._device, self._device.compute)
        self.streams: list[FakeStream] = []
        self.pinned: dict[int, int] = {}
        """Address and size of what is pinned."""
        self.num_emptied = 0
        self.is_closed = False
        self._total_bytes = memory_bytes
        self._most_pinned_bytes = most_pinned_bytes

    @property
    def arena_used_bytes(self) -> int:
        """Device memory that tensors hold now."""
        return self._device.arena.used_bytes

    @property
    def num_reads(self) -> int:
        """How often the host has read values other than by copy_async."""
        return self._device.num_reads

    def fail_kernel(self, error: BaseException) -> None:
        """Make the next device work fail."""

        def work() -> None:
            raise error

        self._device.compute.give(work)

    def new_stream(self) -> FakeStream:
        lane = Lane(f"stream {len(self.streams)}", self._device.fail)
        self.streams.append(FakeStream(self._device, lane))
        return self.streams[-1]

    def synchronize(self) -> None:
        self._device.must_be_open("synchronize")
        for stream in (self.compute, *self.streams, self.compute):
            stream.lane.drain()
        for error in self._device.take_errors():
            raise error

    def memory(self) -> tuple[int, int, int]:
        arena = self._device.arena
        return arena.capacity_bytes - arena.used_bytes, self._total_bytes, arena.used_bytes

    def limit_memory(self, num_bytes: int) -> None:
        self._device.arena.capacity_bytes = min(num_bytes, self._total_bytes)

    def empty_cache(self) -> None:
        self.num_emptied += 1

    def register(self, address: int, num_bytes: int) -> str | None:
        assert address % 4096 == 0, address
        if sum(self.pinned.values()) + num_bytes > self._most_pinned_bytes:
            return "out of memory (error 2)"
        self.pinned[address] = num_bytes
        return None

    def unregister(self, address: int) -> None:
        del self.pinned[address]

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        for stream in self.streams:
            stream.lane.close()
        self._device.close()


class _Device(Device):
    """Says that memory is out as torch.cuda does."""

    def make(
        self,
        size: Sequence[int],
        stride: Sequence[int] | None,
        dtype: torch.dtype,
        *,
        allocated: bool = False,
    ) -> DeviceTensor:
        try:
            return super().make(size, stride, dtype, allocated=allocated)
        except OutOfMemory as error:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {error}") from error
