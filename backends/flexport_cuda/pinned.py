"""Host memory that the card reads and writes by itself: ordinary pages, pinned after the fact.

Copies to and from pinned memory run beside the kernels at the speed of the link; pageable memory
is copied in steps, several times slower, while the host waits. torch's own pinned memory comes in
powers of two (pytorch#95823), so that a host budget of 60 GB may take 120; here a slab of pages
is pinned in place, by cudaHostRegister, and any size is exact to 4096 bytes.

A request lies in the smallest gap that has room for it, or in a new slab: one of its own if it is
large, else one for many. A slab goes when nothing lies in it any more, but for a few that are
kept for the next request, since pinning costs about a millisecond for 4 MiB. Nothing is pinned
before the first request.

Dimension key: B bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import logging
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor

from flexport.errors import OutOfMemory
from flexport_cuda.facts import bytes_from_environment

__all__ = ["HostMemory", "pinned_bound_bytes"]

GRAIN = 4096
"""Sizes are rounded up to this, a page of memory and a sector of a disk."""

SMALLEST_SLAB_BYTES = 4 << 20
LARGEST_SLAB_BYTES = 64 << 20
"""Slabs for many requests are as large as all there are together, between these two."""

OWN_SLAB_BYTES = 16 << 20
"""A request of this size or more, if no gap has room for it, gets a slab of exactly its size."""

SPARE_BYTES = 64 << 20
"""Slabs with nothing in them are kept up to so many bytes."""

PINNED_VARIABLE = "FLEXPORT_CUDA_PINNED"
"""The most memory that is pinned; beyond it memory is pageable. Without it, half of what the
machine has: pinned pages can't be swapped, and what the system lacks it takes from programs."""

_log = logging.getLogger(__name__)


def pinned_bound_bytes() -> int:
    """The most bytes that may be pinned, as the environment or the machine's memory has it."""
    asked = bytes_from_environment(PINNED_VARIABLE)
    return int(psutil.virtual_memory().total) // 2 if asked is None else asked


