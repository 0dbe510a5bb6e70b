"""The tiered store: bundles of bytes at home on a tier, and leases of them on the device.

A bundle is kept at one home. `fetch` leases its bytes near the device, or near the CPU: in place
where the home is that memory (or one that it shares), else through staging buffers from the same
capped pools, filled by the lanes. `draft` leases room for a bundle that has no content yet, and
`write_back` sends a lease home. The store keeps the last ticket of every bundle, so a fetch
starts behind a write-back of the same bundle, and nobody else has to think of it.

    disk --read lane--> host staging --copy_async--> device staging      (fetch)
    device staging --copy_async--> host staging --write lane--> disk     (write_back)

Where memory is unified, a bundle at home on the host lies in device memory. Where the host also
addresses device memory the middle column falls away: reads land where the device computes. Where
it does not, host staging comes out of the one capacity, too.

Dimension key: B bytes.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from flexport.backend import Backend, Ticket
from flexport.errors import DiskFull
from flexport.policy import Budgets, Tier
from flexport.store.direct_io import AlignedBuffer, DirectFile, align_up, aligned_range
from flexport.store.lanes import DONE, Job, Lane, Trouble, Watch
from flexport.store.pool import Buffer, Pool
from flexport.store.run_dir import RunDir
from flexport.store.spill import Extent, SpillFile

__all__ = ["FileRun", "Kept", "Lease", "Store"]

CHUNK_BYTES = 8 << 20
"""Size of one read: large enough to reach a disk's full rate, small enough to share by threads."""

TASK_BYTES = 256 << 10
"""Smaller reads go to a thread together, up to so much: handing one over costs more than making it."""

NUM_READERS = 5
"""Reads in flight. Measured on a virtual NVMe disk: 1 gives 3.0 GB/s, 2 3.6, 3 3.8, 4 no more; while
the cores compute, 3 give 3.0 and 5 give 3.1."""

NUM_WRITERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRun:
    """A byte range of somebody's file, to be read in place."""

    path: Path
    offset_bytes: int
    num_bytes: int


@dataclass(slots=True, eq=False)
class Kept:
    """A bundle the store keeps: its size, its home, and the last copy that wrote to it."""

    kind: str
    num_bytes: int
    home: Tier
    buffer: Buffer | None = None
    extent: Extent | None = None
    runs: tuple[FileRun, ...] = ()
    starts_bytes: tuple[int, ...] = ()
    """Where each run begins in the bytes of a lease."""
    last: Job = field(default=DONE)


Ranges = Sequence[tuple[int, int]]
"""(first byte, number of bytes) of parts of a bundle, both multiples of ALIGNMENT."""


class Lease:
    """A bundle's bytes where they are to be used, from when `ticket` is done until `release`.

    Where only parts of the bundle were asked for, a lease in place shows all of it, and any other
    one these parts end to end.
    """

    __slots__ = ("_pools", "bytes_B", "near", "ranges", "ticket")

    def __init__(
        self,
        bytes_B: Tensor,
        ticket: Ticket,
        pools: Sequence[tuple[Pool, Buffer]] = (),
        ranges: Ranges = (),
        near: Tier = Tier.DEVICE,
    ) -> None:
        self.bytes_B = bytes_B
        self.ticket = ticket
        self.ranges = ranges
        self.near = near
        self._pools = tuple(pools)

    @property
    def in_place(self) -> bool:
        """Whether the bytes are the bundle's home itself."""
        return not self._pools

    def release(self) -> None:
        """The bytes are not needed any more. A copy under way is waited for first."""
        if not self._pools:
            return
        try:
            self.ticket.join()
        finally:
            for pool, buffer in self._pools:
                pool.give_back(buffer)
            self._pools = ()


