"""One file on disk from which spilled tensors take extents, under a hard budget.

Space is allocated when an extent is taken, so a full disk shows there and not in the middle of a
write. Extents are multiples of ALIGNMENT, never overlap, and are reused once given back; holes
next to each other become one.
"""

from __future__ import annotations

import bisect
import os
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from flexport.errors import DiskFull
from flexport.store.direct_io import ALIGNMENT, DirectFile, align_up, storage_error
from flexport.units import format_bytes

__all__ = ["Extent", "SpillFile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A byte range of the spill file; both numbers are multiples of ALIGNMENT."""

    offset_bytes: int
    num_bytes: int

    @property
    def stop_bytes(self) -> int:
        """The first byte after it."""
        return self.offset_bytes + self.num_bytes


class SpillFile:
    """A file of extents; `file` moves their bytes. All methods may be called from any thread."""

    def __init__(self, path: Path, budget_bytes: int) -> None:
        """Make the file at `path`, which will never grow beyond the budget."""
        self.file = DirectFile(path, "rw")
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._holes: list[tuple[int, int]] = []
        """(offset, size) of free ranges, by offset; no two touch."""
        self._size_bytes = 0
        self._used_bytes = 0
        self._peak_bytes = 0

    @property
    def used_bytes(self) -> int:
        """The sum of the extents that are out."""
        return self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that `used_bytes` has been."""
        return self._peak_bytes

    @property
    def size_bytes(self) -> int:
        """The space that the file takes on the disk."""
        return self._size_bytes

    def take(self, num_bytes: int) -> Extent:
        """An extent of `num_bytes`, rounded up to ALIGNMENT: the tightest hole, or new space.

        Raises DiskFull if the budget or the disk has no room for it, and then nothing changes.
        """
        assert num_bytes > 0, num_bytes
        wanted_bytes = align_up(num_bytes)
        with self._lock:
            fits = [(size, offset) for offset, size in self._holes if size >= wanted_bytes]
            offset_bytes = self._take_hole(*min(fits), wanted_bytes) if fits else None
            if offset_bytes is None:
                offset_bytes = self._take_end(wanted_bytes)
            self._used_bytes += wanted_bytes
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)
        return Extent(offset_bytes=offset_bytes, num_bytes=wanted_bytes)

    def give_back(self, extent: Extent) -> None:
        """Free an extent that `take` gave; its bytes are no longer the caller's."""
        with self._lock:
            start, stop = extent.offset_bytes, extent.stop_bytes
            at = bisect.bisect_left(self._holes, (start, 0))
            before = self._holes[at - 1] if at else (0, 0)
            after = self._holes[at] if at < len(self._holes) else (self._size_bytes, 0)
            assert sum(before) <= start < stop <= after[0], (before, extent, after)
            first = last = at
            if at and sum(before) == start:
                first, start = at - 1, before[0]
            if at < len(self._holes) and after[0] == stop:
                last, stop = at + 1, sum(after)
            self._holes[first:last] = [(start, stop - start)]
            self._used_bytes -= extent.num_bytes

    def close(self) -> None:
        """Close the file; whoever owns its directory removes it."""
        self.file.close()

    def __enter__(self) -> SpillFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take_hole(self, size_bytes: int, offset_bytes: int, wanted_bytes: int) -> int:
        at = bisect.bisect_left(self._holes, (offset_bytes, 0))
        rest_bytes = size_bytes - wanted_bytes
        self._holes[at : at + 1] = [(offset_bytes + wanted_bytes, rest_bytes)] if rest_bytes else []
        return offset_bytes

    def _take_end(self, wanted_bytes: int) -> int:
        """Take the hole at the file's end, if there is one, and what is missing behind it."""
        last_is_end = bool(self._holes) and sum(self._holes[-1]) == self._size_bytes
        start_bytes = self._holes[-1][0] if last_is_end else self._size_bytes
        stop_bytes = start_bytes + wanted_bytes
        if stop_bytes > self.budget_bytes:
            raise DiskFull(
                f"the disk budget of {format_bytes(self.budget_bytes)} has no room for "
                f"{format_bytes(wanted_bytes)} more: {format_bytes(self._used_bytes)} are in use, "
                f"the largest free range has {format_bytes(self._largest_free_bytes())}; raise "
                "--disk-memory, or keep less on disk"
            )
        self._grow(stop_bytes)
        if last_is_end:
            self._holes.pop()
        return start_bytes

    def _largest_free_bytes(self) -> int:
        end_bytes = self.budget_bytes - self._size_bytes
        if self._holes and sum(self._holes[-1]) == self._size_bytes:
            end_bytes += self._holes[-1][1]
        return max([end_bytes // ALIGNMENT * ALIGNMENT, *(size for _, size in self._holes)])

    def _grow(self, size_bytes: int) -> None:
        more_bytes = size_bytes - self._size_bytes
        try:
            if sys.platform != "win32" and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file.fileno(), self._size_bytes, more_bytes)
            else:
                self._check_free(more_bytes)
                os.truncate(self.file.fileno(), size_bytes)
        except OSError as error:
            raise storage_error(
                error, f"can't allocate {format_bytes(more_bytes)} for {self.file.path}"
            ) from error
        self._size_bytes = size_bytes

    def _check_free(self, more_bytes: int) -> None:
        """The next best where space can't be reserved: is there enough of it now?"""
        free_bytes = shutil.disk_usage(self.file.path.parent).free
        if free_bytes < more_bytes:
            raise DiskFull(
                f"can't allocate {format_bytes(more_bytes)} for {self.file.path}: the disk has "
                f"{format_bytes(free_bytes)} free; free some space, point --offload-dir at a "
                "larger disk, or keep less on disk"
            )
