"""One emulated accelerator as torch sees it: its arena, its compute lane, and what went wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexport_emulated import address_space, operations
from flexport_emulated.arena import Arena, poisoned
from flexport_emulated.device_tensor import DeviceTensor
from flexport_emulated.lanes import Lane

__all__ = ["Device"]


class Device:
    """Makes tensors and queues work on them."""

    def __init__(self, memory_bytes: int) -> None:
        self.torch_device = address_space.enter(self)
        self.arena = Arena(memory_bytes)
        self.num_reads = 0
        """How often the host read values without copy_async, as `.item()` does."""
        self.num_uploads = 0
        """How often host values came without copy_async, as `torch.tensor(..., device=)` does."""
        self._untold: list[BaseException] = []
        self._lock = threading.Lock()
        self._closed = False
        self.compute = Lane("compute", self.fail)

    def fail(self, error: BaseException) -> None:
        """Keep what went wrong in the compute lane.

        Every verb tells it until `sync` has: were it told once, then perhaps to a thread that
        only copies, while another goes on with numbers that were never computed.
        """
        with self._lock:
            self._untold.append(error)

    def must_be_open(self, what: object) -> None:
        """Raise if the device is closed."""
        if self._closed:
            raise RuntimeError(f"{what} was called on an emulated accelerator that is closed")

    def check(self, what: object = "a verb") -> None:
        """Raise if the device is closed, or what the compute lane has met since the last sync."""
        self.must_be_open(what)
        with self._lock:
            error = self._untold[0] if self._untold else None
        if error is not None:
            raise error

    def take_errors(self) -> list[BaseException]:
        """What the compute lane has met since the last call; the caller tells it."""
        with self._lock:
            told = self._untold[:]
            self._untold.clear()
        return told

    def issue(
        self, work: Callable[[], None], *, cost_s: float = 0.0, can_fail: bool = False
    ) -> None:
        """Queue device work behind all that was issued before."""
        self.compute.give(work, cost_s=cost_s, can_fail=can_fail)

    def settle(self) -> None:
        """Block until all device work issued by now is done; raises what it met."""
        self.compute.drain()
        self.check("a read")

    def make(
        self,
        size: Sequence[int],
        stride: Sequence[int] | None,
        dtype: torch.dtype,
        *,
        allocated: bool = False,
    ) -> DeviceTensor:
        """A tensor in fresh memory, contiguous if no stride is given. Raises OutOfMemory."""
        num_items = _num_items(size, stride)
        num_bytes = num_items * dtype.itemsize
        memory = self.arena.take(num_bytes, allocated=allocated)
        with torch.inference_mode(False):
            flat = poisoned(num_bytes).view(dtype)
            inner = flat.view(tuple(size)) if stride is None else flat.as_strided(size, stride)
        return DeviceTensor(inner, memory, self)

    def adopt(self, values: Tensor) -> DeviceTensor:
        """Values that were computed already, in device memory of their own."""
        made = self.make(values.shape, None, values.dtype)
        with torch.inference_mode():
            made.in_arena.copy_(values)
        return made

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A torch operation on tensors of this device."""
        return operations.run(self, func, args, kwargs)

    def close(self) -> None:
        """Finish all work and end the lane; may be called twice."""
        if not self._closed:
            self._closed = True
            self.compute.close()
            address_space.leave(self)


def _num_items(size: Sequence[int], stride: Sequence[int] | None) -> int:
    """How many items of memory a layout spans."""
    if 0 in size:
        return 0
    if stride is None:
        num_items = 1
        for count in size:
            num_items *= count
        return num_items
    return 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
