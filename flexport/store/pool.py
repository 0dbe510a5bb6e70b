"""One memory tier's bytes under a hard cap, handed out as buffers that are used again.

Fresh memory is dear (the first touch of a page costs more than reading it), and the sizes of a
run repeat with every sweep; so a buffer that comes back is kept for the next taker of its size,
and only let go when its room is needed for another size, or for the other kind of memory where
two kinds share one capacity.

Dimension key: B bytes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass(slots=True, eq=False)
class _Books:
    """What is in use and what is spare of one capacity."""

    capacity_bytes: int
    used_bytes: int = 0
    peak_bytes: int = 0
    spare_bytes: int = 0
    spares: dict[tuple[int, int], list[Buffer]] = field(default_factory=lambda: defaultdict(list))
    """By size and number of the pool."""
    num_pools: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Pool:
    """A tier of memory. All methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        capacity_bytes: int,
        make: Callable[[int], Tensor],
        books: _Books | None = None,
    ) -> None:
        """`make(num_bytes)` allocates a flat uint8 tensor of the tier. `books`: see `beside`."""
        self.name = name
        self._make = make
        self._books = books or _Books(capacity_bytes)
        self._number = self._books.num_pools
        self._books.num_pools += 1

    def beside(self, make: Callable[[int], Tensor]) -> Pool:
        """A pool of another kind of memory that shares this one's capacity.

        All sizes that either tells are those of both together.
        """
        return Pool(self.name, self.capacity_bytes, make, self._books)

    @property
    def capacity_bytes(self) -> int:
        """The most that may be in use or spare."""
        return self._books.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes in use now; spare buffers, which can be had at once, are not."""
        return self._books.used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that was in use."""
        return self._books.peak_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes in use and spare ones: all that the tier has had room for so far, and has still."""
        return self._books.used_bytes + self._books.spare_bytes

    @property
    def free_bytes(self) -> int:
        """What can be taken now."""
        return self._books.capacity_bytes - self._books.used_bytes

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
        books = self._books
        with books.lock:
            if books.spares[size, self._number]:
                books.spare_bytes -= size
                return books.spares[size, self._number].pop()
        try:
            return Buffer(self._make(size))
        except BaseException:
            self.unreserve(size)
            raise

    def give_back(self, buffer: Buffer) -> None:
        """The buffer is not used any more; nobody may touch its bytes from now on."""
        books = self._books
        with books.lock:
            books.used_bytes -= buffer.num_bytes
            books.spares[buffer.num_bytes, self._number].append(buffer)
            books.spare_bytes += buffer.num_bytes

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
        with self._books.lock:
            self._books.used_bytes -= num_bytes

    def close(self) -> None:
        """Let go of the spare buffers, those of pools beside it too."""
        with self._books.lock:
            self._books.spares.clear()
            self._books.spare_bytes = 0

    def _claim(self, size: int, *, reuse: bool) -> bool:
        books, own = self._books, (size, self._number)
        with books.lock:
            if books.used_bytes + size > books.capacity_bytes:
                return False
            books.used_bytes += size
            books.peak_bytes = max(books.peak_bytes, books.used_bytes)
            # Spare buffers of other sizes hold real memory: let go of as many as must be.
            over = books.used_bytes + books.spare_bytes - books.capacity_bytes
            kept = 1 if reuse and books.spares[own] else 0
            over -= kept * size
            for other in sorted(books.spares, reverse=True):
                while over > 0 and len(books.spares[other]) > (kept if other == own else 0):
                    over -= books.spares[other].pop().num_bytes
                    books.spare_bytes -= other[0]
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
