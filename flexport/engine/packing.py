"""Weights that flexport packs itself: which, how, and the files that they stream from.

The matrices of the decoder layers are packed where their form has something to gain; all else
stays in the checkpoint's own files. It is done once, into the cache (`checkpoint.packed`), a file
a layer. A chunk of rows at a time is in memory, whatever the model's size: rows do not depend on
each other, so how they are cut changes no bit.

Dimension key: R rows (features out), D features in, B bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import flexport
from flexport.checkpoint.digests import Digests, Stamp, hub_digest, stamp_of
from flexport.checkpoint.header import read_header
from flexport.checkpoint.packed import (
    FORMAT_VERSION,
    Entry,
    Manifest,
    PackedCache,
    require_room,
)
from flexport.checkpoint.writer import PAGE_BYTES, FileLayout, NewTensor, forget, new_file
from flexport.codecs.compressed import Compressed
from flexport.codecs.layout import Layout
from flexport.engine.source import Source
from flexport.engine.stored import Stored, find
from flexport.errors import CheckpointError, PolicyError, StorageError
from flexport.models.spec import ModelSpec, TensorSpec, owned_tensors
from flexport.records import FileTensor
from flexport.units import format_bytes, format_count

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Matrix",
    "NewFile",
    "PackProgress",
    "Packing",
    "Quiet",
    "pack_into",
    "packed_files",
    "packed_layout",
    "packed_name",
    "plan_packing",
    "refuse_packed",
]

CHUNK_BYTES = 16 << 20
"""Of the checkpoint, read and packed at once. Quantising takes about ten times as much memory."""

_log = logging.getLogger(__name__)


class PackProgress(Protocol):
    """Who is told how it goes."""

    def begin(self, what: str, total_bytes: int) -> None:
        """Something starts that takes a while: reading or packing so many bytes."""

    def advance(self, num_bytes: int) -> None:
        """So many of them are done."""

    def say(self, text: str) -> None:
        """Something that people should know."""


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


# ---- what is packed


class _Every:
    """The names of a checkpoint that has every form of every matrix."""

    def __contains__(self, name: object) -> bool:
        return True


def packed_name(tensor: TensorSpec) -> str:
    """What a tensor is called in flexport's own files; its parts' names begin so."""
    name = tensor.names[0]
    return name if tensor.slice_of is None else f"{name}.{tensor.slice_of[0]}"


def packed_layout(
    spec: ModelSpec, layer: int, tensor: TensorSpec, form: Compressed
) -> Layout | None:
    """How a tensor of a layer of the schedule will lie; None if it stays as it is."""
    if tensor.kind != "matrix" or not 1 <= layer <= spec.num_layers:
        return None
    rows, features = tensor.shape[::-1] if tensor.transposed else tensor.shape
    if not form.fits((rows, features)):
        return None
    first, second = tensor.shape
    layout = form.layout(
        packed_name(tensor), (first, second), _Every(), transposed=tensor.transposed
    )
    assert layout is not None, (form.name, tensor)
    return layout


def refuse_packed(source: Source, form: Compressed) -> None:
    """Raises PolicyError for a checkpoint that has come packed."""
    if source.packing is not None:
        raise PolicyError(
            f"--compress-weights {form.name}: the weights of {source.name} are packed already, as "
            f"{source.packing.name}, and run as they are; leave --compress-weights out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix to pack."""

    name: str
    stored: Stored
    """Where its numbers lie."""
    layout: Layout
    """How it will lie."""

    @property
    def source_bytes(self) -> int:
        """What it takes in the checkpoint."""
        return self.stored.num_bytes

    @property
    def parts(self) -> tuple[NewTensor, ...]:
        """Its parts, as a file has them."""
        assert all(part.dtypes for part in self.layout.parts), self.layout
        return tuple(
            NewTensor(name=part.name, dtype=dtype, shape=part.shape)
            for part in self.layout.parts
            for dtype in part.dtypes or ()
        )


