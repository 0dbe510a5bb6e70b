"""A file's lock that lives as long as its owner: the operating system frees it with the process.

A lock is one descriptor's alone, or shared by any number of them.
"""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Callable

__all__ = ["try_lock", "try_share"]

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})

_SPAN = 1 << 30
"""Windows locks ranges of bytes, be they there or not. To have the lock alone is to have so many, to
share it is to have one of them: two that share it are not expected to draw the same."""


def try_lock(fd: int) -> bool:
    """Lock an open file without waiting; False if another descriptor has its lock or shares it.

    Raises OSError where the file system knows no locks.
    """
    if sys.platform == "win32":
        return _done(lambda: _lock_range(fd, 0, _SPAN))
    import fcntl

    return _done(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))


def try_share(fd: int) -> bool:
    """Share an open file's lock without waiting; False if another descriptor has it alone.

    Raises OSError where the file system knows no locks.
    """
    if sys.platform == "win32":
        return _done(lambda: _lock_range(fd, random.randrange(_SPAN), 1))
    import fcntl

    return _done(lambda: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB))


def _done(lock: Callable[[], None]) -> bool:
    try:
        lock()
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise
        return False
    return True


def _lock_range(fd: int, begin: int, num_bytes: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(fd, begin, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, num_bytes)
