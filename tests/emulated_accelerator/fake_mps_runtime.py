"""What the MPS plug-in asks of torch, on the emulated accelerator: one queue for all.

It is as careless as the real thing: a copy that does not block keeps nothing alive, and what is
gone when its turn comes is garbage; a copy between strided memories is refused, and so are a
second thread in the runtime and float64.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from flexport_emulated.arena import POISON
from flexport_emulated.device import Device
from flexport_emulated.device_tensor import DeviceTensor
from torch import Tensor

__all__ = ["FakeRuntime"]


class _Metal(Device):
    """An emulated device without float64."""

    def make(
        self,
        size: Sequence[int],
        stride: Sequence[int] | None,
        dtype: torch.dtype,
        *,
        allocated: bool = False,
    ) -> DeviceTensor:
        if dtype is torch.float64:
            raise TypeError("this device has no float64")
        return super().make(size, stride, dtype, allocated=allocated)


class FakeRuntime:
    """A runtime whose device tensors mix with the host's in no operation."""

    name = "fake"

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        recommended_bytes: int = 16 << 30,
        free_bytes: int = 32 << 30,
    ) -> None:
        self._device = _Metal(memory_bytes)
        self.device = self._device.torch_device
        self.cap_bytes = 0
        self.cached = 0
        self.emptied = 0
        self.copies: list[bool] = []
        """Of each copy between host and device, whether it did not block."""
        self.issuers: set[threading.Thread] = set()
        """The threads that gave work to the queue."""
        self._recommended_bytes = recommended_bytes
        self._free_bytes = free_bytes
        self._inside = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Device memory that tensors hold now."""
        return self._device.arena.used_bytes

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it lasts, the queue takes work and begins none of it."""
        gate = threading.Event()
        self._device.compute.give(lambda: None, after=gate)
        try:
            yield
        finally:
            gate.set()

    def recommended_bytes(self) -> int:
        return self._recommended_bytes

    def free_bytes(self) -> int:
        return self._free_bytes

    def set_cap(self, num_bytes: int) -> None:
        self.cap_bytes = num_bytes

    def cached_bytes(self) -> int:
        return self.cached

    def empty_cache(self) -> None:
        assert self._device.compute.idle, "torch would wait here, and nobody else could do anything"
        self.emptied += 1
        self.cached = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._alone():
            return self._device.make(tuple(shape), None, dtype, allocated=True)

    def empty_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._alone():
            return torch.empty(tuple(shape), dtype=dtype)

    def copy(self, dst_B: Tensor, src_B: Tensor, *, non_blocking: bool) -> None:
        with self._alone():
            for tensor in (dst_B, src_B):
                assert tensor.dim() == 1, tuple(tensor.shape)
                assert tensor.stride() == (1,), tensor.stride()
                assert tensor.storage_offset() * tensor.itemsize % 4 == 0, "Unaligned blit request"
            assert isinstance(dst_B, DeviceTensor) != isinstance(src_B, DeviceTensor)
            self.copies.append(non_blocking)
            destination, source = _weakly(dst_B), _weakly(src_B)

            def work() -> None:
                with torch.inference_mode():
                    into, out_of = destination(), source()
                    if into is None:
                        return  # on a Mac this would overwrite somebody else's memory
                    if out_of is None:
                        into.view(torch.uint8).fill_(POISON)
                    else:
                        into.copy_(out_of)

            self._device.issue(work)
            if not non_blocking:
                self._device.settle()

    def record(self) -> _Mark:
        with self._alone():
            return _Mark(self._device)

    def close(self) -> None:
        self._device.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert self._inside.acquire(blocking=False), "two threads at once would end the process"
        self.issuers.add(threading.current_thread())
        try:
            yield
        finally:
            self._inside.release()


class _Mark:
    """Behind all work that was issued when it was made."""

    def __init__(self, device: Device) -> None:
        self._reached = device.compute.mark()

    def query(self) -> bool:
        return self._reached is None or self._reached.is_set()


def _weakly(tensor: Tensor) -> Callable[[], Tensor | None]:
    """The tensor that the queue sees, for as long as its memory is held."""
    inner: Any = tensor.in_arena if isinstance(tensor, DeviceTensor) else tensor.view(tensor.shape)
    storage = weakref.ref(tensor)
    return lambda: inner if storage() is not None else None
