"""The accelerator's memory: a hard size, every living byte counted, fresh bytes poisoned.

What is counted is what a program holds, as a stream-ordered allocator of a real device counts
it: memory is free again when its last tensor goes, though a lane may have work on it left.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from flexport.errors import OutOfMemory

__all__ = ["Arena", "Memory", "host_bytes", "poisoned"]

POISON = 0xFF
"""Fills fresh memory: every float that consists of such bytes is NaN, every signed int is -1."""


class Memory:
    """One piece of the arena; whoever holds it, tensors and their views, keeps it counted."""

    __slots__ = ("__weakref__", "num_bytes")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes


class Arena:
    """Counts bytes of device memory. All methods may be called from any thread."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        """What `allocate` gave and what operations computed, as far as it is alive."""
        self.peak_bytes = 0
        self.allocated_bytes = 0
        """The part that `allocate` gave."""
        self.allocated_peak_bytes = 0
        # Re-entrant: the collector may run a finalizer in a thread that holds it.
        self._lock = threading.RLock()

    def take(self, num_bytes: int, *, allocated: bool = False) -> Memory:
        """A piece of the arena, counted until it is forgotten. Raises OutOfMemory."""
        with self._lock:
            free_bytes = self.capacity_bytes - self.used_bytes
            if num_bytes > free_bytes:
                raise OutOfMemory(
                    f"asked for {num_bytes} bytes of device memory, {free_bytes} of "
                    f"{self.capacity_bytes} are free"
                )
            self.used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            if allocated:
                self.allocated_bytes += num_bytes
                self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        memory = Memory(num_bytes)
        weakref.finalize(memory, self._release, num_bytes, allocated).atexit = False
        return memory

    def _release(self, num_bytes: int, allocated: bool) -> None:
        with self._lock:
            self.used_bytes -= num_bytes
            if allocated:
                self.allocated_bytes -= num_bytes


class _HostMemory(bytearray):
    """Host memory that is counted for as long as a tensor views it."""

    memory: Memory


def host_bytes(num_bytes: int, memory: Memory) -> Tensor:
    """Real bytes full of poison, shape (B,), with which `memory` lives and goes."""
    # Torch can't view no bytes at all.
    held = _HostMemory(max(1, num_bytes))
    held.memory = memory
    with torch.inference_mode(False):
        return torch.frombuffer(held, dtype=torch.uint8)[:num_bytes].fill_(POISON)


def poisoned(num_bytes: int) -> Tensor:
    """Real bytes full of poison, shape (B,). Raises OutOfMemory."""
    try:
        # A tensor born in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8).fill_(POISON)
    except (RuntimeError, MemoryError) as error:
        raise OutOfMemory(f"asked for {num_bytes} bytes of host memory: {error}") from error
