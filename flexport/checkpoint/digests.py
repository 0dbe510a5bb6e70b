"""SHA-256 of whole files, worked out once and remembered for as long as a file is untouched.

A file is taken for the one that was read if its size, times and inode are those of then. The time
of a file's last change of state (ctime) can't be set by anybody, so bytes that were changed
show though the time of the last write was set back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from flexport.errors import CheckpointError, StorageError

__all__ = ["Digests", "Stamp", "digest_of", "hub_digest", "stamp_of"]

Stamp = tuple[int, int, int, int]
"""Size in bytes, times of last write and change in ns, inode."""

_READ_BYTES = 4 << 20
_BLOB = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


def stamp_of(path: Path) -> Stamp:
    """What tells whether the file was touched. Raises OSError."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def digest_of(file: IO[bytes], advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of an open file from its beginning, in hex; `advance` is told of bytes read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    file.seek(0)
    while num_bytes := file.readinto(buffer):  # type: ignore[attr-defined]  # every open file has it
        digest.update(buffer[:num_bytes])
        if advance is not None:
            advance(num_bytes)
    return digest.hexdigest()


def hub_digest(path: Path) -> str | None:
    """What a file of the hub's cache should be by its name there; None for any other file."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and _BLOB.fullmatch(real.name) else None


class Digests:
    """Digests of files by their paths and stamps, kept in a JSON file, which is made when needed.

    Of two processes that remember something at once, one may be forgotten, which costs time only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()

    def known(self, path: Path) -> str | None:
        """The digest of an untouched file that was read before."""
        stamp, digest = self._known.get(str(path.resolve()), (None, ""))
        try:
            return digest if stamp == stamp_of(path) else None
        except OSError:
            return None

    def remember(self, path: Path, stamp: Stamp, digest: str) -> None:
        """Keep what was worked out while the file had that stamp."""
        self._known = {**self._read(), **self._known, str(path.resolve()): (stamp, digest)}
        there = {name: each for name, each in self._known.items() if Path(name).exists()}
        part = self._path.with_name(f"{self._path.name}.part-{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(there, indent=0), encoding="utf-8")
            part.replace(self._path)
        except OSError as error:  # a cache that others fill may be read-only
            _log.debug("can't write %s: %s", self._path, error)
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def of(self, path: Path, advance: Callable[[int], None] | None = None) -> str:
        """The digest of a file, known or worked out. Raises StorageError, CheckpointError."""
        return self.known(path) or self.read(path, advance)

    def read(self, path: Path, advance: Callable[[int], None] | None = None) -> str:
        """The digest of a file as it is now. Raises StorageError, CheckpointError."""
        try:
            before = stamp_of(path)
            with path.open("rb", buffering=0) as file:
                digest = digest_of(file, advance)
            after = stamp_of(path)
        except OSError as error:
            raise StorageError(f"can't read {path}: {error.strerror or error}") from error
        if before != after:
            raise CheckpointError(
                f"{path} was changed while it was read; wait until its download or copy is complete"
            )
        self.remember(path, after, digest)
        return digest

    def _read(self) -> dict[str, tuple[Stamp, str]]:
        try:
            found: Any = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                str(name): ((int(size), int(written), int(changed), int(inode)), str(digest))
                for name, ((size, written, changed, inode), digest) in found.items()
            }
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}  # it is worked out again