class _All:
    """A ticket for several copies."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets

    def wait(self) -> None:
        for ticket in self._tickets:
            ticket.wait()

    def join(self) -> None:
        for ticket in self._tickets:
            ticket.join()


class _Relay:
    """A ticket for a read that is followed by a copy to the device."""

    def __init__(self, send: Callable[[], Ticket]) -> None:
        """`send` starts the copy; it is called once."""
        self.read: Job = DONE
        self._send: Callable[[], Ticket] | None = send
        self._copy: Ticket = DONE
        self._lock = threading.Lock()

    def pass_on(self) -> None:
        """Start the copy if nobody has. The read must have ended."""
        with self._lock:
            if self._send is not None:
                self._copy = self._send()
                self._send = None  # whoever keeps the ticket keeps no buffers with it

    def wait(self) -> None:
        self.read.join()
        self.pass_on()
        self._copy.wait()

    def join(self) -> None:
        self.read.join()
        self.pass_on()
        self._copy.join()


class Store:
    """Bundles on three tiers under hard caps. Opened once a run; closing it removes every file."""

    def __init__(
        self,
        backend: Backend,
        budgets: Budgets,
        offload_dir: Path,
        watch: Watch | None = None,
    ) -> None:
        """Nothing is written below offload_dir before the first bundle has its home on disk."""
        self.backend = backend
        self.label = ""
        """What the copies started from now on are for; told to `watch`."""
        self.unified = backend.capabilities.unified
        self._addressable = backend.capabilities.addressable
        self.trouble = Trouble()
        self.placed_bytes: Counter[tuple[str, Tier]] = Counter()
        self._budgets = budgets
        self._offload_dir = offload_dir
        self._run_dir: RunDir | None = None
        self._spill: SpillFile | None = None
        self._files: dict[Path, DirectFile] = {}
        self._writes: deque[Job] = deque()
        both_bytes = budgets.device_bytes + budgets.host_bytes
        if self._addressable:
            self.device = self.host = Pool("device", both_bytes, self._make_host)
        elif self.unified:
            self.device = Pool("device", both_bytes, self._make_device)
            self.host = self.device.beside(self._make_host)
        else:
            self.device = Pool("device", budgets.device_bytes, self._make_device)
            self.host = Pool("host", budgets.host_bytes, self._make_host)
        self.lanes = {
            "disk_to_host": Lane("disk_to_host", NUM_READERS, self.trouble, watch),
            "host_to_device": Lane("host_to_device", 1, self.trouble, watch),
            "device_to_host": Lane("device_to_host", 1, self.trouble, watch),
            "host_to_disk": Lane("host_to_disk", NUM_WRITERS, self.trouble, watch),
        }

    # ---- bundles and their homes

    def keep_file(self, kind: str, runs: Sequence[FileRun]) -> Kept:
        """A read-only bundle whose home is where it lies in somebody's files."""
        starts, at = [], 0
        for run in runs:
            start, stop = aligned_range(run.offset_bytes, run.num_bytes)
            starts.append(at + run.offset_bytes - start)
            at += stop - start
        return Kept(
            kind=kind, num_bytes=at, home=Tier.DISK, runs=tuple(runs), starts_bytes=tuple(starts)
        )

    def keep(self, kind: str, num_bytes: int, home: Tier) -> Kept:
        """Room for a bundle at its home. Raises OutOfMemory or DiskFull, and then keeps nothing."""
        self.placed_bytes[kind, home] += num_bytes
        if home is Tier.DISK:
            extent = self._take_extent(num_bytes)
            return Kept(kind=kind, num_bytes=num_bytes, home=home, extent=extent)
        return self._keep_in_memory(kind, num_bytes, home)

    def keep_open(self, kind: str, num_bytes: int, home: Tier) -> Kept:
        """Like `keep`, for a bundle that will be written to often before it is complete.

        If its home is the disk it stays at home on the host until `settle`.
        """
        self.placed_bytes[kind, home] += num_bytes
        return self._keep_in_memory(kind, num_bytes, Tier.HOST if home is Tier.DISK else home)

    def drop(self, kept: Kept) -> None:
        """Forget a bundle and free its home, once a write-back under way has ended."""
        buffer, extent, pool, last = kept.buffer, kept.extent, self.pool(kept.home), kept.last
        kept.buffer = kept.extent = None

        def free() -> int:
            last.join()
            if buffer is not None:
                pool.give_back(buffer)
            if extent is not None and self._spill is not None:
                self._spill.give_back(extent)
            return 0

        if last.done:
            free()
        else:
            self._start_write(free, f"freeing {kept.kind}")

    def settle(self, kept: Kept) -> None:
        """A bundle of `keep_open` is complete: send it from the host to its home on disk."""
        assert kept.home is Tier.HOST and kept.buffer is not None, kept
        pool, extent = self.pool(Tier.HOST), self._take_extent(kept.num_bytes)
        memory = [(pool, kept.buffer)]
        whole = Lease(kept.buffer.bytes_B[: kept.num_bytes], kept.last, memory, _ranges(kept, None))
        kept.home, kept.buffer, kept.extent = Tier.DISK, None, extent
        self._send_to_disk(kept, whole, is_on_host=pool is self.host)

    def pool(self, home: Tier) -> Pool:
        """The memory in which a bundle of that home lies, or waits while it is open."""
        return self.device if home is Tier.DEVICE or self.unified else self.host

    def has_room(self, num_bytes: int, home: Tier) -> bool:
        """Whether `keep` would find room now, without waiting."""
        if home is not Tier.DISK:
            return Pool.rounded(num_bytes) <= self.pool(home).free_bytes
        used_bytes = self._spill.used_bytes if self._spill else 0
        return align_up(num_bytes) <= self._budgets.disk_bytes - used_bytes

    # ---- leases

    def staging_bytes(
        self, kept: Kept, ranges: Ranges | None = None, near: Tier = Tier.DEVICE
    ) -> tuple[int, int]:
        """Device and host bytes of staging that a fetch takes (all the device's where unified)."""
        if self._in_place(kept.home, near):
            return 0, 0
        num_bytes = Pool.rounded(_size(_ranges(kept, ranges)))
        if near is Tier.HOST:
            return 0, num_bytes
        if kept.home is not Tier.DISK or self._addressable:
            return num_bytes, 0
        return (2 * num_bytes, 0) if self.unified else (num_bytes, num_bytes)

    def fetch(
        self,
        kept: Kept,
        ranges: Ranges | None = None,
        near: Tier = Tier.DEVICE,
        *,
        urgent: bool = False,
    ) -> Lease:
        """The bundle's bytes on the device; the copy is under way when this returns.

        With `ranges`, only these parts of it are needed; what is `urgent` is read before all that
        others wait for. Near the host, which a bundle at home on
        the device never is, they are for the CPU.
        """
        if self._in_place(kept.home, near):
            return self._lease_in_place(kept)
        ranges = _ranges(kept, ranges)
        num_bytes = _size(ranges)
        if near is Tier.HOST:
            assert kept.home is Tier.DISK, kept
            host = self.host.take(num_bytes, self.wait_for_a_write)
            staged_B = host.bytes_B[:num_bytes]
            ticket: Ticket = self._read(kept, staged_B, ranges, urgent=urgent)
            return Lease(staged_B, ticket, [(self.host, host)], ranges, near)
        device = self.device.take(num_bytes, self.wait_for_a_write)
        bytes_B = device.bytes_B[:num_bytes]
        label = self._label(kept)
        if kept.home is Tier.HOST:
            kept.last.join()
            ticket = _All(
                [
                    self.copy("host_to_device", home_B, part_B, label)
                    for home_B, part_B in _parts(kept, bytes_B, ranges)
                ]
            )
            return Lease(bytes_B, ticket, [(self.device, device)], ranges)
        if self._addressable:
            ticket = self._read(kept, bytes_B, ranges, urgent=urgent)
            return Lease(bytes_B, ticket, [(self.device, device)], ranges)
        try:
            host = self.host.take(num_bytes, self.wait_for_a_write)
        except BaseException:
            self.device.give_back(device)
            raise
        staged_B = host.bytes_B[:num_bytes]
        relay = _Relay(lambda: self.copy("host_to_device", staged_B, bytes_B, label))
        # Where memory is unified no link stands idle meanwhile. So the copy is left to whoever
        # waits for it: a device without links may well take work from one thread only.
        then = None if self.unified else relay.pass_on
        relay.read = self._read(kept, staged_B, ranges, then, urgent=urgent)
        return Lease(bytes_B, relay, [(self.device, device), (self.host, host)], ranges)

    def draft(self, kept: Kept, ranges: Ranges | None = None, near: Tier = Tier.DEVICE) -> Lease:
        """Device (or host) memory for what is to be written to a bundle, or to parts of it.

        Its content is undefined until then.
        """
        if self._in_place(kept.home, near):
            return self._lease_in_place(kept)
        ranges = _ranges(kept, ranges)
        num_bytes = _size(ranges)
        pool = self.pool(near)
        buffer = pool.take(num_bytes, self.wait_for_a_write)
        return Lease(buffer.bytes_B[:num_bytes], DONE, [(pool, buffer)], ranges, near)

    def write_back(self, kept: Kept, lease: Lease) -> None:
        """Start sending the leased bytes home; the lease is taken over and released."""
        if lease.in_place:
            return
        if kept.home is Tier.HOST:
            src_B, before, label = lease.bytes_B, kept.last, self._label(kept)
            copies = [
                self.copy("device_to_host", part_B, home_B, label)
                for home_B, part_B in _parts(kept, src_B, lease.ranges)
            ]
            kept.last = self._start_write(partial(_finish, _All(copies), lease, before), label)
            return
        is_on_host = self._addressable or lease.near is Tier.HOST
        self._send_to_disk(kept, lease, is_on_host=is_on_host)

    def read_file(self, kept: Kept, dst_B: Tensor) -> Job:
        """Start reading a bundle of `keep_file` into host memory of its size."""
        return self._read(kept, dst_B, _ranges(kept, None))

    def read_rows(self, run: FileRun, row_bytes: int, rows: Sequence[int]) -> Tensor:
        """Some rows of a table in somebody's file, as host bytes of shape (R, row_bytes)."""
        out_RB = torch.empty(len(rows), row_bytes, dtype=torch.uint8)
        file = self._open_file(run.path)
        per_task = max(1, -(-len(rows) // NUM_READERS))

        def read(begin: int) -> int:
            end = min(begin + per_task, len(rows))
            for index in range(begin, end):
                file.read_into(out_RB[index], run.offset_bytes + rows[index] * row_bytes)
            return (end - begin) * row_bytes

        tasks = [partial(read, begin) for begin in range(0, len(rows), per_task)]
        self.lanes["disk_to_host"].submit(tasks, urgent=True, label="table rows").join()
        return out_RB

    def copy(self, lane: str, src: Tensor, dst: Tensor, label: str | None = None) -> Ticket:
        """Start a copy between host and device, watched by its lane for how long it takes."""
        ticket = self.backend.copy_async(src, dst)
        num_bytes = src.numel() * src.element_size()

        def watch() -> int:
            ticket.join()
            return num_bytes

        self.lanes[lane].submit([watch], label=self.label if label is None else label)
        return ticket

    # ---- the run as a whole

    def open_run_directory(self) -> Path:
        """This run's own directory for files; made when first asked for, removed by `close`."""
        if self._run_dir is None:
            self._run_dir = RunDir(self._offload_dir)
        return self._run_dir.path

    @property
    def disk_peak_bytes(self) -> int:
        """The most that spilled bundles have taken."""
        return self._spill.peak_bytes if self._spill else 0

    def lane_counts(self) -> dict[str, tuple[int, float]]:
        """Bytes that each lane has moved so far, and the seconds it was busy."""
        return {name: (lane.moved_bytes, lane.busy_s) for name, lane in self.lanes.items()}

    def check(self) -> None:
        """Raise what has gone wrong in any lane by now."""
        self.trouble.check()

    def wait_for_a_write(self) -> bool:
        """Wait until a write-back ends, which frees its staging. False: none is under way."""
        self.check()
        if not self._writes:
            return False
        self._writes.popleft().join()
        return True

    def drain(self) -> None:
        """Wait for all write-backs under way, and until every lane has counted what it moved."""
        while self._writes:
            self._writes.popleft().join()
        for lane in self.lanes.values():
            lane.wait_until_idle()

    def close(self) -> None:
        """Stop the lanes and remove every file of this run."""
        for lane in self.lanes.values():
            lane.close()
        for file in self._files.values():
            file.close()
        if self._spill is not None:
            self._spill.close()
        if self._run_dir is not None:
            self._run_dir.close()
        self.device.close()
        self.host.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- inside

    def _keep_in_memory(self, kind: str, num_bytes: int, home: Tier) -> Kept:
        buffer = self.pool(home).take(num_bytes, self.wait_for_a_write)
        return Kept(kind=kind, num_bytes=num_bytes, home=home, buffer=buffer)

    def _take_extent(self, num_bytes: int) -> Extent:
        while True:
            try:
                return self._open_spill().take(num_bytes)
            except DiskFull:
                # Extents that were dropped come free behind their last write-back.
                if not self.wait_for_a_write():
                    raise

    def _in_place(self, home: Tier, near: Tier) -> bool:
        return home is near or (self.unified and home is not Tier.DISK)

    def _make_host(self, num_bytes: int) -> Tensor:
        # A tensor born in inference mode can't be written to outside it.
        with torch.inference_mode(False):
            if self._addressable:
                return AlignedBuffer(num_bytes).bytes_B
            return self.backend.allocate((num_bytes,), torch.uint8, "host")

    def _make_device(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):
            return self.backend.allocate((num_bytes,), torch.uint8, "device")

    def _open_file(self, path: Path) -> DirectFile:
        if path not in self._files:
            self._files[path] = DirectFile(path)
        return self._files[path]

    def _open_spill(self) -> SpillFile:
        if self._spill is None:
            self._spill = SpillFile(self.open_run_directory() / "spill", self._budgets.disk_bytes)
        return self._spill

    def _label(self, kept: Kept) -> str:
        return f"{kept.kind}, {self.label}" if self.label else kept.kind

    def _lease_in_place(self, kept: Kept) -> Lease:
        assert kept.buffer is not None, kept
        return Lease(kept.buffer.bytes_B[: kept.num_bytes], kept.last)

    def _read(
        self,
        kept: Kept,
        dst_B: Tensor,
        ranges: Ranges,
        then: Callable[[], None] | None = None,
        *,
        urgent: bool = False,
    ) -> Job:
        """Start reading parts of a bundle; of one in somebody's files, all of it."""
        tasks: list[Callable[[], int]] = []
        few: list[_Piece] = []
        before, at, few_bytes = kept.last, 0, 0

        def read(file: DirectFile, offset: int, stop: int, end: int) -> None:
            """The bytes offset .. stop-1, of which those from `end` on may be missing."""
            nonlocal at, few, few_bytes
            for start in range(offset, stop, CHUNK_BYTES):
                num_bytes = min(CHUNK_BYTES, stop - start)
                few.append((file, dst_B[at : at + num_bytes], start, min(num_bytes, end - start)))
                at, few_bytes = at + num_bytes, few_bytes + num_bytes
                if few_bytes >= TASK_BYTES:
                    tasks.append(partial(_read_pieces, few, before))
                    few, few_bytes = [], 0

        if kept.extent is not None:
            spill, base = self._open_spill().file, kept.extent.offset_bytes
            for first, num_bytes in ranges:
                stop = base + first + num_bytes
                read(spill, base + first, stop, stop)
        for run in kept.runs:
            start, stop = aligned_range(run.offset_bytes, run.num_bytes)
            read(self._open_file(run.path), start, stop, run.offset_bytes + run.num_bytes)
        if few:
            tasks.append(partial(_read_pieces, few, before))
        label = self._label(kept)
        return self.lanes["disk_to_host"].submit(tasks, then, urgent=urgent, label=label)

    def _write_extent(self, src_B: Tensor, extent: Extent, ranges: Ranges) -> int:
        file, at = self._open_spill().file, 0
        for first, num_bytes in ranges:
            file.write_from(src_B[at : at + num_bytes], extent.offset_bytes + first)
            at += num_bytes
        return at

    def _send_to_disk(self, kept: Kept, lease: Lease, *, is_on_host: bool) -> None:
        """Start writing leased bytes to the bundle's extent; the lease is taken over."""
        assert kept.extent is not None, f"a {kept.kind} bundle in somebody's file is read-only"
        src_B, ready, label = lease.bytes_B, lease.ticket, self._label(kept)
        leases = [lease]
        if not is_on_host:
            host = self.host.take(src_B.numel(), self.wait_for_a_write)
            staged_B = host.bytes_B[: src_B.numel()]
            ready = self.copy("device_to_host", src_B, staged_B, label)
            leases.append(Lease(staged_B, DONE, [(self.host, host)]))
            src_B = staged_B
        kept.last = self._start_write(
            partial(self._spill_lease, ready, src_B, kept.extent, lease.ranges, leases, kept.last),
            label,
        )

    def _spill_lease(
        self,
        ready: Ticket,
        src_B: Tensor,
        extent: Extent,
        ranges: Ranges,
        leases: Sequence[Lease],
        before: Job,
    ) -> int:
        try:
            ready.join()
            return self._write_extent(src_B, extent, ranges)
        finally:
            for lease in leases:
                lease.release()
            before.join()  # whoever waits for this write waits for those before it

    def _start_write(self, task: Callable[[], int], label: str) -> Job:
        job = self.lanes["host_to_disk"].submit([task], label=label)
        while self._writes and self._writes[0].done:
            self._writes.popleft()
        self._writes.append(job)
        return job


def _ranges(kept: Kept, ranges: Ranges | None) -> Ranges:
    return [(0, kept.num_bytes)] if ranges is None else ranges


def _size(ranges: Ranges) -> int:
    return sum(num_bytes for _, num_bytes in ranges)


def _parts(kept: Kept, leased_B: Tensor, ranges: Ranges) -> list[tuple[Tensor, Tensor]]:
    """Each range at its home in memory, and in the bytes of a lease."""
    assert kept.buffer is not None, kept
    parts, at = [], 0
    for first, num_bytes in ranges:
        home_B = kept.buffer.bytes_B[first : first + num_bytes]
        parts.append((home_B, leased_B[at : at + num_bytes]))
        at += num_bytes
    return parts


def _finish(copies: Ticket, lease: Lease, before: Job) -> int:
    try:
        copies.join()
    finally:
        lease.release()
        before.join()  # whoever waits for this write waits for those before it
    return 0


_Piece = tuple[DirectFile, Tensor, int, int]
"""A file, memory, where in the file to read it from, and how many bytes of it must be there."""


def _read_pieces(pieces: Sequence[_Piece], before: Job) -> int:
    before.join()
    for file, dst_B, offset_bytes, wanted_bytes in pieces:
        file.read_into(dst_B, offset_bytes, wanted_bytes)
    return sum(dst_B.numel() for _, dst_B, _, _ in pieces)
