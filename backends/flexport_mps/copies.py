"""Copies between host and device memory, and their tickets.

Torch has one MPS stream a process, in which copies and kernels run in the order in which they
were issued. So a copy never runs beside a kernel, and `wait` has nothing to do; what runs beside
both is the host: it reads the next bytes from disk, and issues work.

What is safe, and what only looks so (file names are those of ATen/native/mps/operations):

- A copy that does not block reads its source, or writes its destination, after the caller has
  gone on, and torch keeps neither (pytorch#83015, #139550, #189690: silent corruption). Here both
  are held until the copy is done.
- Where shapes, strides or dtypes differ, Copy.mm makes temporaries that nobody can hold, and
  fills a strided host tensor before its bytes have come. And it stops the program for a host
  address that is no multiple of 4. So only flat, aligned memory is copied without blocking; what
  is not goes through flat memory of our own, in a copy that blocks. The core's bulk copies are
  all flat.
- `torch.mps.Event.synchronize` and `torch.mps.synchronize` wait with Python's lock held, so no
  other thread would get on, and torch's own release of a Python-owned storage deadlocks with
  them (Copy.mm says so). `Event.query` only reads a counter of the event (MPSEvent.mm). So whoever
  waits here asks again and again, and sleeps in between.

Dimension key: B bytes.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

from flexport.backend import Ticket
from flexport_mps.runtime import Event, Runtime

__all__ = ["Copies", "wait_for"]

FIRST_SLEEP_S = 2e-5
LONGEST_SLEEP_S = 1e-3
"""A visit takes some milliseconds at least, so this is little of it."""

BLIT_BYTES = 4
"""Metal's blits begin at multiples of this."""


class Copies:
    """Starts copies on one runtime. Not for two threads at once."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._under_way: deque[_Copy] = deque()
        """In the order of the queue, and so in that in which they end."""

    def start(self, src: Tensor, dst: Tensor) -> Ticket:
        """dst[:] = src, wherever the two lie. Raises ValueError if they don't fit together."""
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError(
                f"a copy needs one shape and dtype: source has {tuple(src.shape)} {src.dtype}, "
                f"destination {tuple(dst.shape)} {dst.dtype}"
            )
        from_device, to_device = self._is_on_device(src), self._is_on_device(dst)
        self.let_go()
        # A tensor made in inference mode can be written to only in it.
        with torch.inference_mode():
            if src.numel() == 0:
                return _NOTHING
            if from_device == to_device:
                dst.copy_(src)
                held = (src, dst)
            elif _is_plain(src) and _is_plain(dst):
                held = (_flat(src), _flat(dst))
                self._runtime.copy(held[1], held[0], non_blocking=True)
            else:
                self._copy_by_way_of_flat_memory(src, dst, to_device=to_device)
                held = (src, dst)
        if not (from_device or to_device):
            return _NOTHING
        copy = _Copy(held, self._runtime.record())
        self._under_way.append(copy)
        return copy

    def let_go(self) -> None:
        """Hold no tensors of copies that are done by now."""
        while self._under_way and self._under_way[0].is_done:
            self._under_way.popleft().let_go()

    def _copy_by_way_of_flat_memory(self, src: Tensor, dst: Tensor, *, to_device: bool) -> None:
        flat_src = src.clone(memory_format=torch.contiguous_format)
        make = self._runtime.empty if to_device else self._runtime.empty_host
        flat_dst = make(src.shape, src.dtype)
        self._runtime.copy(_flat(flat_dst), _flat(flat_src), non_blocking=False)
        dst.copy_(flat_dst)

    def _is_on_device(self, tensor: Tensor) -> bool:
        if tensor.device.type not in ("cpu", self._runtime.device.type):
            raise ValueError(f"a copy was given a tensor on {tensor.device}")
        return tensor.device.type != "cpu"


class _Copy:
    """The ticket of one copy. It holds both tensors until the copy is done."""

    __slots__ = ("_event", "_tensors")

    def __init__(self, tensors: tuple[Tensor, Tensor], event: Event) -> None:
        self._tensors: tuple[Tensor, Tensor] | None = tensors
        self._event = event

    @property
    def is_done(self) -> bool:
        """Whether the queue has passed it."""
        return self._event.query()

    def let_go(self) -> None:
        """The copy is done, and holds its tensors no more."""
        self._tensors = None

    def wait(self) -> None:
        """Nothing to do: what is issued from now on runs behind the copy."""

    def join(self) -> None:
        """Block until the copy is done."""
        wait_for(self._event)
        self.let_go()


class _Nothing:
    """The ticket of a copy that was done when it was asked for."""

    def wait(self) -> None:
        """Return."""

    join = wait


_NOTHING = _Nothing()


def wait_for(event: Event) -> None:
    """Block this thread, and no other, until the event has come."""
    sleep_s = FIRST_SLEEP_S
    while not event.query():
        time.sleep(sleep_s)
        sleep_s = min(2 * sleep_s, LONGEST_SLEEP_S)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values lie side by side, from a place on that Metal can copy from."""
    offset_bytes = tensor.storage_offset() * tensor.itemsize
    return tensor.is_contiguous() and offset_bytes % BLIT_BYTES == 0


def _flat(tensor: Tensor) -> Tensor:
    """The same memory as one row; equal strides are what Copy.mm asks for, not equal layouts."""
    return tensor.as_strided((tensor.numel(),), (1,))
