"""The lanes: memory to disk and back, by the engine's own store; host to device and back.

A lane is measured as it is used: copies of one size stand in line, so that the next begins when
one ends. Several sizes tell what a copy costs beside its bytes.

Dimension key: B bytes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from flexport.backend import Backend
from flexport.bench.profile.timing import Effort, fit_lane
from flexport.bench.spread import Spread
from flexport.planner.machine import Lane
from flexport.policy import Budgets, Tier
from flexport.store.direct_io import ALIGNMENT
from flexport.store.store import Kept, Lease, Store

__all__ = ["DiskFile", "disk_file", "link_lanes"]

DISK_COPIES = (256 << 10, 2 << 20, 16 << 20, 64 << 20)
"""Bytes of a copy: from a few rows of a page of the cache to a layer's weights."""

LINK_COPIES = (128 << 10, 1 << 20, 8 << 20, 64 << 20)
"""The same for a link, where smaller ones may have a queue of their own."""

ROUNDS = 3

WRITE_S = 8.0
"""The file is written for no longer than this: what a slow disk has by then will do."""

_AHEAD = 2
"""Copies under way: one is done while the next stands ready."""


class DiskFile:
    """Bundles of a store on disk, all of one size, that are written and read in turn."""

    def __init__(self, store: Store, kept: list[Kept]) -> None:
        self._store = store
        self._kept = kept
        self._num_written = 0
        self._at = 0
        # A disk or file system may compress zeros.
        self._random_B = torch.randint(0, 256, (kept[0].num_bytes,), dtype=torch.uint8)

    @property
    def bundle_bytes(self) -> int:
        """The largest copy there can be."""
        return self._kept[0].num_bytes

    def write_lane(self, effort: Effort) -> tuple[Lane, Spread]:
        """The lane of writes, each measured until the disk itself has them; fills the file."""
        sizes = _sizes(DISK_COPIES, self.bundle_bytes)
        self._num_written = len(self._kept)
        started_s, at, rates = time.perf_counter(), 0, []
        share = -(-len(self._kept) // ROUNDS)
        while at < len(self._kept) and time.perf_counter() - started_s < WRITE_S:
            count = min(share, len(self._kept) - at)
            rates.append(self._write(range(at, at + count), self.bundle_bytes))
            at += count
        self._num_written = at
        large = Spread.of(rates)
        points = [(self.bundle_bytes, self.bundle_bytes / large.median)]
        for num_bytes in sizes[:-1]:
            # As much as takes a quarter of a measurement, at the rate of large copies.
            most = int(large.median * effort.disk_s / 4 / self.bundle_bytes)
            rate = self._write(range(min(at, max(1, most))), num_bytes)
            points.append((num_bytes, num_bytes / rate))
        return fit_lane(points), large

    def read_lane(self, effort: Effort) -> tuple[Lane, Spread]:
        """The lane of reads past the page cache."""
        sizes = _sizes(DISK_COPIES, self.bundle_bytes)
        self.read(sizes[-1], effort.disk_s / 4)  # the buffers' first touch is not the disk's doing
        large = Spread.of([self.read(sizes[-1], effort.disk_s) for _ in range(ROUNDS)])
        points = [(sizes[-1], sizes[-1] / large.median)]
        for num_bytes in sizes[:-1]:
            rates = [self.read(num_bytes, effort.disk_s / 4) for _ in range(ROUNDS)]
            points.append((num_bytes, num_bytes / Spread.of(rates).median))
        return fit_lane(points), large

    def read(
        self, num_bytes: int, seconds: float, stop: Callable[[], bool] = lambda: False
    ) -> float:
        """Bytes a second of reads of so many bytes each, for so long, or until `stop` says so."""
        under_way: deque[Lease] = deque()
        moved_bytes, started_s = 0, time.perf_counter()
        while not stop() and (not moved_bytes or time.perf_counter() - started_s < seconds):
            if len(under_way) == _AHEAD:
                under_way.popleft().release()
            bundle, ranges = self._next(num_bytes)
            under_way.append(self._store.fetch(bundle, ranges, near=Tier.HOST))
            moved_bytes += num_bytes
        while under_way:
            under_way.popleft().release()
        return moved_bytes / (time.perf_counter() - started_s)

    def _next(self, num_bytes: int) -> tuple[Kept, list[tuple[int, int]]]:
        """The next part of the file, and from its beginning again when it ends."""
        per_bundle = self.bundle_bytes // num_bytes
        bundle, part = divmod(self._at, per_bundle)
        self._at = (self._at + 1) % (per_bundle * self._num_written)
        # Sizes differ in how many parts a bundle has of them.
        return self._kept[bundle % self._num_written], [(part * num_bytes, num_bytes)]

    def _write(self, bundles: range, num_bytes: int) -> float:
        """Bytes a second of writing these bundles in copies of so many bytes."""
        # Where memory is unified, all that is written comes from the device's.
        near = Tier.DEVICE if self._store.unified else Tier.HOST
        moved_bytes, started_s = 0, time.perf_counter()
        for bundle in bundles:
            kept = self._kept[bundle]
            for first in range(0, self.bundle_bytes - num_bytes + 1, num_bytes):
                lease = self._store.draft(kept, [(first, num_bytes)], near=near)
                backend = self._store.backend
                backend.copy_async(self._random_B[:num_bytes], lease.bytes_B).join()
                self._store.write_back(kept, lease)
                moved_bytes += num_bytes
        self._store.drain()
        self._sync()
        return moved_bytes / (time.perf_counter() - started_s)

    def _sync(self) -> None:
        """Wait until what was written is on the disk, and not in a cache before it."""
        fd = os.open(self._store.open_run_directory() / "spill", os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def disk_file(backend: Backend, directory: Path, effort: Effort) -> Iterator[DiskFile]:
    """A file in a folder, of which nothing is left in the end. Raises DiskFull, StorageError."""
    bundle_bytes = min(DISK_COPIES[-1], effort.pool_bytes // 4) // ALIGNMENT * ALIGNMENT
    staging_bytes = effort.pool_bytes
    budgets = Budgets(
        device_bytes=staging_bytes, host_bytes=staging_bytes, disk_bytes=effort.disk_bytes
    )
    directory.mkdir(parents=True, exist_ok=True)
    with Store(backend, budgets, directory) as store:
        kept = [
            store.keep("profile", bundle_bytes, Tier.DISK)
            for _ in range(max(1, effort.disk_bytes // bundle_bytes))
        ]
        yield DiskFile(store, kept)


def link_lanes(backend: Backend, effort: Effort) -> tuple[tuple[Lane, Spread], tuple[Lane, Spread]]:
    """Host to device and device to host, from memory that the backend calls fit for it."""
    most_bytes = min(LINK_COPIES[-1], effort.pool_bytes // 2)
    host_B = backend.allocate((most_bytes,), torch.uint8, "host").fill_(1)
    device_B = backend.allocate((most_bytes,), torch.uint8, "device")
    backend.copy_async(host_B, device_B).join()
    return (
        _link_lane(backend, host_B, device_B, effort),
        _link_lane(backend, device_B, host_B, effort),
    )


def _link_lane(
    backend: Backend, src_B: torch.Tensor, dst_B: torch.Tensor, effort: Effort
) -> tuple[Lane, Spread]:
    """Copies stand in line; the last one's ticket ends the measurement."""
    points = []
    for num_bytes in _sizes(LINK_COPIES, len(src_B)):
        src, dst = src_B[:num_bytes], dst_B[:num_bytes]

        def once(count: int, src: torch.Tensor = src, dst: torch.Tensor = dst) -> float:
            started_s = time.perf_counter()
            for ticket in [backend.copy_async(src, dst) for _ in range(count)]:
                ticket.join()
            return (time.perf_counter() - started_s) / count

        once(1)
        count = max(2, int(effort.kernel_s / effort.rounds / max(once(2), 1e-9)))
        seconds = Spread.of([once(min(count, 256)) for _ in range(effort.rounds)])
        points.append((num_bytes, seconds))
    lane = fit_lane([(num_bytes, seconds.median) for num_bytes, seconds in points])
    num_bytes, seconds = points[-1]
    return lane, Spread.of([num_bytes / each_s for each_s in seconds.values])


def _sizes(sizes: tuple[int, ...], most_bytes: int) -> list[int]:
    """Those that are smaller, in whole grains, and the largest that there can be."""
    return [*(size for size in sizes if size < most_bytes), most_bytes]
