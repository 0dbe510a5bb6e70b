"""Where output rows go: a file that outlives a kill at any moment, or a stream.

Each row is one write of a whole line at the end of the file, so what a killed run leaves behind is
whole rows and at most one torn line, which `--resume` drops. A lock keeps a second run out.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from flexport.errors import DiskFull, StorageError, UsageError
from flexport.output.finished import Finished, scan

__all__ = ["FileSink", "Sink", "StreamSink"]

_LOG = logging.getLogger(__name__)

SYNC_EVERY_S = 1.0
"""At most so much work is lost to a power cut."""

MAX_SYNC_SHARE = 0.02
"""A disk that is busy with spilled tensors syncs slowly; the run waits for it no longer than this
share of its time."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Sink(Protocol):
    """Takes lines that end in a newline."""

    def write(self, line: bytes) -> None:
        """Append one line. Raises StorageError."""


class StreamSink:
    """A stream that belongs to someone else, such as stdout. Every line is flushed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, line: bytes) -> None:
        """Append one line. A reader that went away raises BrokenPipeError, as usual."""
        self._stream.write(line)
        self._stream.flush()


class FileSink:
    """An output file, open for appending; `finished` tells what it held before.

    Opened by one of three verbs, none of which touches the file before it is known to be right.
    """

    def __init__(self, path: Path, descriptor: int, finished: Finished) -> None:
        """Takes over the descriptor; use `create`, `replace` or `resume`."""
        self.path = path
        self.finished = finished
        self._descriptor = descriptor
        self._next_sync_s = 0.0
        self._is_stale = False

    @classmethod
    def create(cls, path: Path) -> FileSink:
        """A new file. Raises UsageError if there is one that holds anything."""
        descriptor = _open(path)
        if os.fstat(descriptor).st_size:
            os.close(descriptor)
            raise UsageError(
                f"{path} exists already; --resume continues it, --overwrite starts it anew"
            )
        return cls(path, descriptor, Finished())

    @classmethod
    def replace(cls, path: Path) -> FileSink:
        """A file whose rows give way to the first new one, so that a run that fails keeps them."""
        sink = cls(path, _open(path), Finished())
        sink._is_stale = True
        return sink

    @classmethod
    def resume(cls, path: Path) -> FileSink:
        """The output of an earlier run, its torn last line dropped; new if there is none.

        Raises UsageError if the file holds anything but output rows.
        """
        descriptor = _open(path)
        try:
            with open(descriptor, "rb", closefd=False) as file:
                finished, whole_bytes = scan(file, path)
            if torn_bytes := os.fstat(descriptor).st_size - whole_bytes:
                _LOG.info("dropped a torn last line of %d bytes from %s", torn_bytes, path)
                os.ftruncate(descriptor, whole_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, finished)

    def write(self, line: bytes) -> None:
        """Append one line, whole or not at all. Raises StorageError."""
        assert line.endswith(b"\n"), line
        self._drop_stale()
        start_bytes = os.fstat(self._descriptor).st_size
        rest = memoryview(line)
        try:
            while rest:  # once, unless the disk is full
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            os.ftruncate(self._descriptor, start_bytes)
            kind = DiskFull if error.errno in _NO_SPACE else StorageError
            raise kind(
                f"can't append to {self.path}: {error.strerror}; the rows in it are whole, so "
                "--resume continues from here"
            ) from error
        if time.monotonic() >= self._next_sync_s:
            self._sync()

    def close(self) -> None:
        """Make the rows safe and let go of the file. May be called twice."""
        if self._descriptor >= 0:
            try:
                self._sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> FileSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._drop_stale()
        self.close()

    def _drop_stale(self) -> None:
        if self._is_stale:
            os.ftruncate(self._descriptor, 0)
            self._is_stale = False

    def _sync(self) -> None:
        started_s = time.monotonic()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(f"can't make {self.path} safe on disk: {error.strerror}") from error
        ended_s = time.monotonic()
        self._next_sync_s = ended_s + max(SYNC_EVERY_S, (ended_s - started_s) / MAX_SYNC_SHARE)


def _open(path: Path) -> int:
    """A descriptor for reading the file and appending to it, with this process's lock on it."""
    binary = getattr(os, "O_BINARY", 0)  # or Windows would write \r\n
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | binary, 0o666)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from error
    try:
        _lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"another run is writing to {path}; wait for it, stop it, or name another output"
        ) from None
    return descriptor


if sys.platform == "win32":

    def _lock(descriptor: int) -> None:
        """As below. A lock here forbids reading too, so it lies on a byte that no file has."""
        import msvcrt

        os.lseek(descriptor, 1 << 62, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(*error.args) from error
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)

else:

    def _lock(descriptor: int) -> None:
        """Lock the file until the descriptor is closed, which the process's death does as well.

        Raises BlockingIOError if another process has the lock.
        """
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems know no locks
            _LOG.warning("the output is not locked against a second run: %s", error.strerror)
