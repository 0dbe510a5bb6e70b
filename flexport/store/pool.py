"""One memory tier's bytes under a hard cap, handed out as buffers that are used again.

Fresh memory is dear (the first touch of a page costs more than reading it), and the sizes of a
run repeat with every sweep; so a buffer that comes back is kept for the next taker of its size,
and only let go when its room is needed for another size.

Dimension key: B bytes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flexport.errors import OutOfMemory
from flexport.units import format_bytes

__all__ = ["Buffer", "Pool", "Promise"]

GRAIN = 4096
"""Sizes are rounded up to this many bytes, so that buffers can be read into directly."""


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Memory taken from a pool: `bytes_B` is at least as long as was asked for."""

    bytes_B: Tensor

    @property
    def num_bytes(self) -> int:
        """What it counts for in its pool."""
        return self.bytes_B.numel()


class Pool:
    """A tier of memory. All methods may be called from any thread."""

    def __init__(self, name: str, capacity_bytes: int, make: Callable[[int], Tensor]) -> None:
        """`make(num_bytes)` allocates a flat uint8 tensor of the tier."""
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.peak_bytes = 0
        self._make = make
        self._used_bytes = 0
        self._spare_bytes = 0
        self._spares: dict[int, list[Buffer]] = defaultdict(list)
        self._changed = threading.Condition()

    @property
    def used_bytes(self) -> int:
        """Bytes in use now; spare buffers, which can be had at once, are not."""
        return self._used_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes in use and spare ones: all that the tier has had room for so far, and has still."""
        return self._used_bytes + self._spare_bytes

    @property
    def free_bytes(self) -> int:
        """What can be taken now."""
        return self.capacity_bytes - self._used_bytes

    @staticmethod
    def rounded(num_bytes: int) -> int:
        """What a buffer of num_bytes counts for."""
        return -(-max(num_bytes, 1) // GRAIN) * GRAIN

    def take(self, num_bytes: int, wait: Callable[[], bool] | None = None) -> Buffer:
        """A buffer of at least num_bytes, its content undefined.

        Where there is no room, `wait` is asked whether some may come free by itself (True: look
        again); without it, or when it says no, OutOfMemory is raised.
        """
        size = self.rounded(num_bytes)
        while not self._claim(size, reuse=True):
            if wait is None or not wait():
                raise OutOfMemory(
                    f"{self.name}: {format_bytes(size)} asked for, {format_bytes(self.free_bytes)} "
                    f"of {format_bytes(self.capacity_bytes)} free; use a larger "
                    f"--{self.name}-memory or a smaller --batch-size"
                )
        with self._changed:
            if self._spares[size]:
                self._spare_bytes -= size
                return self._spares[size].pop()
        try:
            return Buffer(self._make(size))
        except BaseException:
            self.unreserve(size)
            raise

    def give_back(self, buffer: Buffer) -> None:
        """The buffer is not used any more; nobody may touch its bytes from now on."""
        with self._changed:
            self._used_bytes -= buffer.num_bytes
            self._spares[buffer.num_bytes].append(buffer)
            self._spare_bytes += buffer.num_bytes

    def reserve(self, num_bytes: int, wait: Callable[[], bool] | None = None) -> None:
        """Count memory that is not allocated here, e.g. what kernels use.

        `wait` is as in `take`. Raises OutOfMemory.
        """
        while not self._claim(num_bytes, reuse=False):
            if wait is None or not wait():
                raise OutOfMemory(
                    f"{self.name}: {format_bytes(num_bytes)} asked for, "
                    f"{format_bytes(self.free_bytes)} of {format_bytes(self.capacity_bytes)} free"
                )

    def unreserve(self, num_bytes: int) -> None:
        """Stop counting what was reserved."""
        with self._changed:
            self._used_bytes -= num_bytes

    def close(self) -> None:
        """Let go of the spare buffers."""
        with self._changed:
            self._spares.clear()
            self._spare_bytes = 0

    def _claim(self, size: int, *, reuse: bool) -> bool:
        with self._changed:
            if self._used_bytes + size > self.capacity_bytes:
                return False
            self._used_bytes += size
            self.peak_bytes = max(self.peak_bytes, self._used_bytes)
            # Spare buffers of other sizes hold real memory: let go of as many as must be.
            over = self._used_bytes + self._spare_bytes - self.capacity_bytes
            kept = 1 if reuse and self._spares[size] else 0
            over -= kept * size
            for other in sorted(self._spares, reverse=True):
                while over > 0 and len(self._spares[other]) > (kept if other == size else 0):
                    self._spares[other].pop()
                    self._spare_bytes -= other
                    over -= other
            return True


class Promise:
    """Bytes of a pool set aside for one owner, who takes them later and bit by bit."""

    def __init__(self, pool: Pool, num_bytes: int) -> None:
        """Raises OutOfMemory if the pool has no room."""
        pool.reserve(num_bytes)
        self._pool = pool
        self._left_bytes = num_bytes

    @property
    def left_bytes(self) -> int:
        """What was not taken yet."""
        return self._left_bytes

    def add(self, num_bytes: int, wait: Callable[[], bool] | None = None) -> None:
        """Set more aside; as `Pool.reserve`."""
        self._pool.reserve(num_bytes, wait)
        self._left_bytes += num_bytes

    def draw(self, num_bytes: int) -> None:
        """The owner is about to take so many bytes from the pool; they are set aside no more."""
        num_bytes = min(num_bytes, self._left_bytes)
        self._left_bytes -= num_bytes
        self._pool.unreserve(num_bytes)

    def close(self) -> None:
        """What was not taken is anybody's again."""
        self.draw(self._left_bytes)