class HostMemory:
    """Hands out host memory. All methods may be called from any thread."""

    def __init__(
        self,
        register: Callable[[int, int], str | None],
        unregister: Callable[[int], None],
        bound_bytes: int,
    ) -> None:
        """`register(address, num_bytes)` pins memory, or says why it can't."""
        self.pinned_bytes = 0
        self._register = register
        self._unregister = unregister
        self._bound_bytes = bound_bytes
        self._spare_bytes = SPARE_BYTES
        self._slabs: list[_Slab] = []
        self._refused_bytes = math.inf
        """The least that could not be pinned; so much is not tried again."""
        self._has_warned = False
        self._lock = threading.Lock()
        self._freed: deque[tuple[_Slab, int, int]] = deque()
        """What tensors left; the collector may end one in a thread that holds the lock."""

    @property
    def held_bytes(self) -> int:
        """What all slabs have, pinned or not."""
        return sum(slab.num_bytes for slab in list(self._slabs))

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor at a multiple of 4096; freed when its last view goes.

        Raises OutOfMemory.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        # A tensor born in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            if num_bytes == 0:
                return torch.empty(tuple(shape), dtype=dtype)
            size = -(-num_bytes // GRAIN) * GRAIN
            with self._lock:
                self._take_back()
                slab, begin = self._find(size)
            self._tidy()
            # The view of the pages is what the tensor's memory belongs to, and ends with it.
            pages = memoryview(slab.pages)[begin : begin + size]
            weakref.finalize(pages, self._give_back, slab, begin, begin + size).atexit = False
            return (
                torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]
                .view(dtype)
                .view(tuple(shape))
            )

    def close(self) -> None:
        """Free what nothing lies in, now and, of what is in use, later."""
        self._spare_bytes = 0
        with self._lock:
            self._take_back()
            self._drop_spares()
        self._tidy()

    def _find(self, size: int) -> tuple[_Slab, int]:
        """Where a request may lie, which is then taken."""
        fitting = [slab for slab in self._slabs if slab.best_gap(size) is not None]
        if fitting:
            slab = min(fitting, key=lambda slab: slab.best_gap(size) or 0)
        else:
            shared = min(max(self.held_bytes, SMALLEST_SLAB_BYTES), LARGEST_SLAB_BYTES)
            slab = self._new_slab(size if size >= OWN_SLAB_BYTES else max(size, shared))
            self._slabs.append(slab)
        return slab, slab.take(size)

    def _new_slab(self, num_bytes: int) -> _Slab:
        try:
            slab = _Slab(num_bytes)
        except (OSError, MemoryError, OverflowError) as error:
            raise OutOfMemory(
                f"asked for {num_bytes} bytes of host memory, about "
                f"{psutil.virtual_memory().available} are free: {error}"
            ) from error
        slab.is_pinned = self._pin(slab)
        return slab

    def _pin(self, slab: _Slab) -> bool:
        if self.pinned_bytes + slab.num_bytes > self._bound_bytes:
            reason = f"{self.pinned_bytes} of at most {self._bound_bytes} bytes are pinned already"
            self._warn(slab, f"{reason} (set {PINNED_VARIABLE} for more)")
            return False
        if slab.num_bytes >= self._refused_bytes:
            return False
        reason_or_none = self._register(slab.address, slab.num_bytes)
        if reason_or_none is not None:
            self._refused_bytes = slab.num_bytes
            self._warn(slab, reason_or_none)
            return False
        self.pinned_bytes += slab.num_bytes
        return True

    def _warn(self, slab: _Slab, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%d bytes of host memory are not pinned: %s. Copies to and from such memory are "
                "several times slower, and nothing is computed meanwhile",
                slab.num_bytes,
                reason,
            )

    def _give_back(self, slab: _Slab, begin: int, end: int) -> None:
        self._freed.append((slab, begin, end))
        self._tidy()

    def _tidy(self) -> None:
        """Take back what was freed, unless somebody is about to: whoever has the lock looks again
        when it is free.
        """
        while self._freed and self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while self._freed:
            slab, begin, end = self._freed.popleft()
            slab.give_back(begin, end)
        self._drop_spares()

    def _drop_spares(self) -> None:
        spares = sorted(
            (slab for slab in self._slabs if slab.is_empty), key=lambda slab: slab.num_bytes
        )
        spare_bytes = sum(slab.num_bytes for slab in spares)
        while spare_bytes > self._spare_bytes:
            slab = spares.pop()
            spare_bytes -= slab.num_bytes
            self._slabs.remove(slab)
            if slab.is_pinned:
                self._unregister(slab.address)
                self.pinned_bytes -= slab.num_bytes


class _Slab:
    """Pages in one piece, and the gaps between what lies in them."""

    def __init__(self, num_bytes: int) -> None:
        if hasattr(mmap, "MAP_PRIVATE"):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self.pages = mmap.mmap(-1, num_bytes, flags=flags)
        else:
            self.pages = mmap.mmap(-1, num_bytes)
        # Fewer, larger pages are quicker to pin; a kernel built without them says no.
        with contextlib.suppress(AttributeError, OSError):
            self.pages.madvise(mmap.MADV_HUGEPAGE)
        self.num_bytes = num_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        self.is_pinned = False
        self._gaps = [(0, num_bytes)]
        """Begin and end of each, sorted."""

    @property
    def is_empty(self) -> bool:
        """Nothing lies in it."""
        return self._gaps == [(0, self.num_bytes)]

    def best_gap(self, num_bytes: int) -> int | None:
        """The size of the smallest gap with room for so much."""
        return min((e - b for b, e in self._gaps if e - b >= num_bytes), default=None)

    def take(self, num_bytes: int) -> int:
        """Where the smallest gap with room begins, which is then so much smaller."""
        size = self.best_gap(num_bytes)
        place = next(i for i, (begin, end) in enumerate(self._gaps) if end - begin == size)
        begin, end = self._gaps[place]
        self._gaps[place : place + 1] = [(begin + num_bytes, end)] if size != num_bytes else []
        return begin

    def give_back(self, begin: int, end: int) -> None:
        """Make a gap, one with those beside it."""
        place = bisect.bisect(self._gaps, (begin, end))
        if place < len(self._gaps) and self._gaps[place][0] == end:
            end = self._gaps.pop(place)[1]
        if place > 0 and self._gaps[place - 1][1] == begin:
            place -= 1
            begin = self._gaps.pop(place)[0]
        self._gaps.insert(place, (begin, end))
