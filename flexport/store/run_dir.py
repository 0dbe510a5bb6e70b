"""The one directory of a run for what it spills, and the clearing away of dead runs' ones.

A run directory is `flexport-run-<pid>-<random>` below the offload directory and holds a file
`lock`, locked by the operating system for as long as its owner lives: kill -9 frees the lock and
leaves the directory, which the next run to open there removes. Nothing is ever deleted that does
not have both the name and the lock file.

Two runs may start, sweep and stop at the same moment. The lock file is made first and removed
last, and whoever takes a lock looks whether the file it locked is still the one in the
directory; if not, a sweeper was quicker, and the newcomer takes another name.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from types import TracebackType

from flexport.errors import StorageError, UsageError
from flexport.locks import try_lock

__all__ = ["RunDir"]

_NAME = re.compile(r"flexport-run-\d+-[0-9a-f]{16}")
_LOCK = "lock"
_TRIES = 100
"""Each try fails only if a sweeper hits the moment between two system calls."""

_log = logging.getLogger(__name__)


class RunDir:
    """A locked directory of this process; `path` exists until `close`, or the process's end."""

    def __init__(self, offload_dir: Path) -> None:
        """Remove what dead runs left in `offload_dir` (made if missing), and make our own.

        Raises UsageError if the directory can't be used.
        """
        try:
            offload_dir.mkdir(parents=True, exist_ok=True)
            _sweep(offload_dir)
            self.path, self._lock_fd = _make(offload_dir)
        except OSError as error:
            raise UsageError(
                f"can't use the offload directory {offload_dir}: {error.strerror or error}; "
                "choose a writable directory on a local disk with --offload-dir"
            ) from error
        self._pid = os.getpid()
        self._closed = False
        atexit.register(self.close)

    def close(self) -> None:
        """Remove the directory with all that is in it; a second call does nothing.

        A forked child shares the lock but not the ownership: there, this does nothing.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            _remove(self.path, self._lock_fd)
        except OSError as error:
            raise StorageError(
                f"can't remove the run directory {self.path}: {error.strerror or error}; the next "
                "run with this offload directory will try again"
            ) from error

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _make(offload_dir: Path) -> tuple[Path, int]:
    """A new locked run directory, and the descriptor that holds its lock."""
    for _ in range(_TRIES):
        path = offload_dir / f"flexport-run-{os.getpid()}-{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        try:
            lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            continue  # swept away while it was still empty
        except OSError:
            with contextlib.suppress(OSError):  # the reason it can't be used is the first error
                path.rmdir()
            raise
        if _lock(lock_fd, path):
            return path, lock_fd
        os.close(lock_fd)
    raise OSError(errno.EBUSY, f"{_TRIES} new run directories were swept away by other runs")


def _sweep(offload_dir: Path) -> None:
    """Remove the directories of dead runs; leave live ones, and everything else, alone."""
    with os.scandir(offload_dir) as entries:
        found = [
            Path(entry.path)
            for entry in entries
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    for path in found:
        with contextlib.suppress(OSError):  # another user's, or another sweeper was quicker
            _reclaim(path)


def _reclaim(path: Path) -> None:
    try:
        lock_fd = os.open(path / _LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        # Its owner died before it made the lock, or after it removed it: then it is empty.
        path.rmdir()
        return
    try:
        dead = _lock(lock_fd, path)
    except OSError:
        os.close(lock_fd)
        raise
    if dead:
        _log.info("removing what a run that died left in %s", path)
        _remove(path, lock_fd)
    else:
        os.close(lock_fd)


def _remove(path: Path, lock_fd: int) -> None:
    """Remove a run directory whose lock we hold, the lock file last; closes `lock_fd`."""
    try:
        for entry in list(path.iterdir()):
            if entry.name == _LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if sys.platform != "win32":
            (path / _LOCK).unlink()
    finally:
        os.close(lock_fd)
    if sys.platform == "win32":  # an open file can't be removed there
        (path / _LOCK).unlink()
    with contextlib.suppress(FileNotFoundError):  # a sweeper saw it empty
        path.rmdir()


def _lock(lock_fd: int, path: Path) -> bool:
    """Lock the file without waiting; whether we hold it and it is still the directory's own."""
    if not try_lock(lock_fd):
        return False
    try:
        return os.path.samestat(os.fstat(lock_fd), (path / _LOCK).stat())
    except FileNotFoundError:
        return False
