"""Reads and writes that bypass the page cache, and the aligned memory they need.

Tensors that stream from disk once a sweep would only push other things out of the page cache,
and the cache would not count against any budget. So files are opened with O_DIRECT (Linux) or
F_NOCACHE (macOS); where a file system refuses that, pages are dropped right after use; elsewhere
reads are plain. All transfers are positional, so that many threads may share one file.

An aligned transfer (address, offset and size all multiples of ALIGNMENT) goes straight to or from
the caller's memory. Any other one is correct too, through a small bounce buffer.

Dimension key: B bytes.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flexport.errors import DiskFull, OutOfMemory, StorageError
from flexport.units import format_bytes

__all__ = ["ALIGNMENT", "AlignedBuffer", "DirectFile", "align_up", "aligned_range", "storage_error"]

ALIGNMENT = 4096
"""A page of memory, and a multiple of every common disk's logical block (512 or 4096 bytes)."""

_HUGE_PAGE_BYTES = 2 << 20
_BOUNCE_BYTES = 1 << 20
"""Large enough for a disk to run near its full rate, small enough for one in every thread."""

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_O_BINARY: int = getattr(os, "O_BINARY", 0)
_NO_ROOM = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})

_log = logging.getLogger(__name__)


def align_up(num_bytes: int) -> int:
    """The smallest multiple of ALIGNMENT that is not below `num_bytes`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def aligned_range(offset_bytes: int, num_bytes: int) -> tuple[int, int]:
    """Start and stop of the smallest aligned range around the bytes asked for."""
    return offset_bytes // ALIGNMENT * ALIGNMENT, align_up(offset_bytes + num_bytes)


def storage_error(error: OSError, doing: str) -> StorageError:
    """`error` in our tree: DiskFull where space ran out, else StorageError."""
    words = f"{doing}: {error.strerror or error}"
    if error.errno in _NO_ROOM:
        return DiskFull(
            f"{words}; free some space, point --offload-dir at a larger disk, or keep less on disk"
        )
    return StorageError(words)


class AlignedBuffer:
    """Page-aligned anonymous memory, on huge pages where the platform has them.

    The memory lives until the last tensor that views it is gone.
    """

    __slots__ = ("bytes_B", "num_bytes")

    def __init__(self, num_bytes: int, *, touch: bool = False) -> None:
        """`touch` faults every page in now, so that no first use pays for it.

        Raises OutOfMemory.
        """
        self.num_bytes = num_bytes
        huge = sys.platform == "linux" and num_bytes >= _HUGE_PAGE_BYTES
        # A huge page starts at a multiple of its size; the slack is address space, never touched.
        slack_bytes = _HUGE_PAGE_BYTES if huge else 0
        wanted_bytes = max(align_up(num_bytes), ALIGNMENT) + slack_bytes
        try:
            if sys.platform == "win32":
                memory = mmap.mmap(-1, wanted_bytes)
            else:
                # The default, a shared mapping, is shmem, which rarely gets huge pages.
                memory = mmap.mmap(-1, wanted_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
        except OSError as error:
            raise OutOfMemory(
                f"the host has no room for {format_bytes(num_bytes)} more: "
                f"{error.strerror or error}; lower --host-memory"
            ) from error
        # The tensor keeps the mapping alive, and the mapping is never closed by hand.
        all_B = torch.frombuffer(memory, dtype=torch.uint8)
        skip_bytes = 0
        if sys.platform == "linux" and huge:
            skip_bytes = -all_B.data_ptr() % _HUGE_PAGE_BYTES
            body_bytes = num_bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
            tail_bytes = skip_bytes + body_bytes
            try:
                memory.madvise(mmap.MADV_HUGEPAGE, skip_bytes, body_bytes)
                # A huge page on the last part would hold more memory than was budgeted.
                memory.madvise(mmap.MADV_NOHUGEPAGE, tail_bytes, wanted_bytes - tail_bytes)
            except OSError as error:  # a kernel built without them
                _log.debug("no huge pages: %s", error)
        self.bytes_B: Tensor = all_B[skip_bytes : skip_bytes + num_bytes]
        if touch:
            self.bytes_B[::ALIGNMENT].zero_()


class DirectFile:
    """One open file with positional transfers past the page cache; safe to share by threads.

    Close it only when no transfer is under way.
    """

    def __init__(self, path: Path, mode: Literal["r", "rw"] = "r") -> None:
        """Open `path`; "rw" makes it if it is missing. Raises StorageError."""
        self.path = path
        flags = os.O_RDONLY if mode == "r" else os.O_RDWR | os.O_CREAT
        try:
            fd, self._direct = _open(path, flags | _O_BINARY)
            self._file = os.fdopen(fd, "rb" if mode == "r" else "r+b", buffering=0)
        except OSError as error:
            raise storage_error(error, f"can't open {path}") from error
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def direct(self) -> bool:
        """Whether transfers bypass the page cache by O_DIRECT."""
        return self._direct

    @property
    def num_bytes(self) -> int:
        """The file's size now."""
        return os.fstat(self._file.fileno()).st_size

    def fileno(self) -> int:
        """The operating system's number of the open file."""
        return self._file.fileno()

    def read_into(
        self, buffer: Tensor | memoryview, offset_bytes: int, wanted_bytes: int | None = None
    ) -> None:
        """Fill `buffer` (contiguous host memory) from `offset_bytes` on.

        With `wanted_bytes`, only that many from the start must exist: an aligned buffer may reach
        past the end of the file, and is left as it was there. Raises StorageError.
        """
        view, address = _as_bytes(buffer)
        needed_bytes = len(view) if wanted_bytes is None else wanted_bytes
        assert 0 <= needed_bytes <= len(view), (needed_bytes, len(view))
        if self._direct and (address | offset_bytes | len(view)) % ALIGNMENT:
            self._read_bounced(view[:needed_bytes], offset_bytes)
        else:
            self._read(view, offset_bytes, needed_bytes)

    def write_from(self, buffer: Tensor | memoryview, offset_bytes: int) -> None:
        """Write `buffer` (contiguous host memory) at `offset_bytes`, a multiple of ALIGNMENT.

        Where the size is not such a multiple, the rest of the last one is overwritten too.
        Raises StorageError, DiskFull.
        """
        view, address = _as_bytes(buffer)
        assert offset_bytes % ALIGNMENT == 0, offset_bytes
        if not self._direct:
            self._write(view, offset_bytes)
        elif address % ALIGNMENT:
            self._write_bounced(view, offset_bytes)
        else:
            body_bytes = len(view) // ALIGNMENT * ALIGNMENT
            self._write(view[:body_bytes], offset_bytes)
            self._write_bounced(view[body_bytes:], offset_bytes + body_bytes)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _bounce(self) -> memoryview:
        """This thread's own aligned buffer."""
        if not hasattr(self._local, "view"):
            self._local.view = _as_bytes(AlignedBuffer(_BOUNCE_BYTES).bytes_B)[0]
        view: memoryview = self._local.view
        return view

    def _read_bounced(self, view: memoryview, offset_bytes: int) -> None:
        bounce = self._bounce()
        done_bytes = 0
        while done_bytes < len(view):
            at_bytes = offset_bytes + done_bytes
            lead_bytes = at_bytes % ALIGNMENT
            num_bytes = min(len(view) - done_bytes, len(bounce) - lead_bytes)
            start_bytes, stop_bytes = aligned_range(at_bytes, num_bytes)
            self._read(bounce[: stop_bytes - start_bytes], start_bytes, lead_bytes + num_bytes)
            view[done_bytes : done_bytes + num_bytes] = bounce[lead_bytes : lead_bytes + num_bytes]
            done_bytes += num_bytes

    def _write_bounced(self, view: memoryview, offset_bytes: int) -> None:
        bounce = self._bounce()
        for start_bytes in range(0, len(view), len(bounce)):
            piece = view[start_bytes : start_bytes + len(bounce)]
            bounce[: len(piece)] = piece
            self._write(bounce[: align_up(len(piece))], offset_bytes + start_bytes)

    def _read(self, view: memoryview, offset_bytes: int, needed_bytes: int) -> None:
        done_bytes = 0
        while done_bytes < needed_bytes:
            at_bytes, direct = offset_bytes + done_bytes, self._direct
            try:
                got_bytes = self._read_some(view[done_bytes:], at_bytes)
            except OSError as error:
                if direct and self._leave_direct(error):
                    continue
                raise storage_error(error, f"can't read {self.path} at byte {at_bytes}") from error
            if done_bytes + got_bytes < needed_bytes:
                if got_bytes == 0 or at_bytes + got_bytes >= self.num_bytes:
                    raise StorageError(
                        f"{self.path} is truncated: wanted bytes {offset_bytes}-"
                        f"{offset_bytes + needed_bytes}, the file ends at {self.num_bytes}"
                    )
                got_bytes = self._aligned_progress(got_bytes, direct, at_bytes)
            done_bytes += got_bytes
        self._drop_cached(offset_bytes, done_bytes)

    def _write(self, view: memoryview, offset_bytes: int) -> None:
        done_bytes = 0
        while done_bytes < len(view):
            at_bytes, direct = offset_bytes + done_bytes, self._direct
            try:
                put_bytes = self._write_some(view[done_bytes:], at_bytes)
            except OSError as error:
                if direct and self._leave_direct(error):
                    continue
                raise storage_error(error, f"can't write {self.path} at byte {at_bytes}") from error
            done_bytes += self._aligned_progress(put_bytes, direct, at_bytes)
        self._drop_cached(offset_bytes, done_bytes)

    def _aligned_progress(self, moved_bytes: int, direct: bool, at_bytes: int) -> int:
        """How far a short transfer has come: a direct one has to go on from an aligned place."""
        progress_bytes = moved_bytes // ALIGNMENT * ALIGNMENT if direct else moved_bytes
        if progress_bytes == 0:
            raise StorageError(
                f"{self.path}: the disk moved only {moved_bytes} bytes at byte {at_bytes}"
            )
        return progress_bytes

    def _read_some(self, view: memoryview, offset_bytes: int) -> int:
        if sys.platform != "win32" and hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset_bytes)
        with self._lock:
            self._file.seek(offset_bytes)
            return self._file.readinto(view) or 0

    def _write_some(self, view: memoryview, offset_bytes: int) -> int:
        if sys.platform != "win32" and hasattr(os, "pwritev"):
            return os.pwritev(self._file.fileno(), [view], offset_bytes)
        with self._lock:
            self._file.seek(offset_bytes)
            return self._file.write(view) or 0

    def _leave_direct(self, error: OSError) -> bool:
        """Switch O_DIRECT off if it can have been the trouble; then trying again may help.

        Some file systems take the flag when a file is opened and refuse the transfers.
        """
        if sys.platform != "linux" or error.errno != errno.EINVAL:
            return False
        import fcntl

        with self._lock:
            if self._direct:
                flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
                fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags & ~_O_DIRECT)
                self._direct = False
                _log.info("%s: no O_DIRECT on this file system; using the page cache", self.path)
        return True

    def _drop_cached(self, offset_bytes: int, num_bytes: int) -> None:
        if sys.platform == "linux" and not self._direct:
            os.posix_fadvise(self._file.fileno(), offset_bytes, num_bytes, os.POSIX_FADV_DONTNEED)


def _open(path: Path, flags: int) -> tuple[int, bool]:
    """A file descriptor, and whether it is O_DIRECT."""
    if _O_DIRECT:
        try:
            return os.open(path, flags | _O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _log.debug("%s: no O_DIRECT on this file system; using the page cache", path)
    fd = os.open(path, flags, 0o600)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
    return fd, False


def _as_bytes(buffer: Tensor | memoryview) -> tuple[memoryview, int]:
    """The flat bytes of host memory, and its address."""
    if isinstance(buffer, memoryview):
        view = buffer.cast("B")
        address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
        return view, address
    assert buffer.device.type == "cpu", buffer.device
    assert buffer.is_contiguous(), (buffer.shape, buffer.stride())
    bytes_B = buffer.detach().reshape(-1).view(torch.uint8)
    return bytes_B.numpy().data, bytes_B.data_ptr()
