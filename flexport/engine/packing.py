"""The files that weights stream from which flexport packs itself: found in the cache, or made.

Packing is done once, into the cache (`checkpoint.packed`), a file a layer. A chunk of rows at a
time is in memory, whatever the model's size: rows do not depend on each other, so how they are cut
changes no bit. Torch is not imported before something is packed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Protocol

import flexport
from flexport.checkpoint.digests import Digests, Stamp, hub_digest, stamp_of
from flexport.checkpoint.header import read_header
from flexport.checkpoint.packed import Entry, Manifest, PackedCache, require_room
from flexport.checkpoint.writer import new_file
from flexport.codecs.compressed import Compressed
from flexport.engine.source import Source
from flexport.engine.to_pack import NewFile, Packing, plan_packing
from flexport.errors import CheckpointError, StorageError
from flexport.records import FileTensor
from flexport.units import format_bytes

__all__ = [
    "PackProgress",
    "Packed",
    "Quiet",
    "ShowPacking",
    "known_entry",
    "pack_into",
    "packed_files",
    "prepared",
]

_log = logging.getLogger(__name__)


class PackProgress(Protocol):
    """Who is told how it goes."""

    def begin(self, what: str, total_bytes: int) -> None:
        """Something starts that takes a while: reading or packing so many bytes."""

    def advance(self, num_bytes: int) -> None:
        """So many of them are done."""

    def say(self, text: str) -> None:
        """Something that people should know."""


ShowPacking = Callable[[], AbstractContextManager[PackProgress]]
"""Makes one for as long as packing may take."""


class Quiet:
    """Progress for the log only."""

    def begin(self, what: str, total_bytes: int) -> None:
        """A line."""
        _log.info("%s", what)

    def advance(self, num_bytes: int) -> None:
        """Nothing: the next line says enough."""

    def say(self, text: str) -> None:
        """A line."""
        _log.warning("%s", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A model's packed weights in the cache, whole and sound."""

    packing: Packing
    entry: Entry
    manifest: Manifest
    packed_bytes: int = 0
    """Of the checkpoint, packed right now."""
    packing_s: float = 0.0
    """How long that took."""

    @property
    def tensors(self) -> dict[str, FileTensor]:
        """Every part of every packed matrix."""
        return _found(self.packing, self.entry.directory)


@contextmanager
def packed_files(
    source: Source,
    files: Mapping[str, FileTensor],
    form: Compressed,
    cache: PackedCache,
    *,
    progress: PackProgress | None = None,
) -> Iterator[dict[str, FileTensor]]:
    """Every part of every packed matrix of a checkpoint's, from the cache; see `prepared`."""
    packing = plan_packing(source, files, form)
    with prepared(source, packing, cache, progress or Quiet()) as packed:
        yield packed.tensors


@contextmanager
def prepared(
    source: Source,
    packing: Packing,
    cache: PackedCache,
    progress: PackProgress,
    *,
    overwrite: bool = False,
) -> Iterator[Packed]:
    """See that the cache has what is to be packed, that none of it is damaged, and that it stays.

    While it lasts nobody removes it. With `overwrite` it is packed anew though it is there, when
    nobody uses it. Raises DoesNotFit where the disk is too small, CheckpointError for what is
    damaged, StorageError, and UsageError.
    """
    used = _digests(packing, cache.digests, progress)
    content = packing.content(used)
    entry = cache.entry(packing.key(content))

    def wait() -> None:
        progress.say(
            f"another process packs these weights in {entry.directory}, or streams from them; "
            "waiting for it"
        )

    packed: Packed | None = None
    while True:  # what was just packed may be removed before it is in use
        with entry.in_use() as manifest:
            if manifest is not None and not overwrite:
                if packed is None or packed.manifest != manifest:
                    packed = Packed(packing=packing, entry=entry, manifest=manifest)
                _check(packed, progress)
                entry.note_use()
                yield packed
                return
        with entry.locked(wait):
            if overwrite or entry.manifest() is None:
                blank = Manifest(
                    model=_model(source),
                    revision=_revision(source),
                    content=content,
                    codec=packing.form.key,
                    num_values=packing.num_values,
                    source_bytes=packing.source_bytes,
                    flexport=flexport.__version__,
                    created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                )
                packed = _fill(entry, packing, blank, cache.digests, used, progress)
                overwrite = False


def _check(packed: Packed, progress: PackProgress) -> None:
    entry = packed.entry
    unknown_bytes = entry.unknown_bytes(packed.manifest)
    if unknown_bytes:
        size = format_bytes(unknown_bytes)
        progress.begin(f"checking {size} of packed weights in {entry.directory}", unknown_bytes)
    entry.check(packed.manifest, [new.name for new in packed.packing.files], progress.advance)


def known_entry(packing: Packing, cache: PackedCache) -> Entry | None:
    """Its entry in the cache, there or not; None if files would have to be read to know its key."""
    known = _known(packing, cache.digests)
    digests = {path: digest for path, digest in known.items() if digest is not None}
    if len(digests) < len(known):
        return None
    return cache.entry(packing.key(packing.content(digests)))


def pack_into(
    directory: Path,
    source: Source,
    files: Mapping[str, FileTensor],
    form: Compressed,
    *,
    progress: PackProgress | None = None,
) -> dict[str, FileTensor]:
    """The same for made-up weights, which nobody asks for again: into a run's own directory."""
    progress = progress or Quiet()
    packing = plan_packing(source, files, form)
    require_room(
        directory,
        packing.num_bytes,
        "name a larger disk with --offload-dir, or use --compress-weights none",
    )
    progress.begin(f"packing {packing}", packing.source_bytes)
    for new in packing.files:
        with new_file(directory / new.name, new.num_bytes, "packed weights") as file:
            _write(file, new, form, progress.advance)
    return _found(packing, directory)


