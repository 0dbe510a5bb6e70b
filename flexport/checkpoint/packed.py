"""Packed weights on disk, made once for a checkpoint's content: `packed/<key>/` in the cache.

An entry is a directory of safetensors files and a `manifest.json` that is written when all of them
are whole. The key is made of the bytes that were packed and of how, so it is found again when the
checkpoint was moved or downloaded anew, and two fine-tunes never share one. Nothing of an entry is
used whose digest is not the manifest's.

Until it is whole, an entry has an `unfinished.json` instead, with the files that are. Whoever packs
or removes it has the lock on the file `lock` alone; runs that stream from it share that. The system
frees it when its owner dies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

from flexport.checkpoint.digests import Digests, digest_of, stamp_of
from flexport.checkpoint.writer import new_file
from flexport.errors import CheckpointError, DiskFull, DoesNotFit, StorageError, UsageError
from flexport.locks import try_lock, try_share
from flexport.units import format_bytes

__all__ = [
    "FORMAT_VERSION",
    "Entry",
    "Manifest",
    "PackedCache",
    "PackedFile",
    "default_directory",
    "require_room",
]

FORMAT_VERSION = 1
"""Of the entries; part of every key."""

_MANIFEST, _UNFINISHED, _LOCK = "manifest.json", "unfinished.json", "lock"
_KEY = re.compile(r"[0-9a-f]{16}")
_POLL_S = 0.2
_ELSEWHERE = (
    "put the cache on a larger disk with FLEXPORT_CACHE=DIR in the environment, or use "
    "--compress-weights none"
)


def default_directory() -> Path:
    """`FLEXPORT_CACHE`, or flexport's directory where the system's users have their caches."""
    asked = os.environ.get("FLEXPORT_CACHE")
    if asked:
        return Path(asked).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "flexport"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flexport"
    caches = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG_CACHE_HOME says to take no notice of a relative path.
    absolute = caches and Path(caches).is_absolute()
    return (Path(caches) if caches and absolute else Path.home() / ".cache") / "flexport"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """One of an entry's files, as it has to be."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an entry holds, and how to know that it does."""

    model: str
    revision: str | None
    """The commit, of a model from the hub."""
    content: str
    """A digest of the bytes that were packed, and of what they are."""
    codec: str
    """The packed form, and its parameters."""
    num_values: int
    """Weights that were packed."""
    source_bytes: int
    """What they take in the checkpoint."""
    flexport: str
    """The version that packed them."""
    created: str
    """When, in UTC."""
    version: int = FORMAT_VERSION
    files: Mapping[str, PackedFile] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """All its files."""
        return sum(file.num_bytes for file in self.files.values())

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError for what is no manifest of this version."""
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        if found.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"it is of version {found.get('version')!r}, and this flexport reads "
                f"{FORMAT_VERSION}"
            )
        try:
            files = {name: PackedFile(**facts) for name, facts in found.pop("files").items()}
            return cls(**found, files=files)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not what flexport writes ({error})") from error


class PackedCache:
    """All entries below a directory, which is made when something is written."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or default_directory()
        self.digests = Digests(self.directory / "digests.json")
        """Of checkpoints' files, and of the cache's own."""

    def make(self) -> None:
        """Make the directory. Raises UsageError."""
        try:
            (self.directory / "packed").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"can't use the cache directory {self.directory}: {error.strerror or error}; name "
                "a writable one with FLEXPORT_CACHE=DIR in the environment"
            ) from error

    def entry(self, key: str) -> Entry:
        """The entry of that key, which need not be there."""
        assert _KEY.fullmatch(key), key
        return Entry(self, key)

    def entries(self) -> list[Entry]:
        """All that are there, whole or not, by key. Raises StorageError."""
        try:
            names = [path.name for path in (self.directory / "packed").iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(
                f"can't read {self.directory / 'packed'}: {error.strerror or error}"
            ) from error
        return [Entry(self, name) for name in sorted(names) if _KEY.fullmatch(name)]

    def find(self, start: str) -> Entry:
        """The one entry whose key begins so. Raises UsageError."""
        found = [entry for entry in self.entries() if start and entry.key.startswith(start)]
        if len(found) != 1:
            keys = ", ".join(entry.key for entry in found or self.entries()) or "none"
            raise UsageError(
                f"{len(found) or 'no'} entries of {self.directory} begin with {start!r}: "
                f"{'they are' if found else 'there are'} {keys}"
            )
        return found[0]


class Entry:
    """One checkpoint's packed weights."""

    def __init__(self, cache: PackedCache, key: str) -> None:
        self.key = key
        self.directory = cache.directory / "packed" / key
        self._cache = cache

    # ---- reading

    def manifest(self) -> Manifest | None:
        """None if it is not there, or not whole. Raises CheckpointError."""
        return self._read(_MANIFEST)

    def unfinished(self) -> Manifest | None:
        """What an interrupted run has left, less what can't be read."""
        with suppress(CheckpointError):
            return self._read(_UNFINISHED)
        return None

    @property
    def disk_bytes(self) -> int:
        """All that lies in its directory, whole or not."""
        total = 0
        with suppress(OSError):  # removed meanwhile
            for path in self.directory.iterdir():
                total += path.stat().st_size
        return total

    @property
    def last_used_s(self) -> float | None:
        """When it was last streamed from, since the epoch."""
        for name in (_MANIFEST, _UNFINISHED):
            with suppress(OSError):
                return (self.directory / name).stat().st_mtime
        return None

    def unknown_bytes(self, manifest: Manifest) -> int:
        """What `check` would read: files that were touched since their digests were worked out."""
        digests = self._cache.digests
        return sum(
            file.num_bytes
            for name, file in manifest.files.items()
            if digests.known(self.directory / name) is None
        )

    def check(
        self,
        manifest: Manifest,
        names: Collection[str],
        advance: Callable[[int], None] | None = None,
        *,
        read_all: bool = False,
    ) -> None:
        """Raises CheckpointError, which names each file that is not as it was written.

        `names` are files that it must have. Untouched ones are not read, unless all are to be.
        """
        problems = [
            f"{self.directory / _MANIFEST} does not have {name}"
            for name in names
            if name not in manifest.files
        ]
        for name, file in manifest.files.items():
            problem = self._problem(name, file, advance, read_all=read_all)
            if problem:
                problems.append(f"{self.directory / name} {problem}")
        if problems:
            raise self._damaged("\n  - ".join(["", *problems]))

    @contextmanager
    def in_use(self) -> Iterator[Manifest | None]:
        """While it lasts nobody packs or removes the entry.

        Gives None, and keeps nobody from anything, if it is not whole or somebody is at it now. Raises
        CheckpointError.
        """
        if not (self.directory / _MANIFEST).exists():
            yield None
            return
        with self._shared() as is_shared:
            yield self.manifest() if is_shared else None

    def note_use(self) -> None:
        """Note that it is streamed from."""
        with suppress(OSError):  # a cache that others fill may be read-only
            os.utime(self.directory / _MANIFEST)

    @contextmanager
    def _shared(self) -> Iterator[bool]:
        """Whether we share the lock; or there can be none, where the cache is only read."""
        fd = self._open_lock()
        try:
            yield fd is None or self._shares(fd)
        finally:
            if fd is not None:
                os.close(fd)

    def _shares(self, fd: int) -> bool:
        try:
            return try_share(fd) and self._is_own(fd)
        except OSError:  # its file system knows no locks, and it was packed elsewhere
            return True

    def _open_lock(self) -> int | None:
        for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
            with suppress(OSError):
                return os.open(self.directory / _LOCK, flags, 0o666)
        return None

    def is_sound(self, name: str, file: PackedFile) -> bool:
        """Whether a file is as it was written."""
        return self._problem(name, file) is None

    def _problem(
        self,
        name: str,
        file: PackedFile,
        advance: Callable[[int], None] | None = None,
        *,
        read_all: bool = False,
    ) -> str | None:
        path, digests = self.directory / name, self._cache.digests
        try:
            num_bytes = path.stat().st_size
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            raise StorageError(f"can't read {path}: {error.strerror or error}") from error
        if num_bytes != file.num_bytes:
            return f"has {num_bytes} bytes, and was written with {file.num_bytes}"
        digest = digests.read(path, advance) if read_all else digests.of(path, advance)
        return None if digest == file.sha256 else "is not as it was written: its bytes have changed"

    def _read(self, name: str) -> Manifest | None:
        path = self.directory / name
        try:
            return Manifest.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"can't read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise self._damaged(f" {path} can't be used: {error}") from error

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"packed weights in the cache are damaged:{what}\n"
            f"remove them with `flexport pack --remove {self.key}`, and they are packed again when "
            "they are needed; or pack them now with `flexport pack --overwrite` and the same "
            "--model and --compress-weights"
        )

    # ---- writing, with the lock

    @contextmanager
    def locked(self, wait: Callable[[], None]) -> Iterator[None]:
        """While it lasts nobody else packs, removes or uses the entry.

        `wait` is called once if somebody does, and it begins when they are done. Raises UsageError
        if the directory can't be used.
        """
        self._cache.make()
        told = False
        while True:
            try:
                self.directory.mkdir(exist_ok=True)
                fd = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # removed by somebody else between the two
            except OSError as error:
                raise self._unusable(error) from error
            try:
                if self._holds(fd):
                    yield
                    return
            finally:
                os.close(fd)
            if not told:
                wait()
                told = True
            time.sleep(_POLL_S)

    def _holds(self, fd: int) -> bool:
        """Lock the file without waiting; whether we hold it and it is still the entry's own."""
        try:
            return try_lock(fd) and self._is_own(fd)
        except OSError as error:
            raise self._unusable(error) from error

    def _is_own(self, fd: int) -> bool:
        """Whether it is the lock's file still, and not one that was removed."""
        try:
            return os.path.samestat(os.fstat(fd), (self.directory / _LOCK).stat())
        except FileNotFoundError:
            return False

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(
            f"can't write to the cache directory {self.directory}: {error.strerror or error}; name "
            "a writable one on a local disk with FLEXPORT_CACHE=DIR in the environment"
        )

    def clear(self, keep: Mapping[str, PackedFile] | None = None) -> None:
        """Remove all but the lock and the files to keep; what says that it is whole goes first."""
        kept = {_LOCK, *([_UNFINISHED, *keep] if keep else [])}
        try:
            (self.directory / _MANIFEST).unlink(missing_ok=True)
            for path in list(self.directory.iterdir()):
                if path.name not in kept:
                    path.unlink()
        except OSError as error:
            raise StorageError(
                f"can't remove what is in {self.directory}: {error.strerror or error}"
            ) from error

    def remove(self) -> None:
        """Remove the entry. Raises UsageError if somebody packs or uses it, StorageError."""

        def refuse() -> None:
            with self._shared() as is_shared:
                what = "a run streams from it" if is_shared else "another process packs it"
            raise UsageError(
                f"{self.key} can't be removed while {what}: wait for that to end, or stop it"
            )

        with self.locked(refuse):
            self.clear()
            if sys.platform != "win32":
                # With the lock's file gone, whoever waits for it makes another.
                with suppress(OSError):
                    (self.directory / _LOCK).unlink()
                    self.directory.rmdir()
        if sys.platform == "win32":  # an open file can't be removed there
            with suppress(OSError):
                shutil.rmtree(self.directory)

    def add(
        self, manifest: Manifest, name: str, num_bytes: int, write: Callable[[IO[bytes]], object]
    ) -> Manifest:
        """Write one more file, and the manifest with it; to be used from then on.

        Raises DiskFull and StorageError; the files before this one stay for the next try.
        """
        path = self.directory / name
        try:
            with new_file(path, num_bytes, "packed weights") as file:
                write(file)
                file.flush()
                digest = digest_of(file)
            self._cache.digests.remember(path, stamp_of(path), digest)
            packed = PackedFile(num_bytes=num_bytes, sha256=digest)
            manifest = replace(manifest, files={**manifest.files, name: packed})
            self._write(_UNFINISHED, manifest)
        except DiskFull as error:
            raise DiskFull(
                f"{error}; make room and start again, and packing goes on where it stopped, or "
                f"{_ELSEWHERE}"
            ) from error
        return manifest

    def complete(self, manifest: Manifest) -> None:
        """Say that all files are there."""
        self._write(_UNFINISHED, manifest)
        try:
            (self.directory / _UNFINISHED).replace(self.directory / _MANIFEST)
        except OSError as error:
            raise StorageError(
                f"can't write {self.directory / _MANIFEST}: {error.strerror or error}"
            ) from error

    def _write(self, name: str, manifest: Manifest) -> None:
        text = json.dumps(asdict(manifest), indent=1).encode()
        with new_file(self.directory / name, len(text), "a manifest") as file:
            file.write(text)

    def require_room(self, num_bytes: int) -> None:
        """Raises DoesNotFit if the disk has no room for so many bytes more."""
        require_room(
            self.directory,
            num_bytes,
            f"remove what `flexport pack --list` shows and nobody needs, or {_ELSEWHERE}",
        )


def require_room(directory: Path, num_bytes: int, hint: str) -> None:
    """Raises DoesNotFit, with the hint, if the disk has no room for so many bytes more."""
    free_bytes = shutil.disk_usage(directory).free
    if num_bytes > free_bytes:
        raise DoesNotFit(
            f"packed weights take {format_bytes(num_bytes)} in {directory}, and its disk has "
            f"{format_bytes(free_bytes)} left: {hint}"
        )
