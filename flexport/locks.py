"""A file's lock that lives as long as its owner: the operating system frees it with the process."""

from __future__ import annotations

import errno
import sys

__all__ = ["try_lock"]

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


def try_lock(fd: int) -> bool:
    """Lock an open file without waiting; False if another descriptor holds its lock.

    Raises OSError where the file system knows no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise
        return False
    return True
