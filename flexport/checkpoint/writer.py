"""A new safetensors file, written as its bytes come, that has its name only when it is whole.

All sizes are known beforehand, so the header comes first and no tensor waits in memory for another.
The data starts on a page, and so does every tensor for as long as those before it are whole pages:
reads past the page cache need no detour there. What is written is made safe on the disk, and
dropped from the page cache, which has better uses.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flexport.checkpoint.header import FORMAT_NAMES
from flexport.errors import DiskFull, StorageError
from flexport.units import format_bytes

__all__ = ["PAGE_BYTES", "PART_MARK", "FileLayout", "NewTensor", "flush", "forget", "new_file"]

PAGE_BYTES = 4096
PART_MARK = ".part-"
"""In the names of files that are not whole."""

_NO_ROOM = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str
    """By torch's name."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return math.prod(self.shape) * FORMAT_NAMES[self.dtype][1]


class FileLayout:
    """Where the tensors of a new file will lie, in the order given, and its header."""

    def __init__(self, tensors: Sequence[NewTensor]) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start_bytes = 0
        for tensor in tensors:
            assert tensor.name not in entries, f"{tensor.name} occurs twice"
            stop_bytes = start_bytes + tensor.num_bytes
            entries[tensor.name] = {
                "dtype": FORMAT_NAMES[tensor.dtype][0],
                "shape": list(tensor.shape),
                "data_offsets": [start_bytes, stop_bytes],
            }
            start_bytes = stop_bytes
        text = json.dumps(entries).encode()
        text += b" " * (-(len(text) + 8) % PAGE_BYTES)
        self.header = len(text).to_bytes(8, "little") + text
        """The file's first bytes, padded so that the data starts on a page."""
        self.num_bytes = len(self.header) + start_bytes
        self.offsets_bytes: dict[str, int] = {}
        """Of each tensor, from the file's beginning."""
        at = len(self.header)
        for tensor in tensors:
            self.offsets_bytes[tensor.name] = at
            at += tensor.num_bytes


@contextmanager
def new_file(path: Path, num_bytes: int, what: str) -> Iterator[IO[bytes]]:
    """A file to write to and read from, which replaces `path` when the block ends well.

    If it does not, nothing is left but what a killed process leaves: a file with PART_MARK in its
    name. Raises DiskFull and StorageError, which say `what` was written.
    """
    part = path.with_name(f"{path.name}{PART_MARK}{os.getpid()}")
    try:
        try:
            with part.open("w+b") as file:
                yield file
                flush(file)
            part.replace(path)
            _sync_names(path.parent)
        finally:
            with suppress(OSError):  # what went wrong before says more
                part.unlink(missing_ok=True)
    except OSError as error:
        kind = DiskFull if error.errno in _NO_ROOM else StorageError
        raise kind(
            f"can't write {format_bytes(num_bytes)} of {what} to {path}: {error.strerror or error}"
        ) from error


def flush(file: IO[bytes]) -> None:
    """Write what is buffered to the disk and forget it, so that it does not fill the page cache."""
    file.flush()
    os.fsync(file.fileno())
    forget(file)


def forget(file: IO[bytes], offset_bytes: int = 0, num_bytes: int = 0) -> None:
    """Drop a range of a file from the page cache, where the system can; 0 bytes: all to its end."""
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), offset_bytes, num_bytes, os.POSIX_FADV_DONTNEED)


def _sync_names(directory: Path) -> None:
    """Make a new name in a directory outlive a loss of power, where the system can do that."""
    if sys.platform == "win32":
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems can't
            os.fsync(fd)
    finally:
        os.close(fd)