def _fill(
    entry: Entry,
    packing: Packing,
    blank: Manifest,
    digests: Digests,
    used: Mapping[Path, str],
    progress: PackProgress,
) -> Packed:
    """Write what an interrupted run has not written yet."""
    before = entry.unfinished()
    wanted = {new.name for new in packing.files}
    kept = {
        name: file
        for name, file in (before.files.items() if before is not None else ())
        if name in wanted and entry.is_sound(name, file)
    }
    entry.clear(keep=kept)
    todo = [new for new in packing.files if new.name not in kept]
    entry.require_room(sum(new.num_bytes for new in todo))
    stamps = _read_for_certain(packing, digests, used, progress)
    again = f" ({len(kept)} of {len(packing.files)} files are there already)" if kept else ""
    todo_bytes = sum(new.source_bytes for new in todo)
    progress.begin(f"packing {packing}, in {entry.directory}{again}", todo_bytes)
    started_s = time.monotonic()
    manifest = replace(blank, files=kept)
    for new in todo:

        def write(file: IO[bytes], new: NewFile = new) -> None:
            _write(file, new, packing.form, progress.advance)
            _refuse_changed(stamps)

        manifest = entry.add(manifest, new.name, new.num_bytes, write)
    entry.complete(manifest)
    return Packed(
        packing=packing,
        entry=entry,
        manifest=manifest,
        packed_bytes=todo_bytes,
        packing_s=time.monotonic() - started_s,
    )


def _known(packing: Packing, digests: Digests) -> dict[Path, str | None]:
    """Digests of the files that hold what is packed, as far as none has to be read for them.

    A file of the hub's cache is called by its.
    """
    return {path: hub_digest(path) or digests.known(path) for path in packing.source_paths}


def _digests(packing: Packing, digests: Digests, progress: PackProgress) -> dict[Path, str]:
    """Of the files that hold what is packed; reads those whose are not known."""
    found = _known(packing, digests)
    unknown = [path for path, digest in found.items() if digest is None]
    if unknown:
        num_bytes = sum(_size(path) for path in unknown)
        progress.begin(
            f"reading {format_bytes(num_bytes)} of {unknown[0].parent}, to know the model again",
            num_bytes,
        )
    return {path: digest or digests.of(path, progress.advance) for path, digest in found.items()}


def _read_for_certain(
    packing: Packing, digests: Digests, used: Mapping[Path, str], progress: PackProgress
) -> dict[Path, Stamp]:
    """How the files are that are about to be packed, after a look whether they are what they say.

    A damaged file in the hub's cache would else be packed under the name of the right one.
    """
    unknown_bytes = sum(_size(path) for path in used if digests.known(path) is None)
    if unknown_bytes:
        progress.begin(
            f"reading {format_bytes(unknown_bytes)} of {packing.source_paths[0].parent}, to check "
            "them",
            unknown_bytes,
        )
    stamps = {path: _stamp(path) for path in used}
    for path, digest in used.items():
        found = digests.of(path, progress.advance)
        if found != digest:
            raise CheckpointError(
                f"{path} is not what it should be: its SHA-256 is {found}, and should be {digest}; "
                "remove it and get it again"
            )
    return stamps


def _refuse_changed(stamps: Mapping[Path, Stamp]) -> None:
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise CheckpointError(
                f"{path} was changed while it was packed; start again when it is complete"
            )


def _stamp(path: Path) -> Stamp:
    try:
        return stamp_of(path)
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror or error}") from error


def _size(path: Path) -> int:
    return _stamp(path)[0]


def _model(source: Source) -> str:
    directory = Path(source.name).expanduser()
    return str(directory.resolve()) if directory.is_dir() else source.name


def _revision(source: Source) -> str | None:
    """The commit of a model in the hub's cache."""
    directory = source.directory
    at_hub = directory is not None and directory.parent.name == "snapshots"
    return directory.name if directory is not None and at_hub else None


def _found(packing: Packing, directory: Path) -> dict[str, FileTensor]:
    """Where the parts of every layer's matrices lie."""
    written: dict[str, FileTensor] = {}
    for new in packing.files:
        there = read_header(directory / new.name)
        for matrix in new.matrices:
            for part in matrix.parts:
                tensor = there[part.name]
                assert (tensor.dtype, tensor.shape) == (part.dtype, part.shape), (part, tensor)
                written[part.name] = tensor
    return {name: written[same] for name, same in packing.names.items()}


def _write(file: IO[bytes], new: NewFile, form: Compressed, advance: Callable[[int], None]) -> None:
    """Header and data of a new file."""
    from flexport.engine.pack_rows import packed_rows  # and torch

    file.write(new.layout.header)
    for matrix in new.matrices:
        row_bytes = matrix.source_bytes // matrix.layout.shape[0]
        for num_rows, pieces in packed_rows(matrix.stored, matrix.layout, form):
            for part, (line, data) in zip(matrix.parts, pieces, strict=True):
                line_bytes = part.num_bytes // part.shape[0]
                file.seek(new.layout.offsets_bytes[part.name] + line * line_bytes)
                file.write(data)
            advance(num_rows * row_bytes)