class NewFile:
    """One file of packed matrices."""

    def __init__(self, name: str, matrices: tuple[Matrix, ...]) -> None:
        self.name = name
        self.matrices = matrices
        parts = [part for matrix in matrices for part in matrix.parts]
        # What is whole pages comes first, so that all of it starts on a page; and in the order of
        # the layer, so that what is used together is read together.
        self.layout = FileLayout(sorted(parts, key=lambda part: part.num_bytes % PAGE_BYTES != 0))

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self.layout.num_bytes

    @property
    def source_bytes(self) -> int:
        """What its matrices take in the checkpoint."""
        return sum(matrix.source_bytes for matrix in self.matrices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """All that is to be packed of a model."""

    form: Compressed
    files: tuple[NewFile, ...]
    names: Mapping[str, str]
    """Of every part that a layer asks for, its name in the files; layers of made-up weights may have
    one matrix."""

    @property
    def matrices(self) -> Iterator[Matrix]:
        """All, file by file."""
        return (matrix for file in self.files for matrix in file.matrices)

    @property
    def num_values(self) -> int:
        """Weights."""
        return sum(matrix.stored.tensor.num_values for matrix in self.matrices)

    @property
    def source_bytes(self) -> int:
        """What they take in the checkpoint."""
        return sum(file.source_bytes for file in self.files)

    @property
    def num_bytes(self) -> int:
        """What the files take."""
        return sum(file.num_bytes for file in self.files)

    @property
    def source_paths(self) -> list[Path]:
        """The files that hold any of it."""
        return sorted({matrix.stored.files[0].path for matrix in self.matrices})

    def content(self, digests: Mapping[Path, str]) -> str:
        """A digest of what is packed, given those of the files that it lies in."""
        table = [
            [
                matrix.name,
                digests[file.path],
                file.offset_bytes,
                file.num_bytes,
                file.dtype,
                matrix.stored.shape,
                matrix.stored.transposed,
            ]
            for matrix in self.matrices
            for file in matrix.stored.files
        ]
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()

    def key(self, content: str) -> str:
        """The name of its entry in the cache."""
        text = json.dumps([FORMAT_VERSION, self.form.key, content])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        bits = 8 * self.num_bytes / max(1, self.num_values)
        return (
            f"{format_count(self.num_values)} weights as {self.form.name}: "
            f"{format_bytes(self.source_bytes)} become {format_bytes(self.num_bytes)}, "
            f"{bits:.2f} bits a weight"
        )


def plan_packing(source: Source, files: Mapping[str, FileTensor], form: Compressed) -> Packing:
    """What is packed of a model whose tensors lie in `files`, in which form and which new files.

    Raises PolicyError for a checkpoint that has come packed, or has nothing to pack.
    """
    refuse_packed(source, form)
    spec = source.spec
    written: dict[tuple[Any, ...], Layout] = {}
    names: dict[str, str] = {}
    new_files = []
    for layer in range(1, spec.num_layers + 1):
        matrices = []
        for tensor in owned_tensors(spec, layer):
            layout = packed_layout(spec, layer, tensor, form)
            if layout is None:
                continue
            stored = find(tensor, files, None).placed(files)
            (file,) = stored.files
            place = (file.path, file.offset_bytes, tensor.shape, tensor.transposed)
            if place not in written:
                written[place] = layout
                matrices.append(Matrix(name=packed_name(tensor), stored=stored, layout=layout))
            for part, same in zip(layout.parts, written[place].parts, strict=True):
                names[part.name] = same.name
        if matrices:
            new_files.append(NewFile(f"layer-{layer:05}.safetensors", tuple(matrices)))
    if not new_files:
        raise PolicyError(
            f"--compress-weights {form.name}: {source.name} has no matrix that is large enough for "
            "it; leave --compress-weights out"
        )
    return Packing(form=form, files=tuple(new_files), names=names)


# ---- the files


def packed_files(
    source: Source,
    files: Mapping[str, FileTensor],
    form: Compressed,
    cache: PackedCache,
    *,
    progress: PackProgress | None = None,
    overwrite: bool = False,
) -> dict[str, FileTensor]:
    """Every part of every packed matrix, from the cache; packed now if it is not there.

    With `overwrite` it is packed anew. Raises PolicyError, DoesNotFit, CheckpointError,
    StorageError and UsageError.
    """
    progress = progress or Quiet()
    packing = plan_packing(source, files, form)
    digests = _digests(packing, cache.digests, progress)
    content = packing.content(digests)
    entry = cache.entry(packing.key(content))
    manifest = None if overwrite else entry.manifest()
    if manifest is None:
        with entry.locked(
            lambda: progress.say(
                f"another process packs these weights in {entry.directory}; waiting for it"
            )
        ):
            manifest = None if overwrite else entry.manifest()
            if manifest is None:
                blank = Manifest(
                    model=_model(source),
                    revision=_revision(source),
                    content=content,
                    codec=form.key,
                    num_values=packing.num_values,
                    source_bytes=packing.source_bytes,
                    flexport=flexport.__version__,
                    created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                )
                manifest = _fill(entry, packing, blank, cache.digests, digests, progress)
    unknown_bytes = entry.unknown_bytes(manifest)
    if unknown_bytes:
        progress.begin(
            f"checking {format_bytes(unknown_bytes)} of packed weights in {entry.directory}",
            unknown_bytes,
        )
    entry.check(manifest, progress.advance)
    return _found(packing, entry.directory)


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
) -> Manifest:
    """Write what an interrupted run has not written yet; returns the manifest."""
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
    progress.begin(
        f"packing {packing}, in {entry.directory}{again}", sum(new.source_bytes for new in todo)
    )
    manifest = replace(blank, files=kept)
    for new in todo:

        def write(file: IO[bytes], new: NewFile = new) -> None:
            _write(file, new, packing.form, progress.advance)
            _refuse_changed(stamps)

        manifest = entry.add(manifest, new.name, new.num_bytes, write)
    entry.complete(manifest)
    return manifest


def _digests(packing: Packing, digests: Digests, progress: PackProgress) -> dict[Path, str]:
    """Of the files that hold what is packed; those of the hub's cache are called by theirs."""
    found = {path: hub_digest(path) or digests.known(path) for path in packing.source_paths}
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
    stamps = {path: stamp_of(path) for path in used}
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
        if stamp_of(path) != stamp:
            raise CheckpointError(
                f"{path} was changed while it was packed; start again when it is complete"
            )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror or error}") from error


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


# ---- packing


def _write(file: IO[bytes], new: NewFile, form: Compressed, advance: Callable[[int], None]) -> None:
    """Header and data of one new file."""
    file.write(new.layout.header)
    for matrix in new.matrices:
        layout = matrix.layout
        for begin, end, values_RD in _chunks(matrix):
            try:
                encoded = form.encode(values_RD)
            except ValueError as error:
                raise CheckpointError(
                    f"{matrix.name} in {matrix.stored.files[0].path} can't be compressed: {error}; "
                    "get the file again, or use --compress-weights none if it is meant to be so"
                ) from error
            for part, to, tensor in zip(layout.parts, matrix.parts, encoded, strict=True):
                first, last = part.lines(begin, end)
                assert tensor.shape == (last - first, *part.shape[1:]), (part, tensor.shape)
                line_bytes = to.num_bytes // part.shape[0]
                file.seek(new.layout.offsets_bytes[part.name] + first * line_bytes)
                file.write(_as_bytes(tensor))
            advance(matrix.source_bytes * (end - begin) // layout.shape[0])


def _chunks(matrix: Matrix) -> Iterator[tuple[int, int, Tensor]]:
    """A matrix's numbers, some rows at a time: the first, one past the last, and they.

    Raises StorageError.
    """
    import torch

    from flexport.torch_ops import as_tensor, torch_dtype

    (source,) = matrix.stored.files
    rows, features = matrix.layout.shape
    row_bytes = source.num_bytes // rows
    cut = matrix.layout.rows_per_cut
    at_once = max(1, CHUNK_BYTES // row_bytes // cut) * cut
    dtype = torch_dtype(source.dtype)
    bytes_B = torch.empty(min(at_once, rows) * row_bytes, dtype=torch.uint8)
    with _reading(source) as read_into:
        turned = matrix.stored.transposed and at_once < rows
        if turned:
            # Each chunk takes a little of every line: the page cache should have them all.
            for at in range(0, source.num_bytes, len(bytes_B)):
                read_into(bytes_B[: source.num_bytes - at], at)
        for begin in range(0, rows, at_once):
            end = min(begin + at_once, rows)
            own_B = bytes_B[: (end - begin) * row_bytes]
            if not matrix.stored.transposed:
                read_into(own_B, begin * row_bytes)
                yield begin, end, as_tensor(own_B, 0, (end - begin, features), dtype)
                continue
            if turned:
                item = dtype.itemsize
                for line, line_B in enumerate(own_B.chunk(features)):
                    read_into(line_B, (line * rows + begin) * item)
            else:
                read_into(own_B, 0)
            values_DR = as_tensor(own_B, 0, (features, end - begin), dtype)
            yield begin, end, values_DR.T.contiguous()


@contextmanager
def _reading(tensor: FileTensor) -> Iterator[Callable[[Tensor, int], None]]:
    """Fills flat bytes from an offset in a tensor on; raises StorageError.

    Afterwards the page cache has room for something else.
    """

    def explain(error: OSError | EOFError) -> StorageError:
        words = getattr(error, "strerror", None) or error
        return StorageError(f"can't read {tensor.name} in {tensor.path}: {words}")

    try:
        file = tensor.path.open("rb", buffering=0)
    except OSError as error:
        raise explain(error) from error
    with file:

        def read_into(bytes_B: Tensor, offset_bytes: int) -> None:
            left = bytes_B.numpy().data
            try:
                file.seek(tensor.offset_bytes + offset_bytes)
                while left:
                    num_bytes = file.readinto(left)
                    if not num_bytes:
                        raise EOFError("the file has become shorter")
                    left = left[num_bytes:]
            except (OSError, EOFError) as error:
                raise explain(error) from error

        yield read_into
        forget(file, tensor.offset_bytes, tensor.num_bytes)


def _as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().data
