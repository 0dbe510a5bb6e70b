"""What flexport packs of a model, in which form, and into which new files.

The matrices of the decoder layers are packed where their form has something to gain; all else
stays in the checkpoint's own files, and is read in place. Torch is not imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexport.checkpoint.packed import FORMAT_VERSION
from flexport.checkpoint.writer import PAGE_BYTES, FileLayout, NewTensor
from flexport.codecs.compressed import Compressed
from flexport.codecs.layout import Layout
from flexport.engine.source import Source
from flexport.engine.stored import Stored, find, packed_layout, packed_name
from flexport.errors import PolicyError
from flexport.models.tensors import owned_tensors
from flexport.records import FileTensor
from flexport.units import format_bytes, format_count

__all__ = ["Matrix", "NewFile", "Packing", "left_as_they_are", "plan_packing", "refuse_packed"]


def refuse_packed(source: Source, form: Compressed) -> None:
    """Raises PolicyError for a checkpoint that has come packed."""
    if source.packings:
        raise PolicyError(
            f"--compress-weights {form.name}: the weights of {source.name} are packed already, as "
            f"{source.packings[0].name}, and run as they are; leave --compress-weights out"
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
    def bits_per_weight(self) -> float:
        """In the files, their headers included."""
        return 8 * self.num_bytes / self.num_values

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
        return (
            f"{format_count(self.num_values)} weights as {self.form.name}: "
            f"{format_bytes(self.source_bytes)} become {format_bytes(self.num_bytes)}, "
            f"{self.bits_per_weight:.2f} bits a weight"
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
            layout = packed_layout(tensor, form)
            if layout is None:
                continue
            stored = find(tensor, files).placed(files)
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


def left_as_they_are(source: Source, form: Compressed) -> dict[str, tuple[int, int]]:
    """Tensors of a checkpoint that are not packed, by the reason: how many, and their bytes."""
    assert source.files is not None, source.name
    spec = source.spec
    found: dict[str, tuple[int, int]] = {}
    for layer in range(spec.num_schedule_layers):
        for tensor in owned_tensors(spec, layer):
            if not 1 <= layer <= spec.num_layers:
                reason = _ENDS
            elif packed_layout(tensor, form) is not None:
                continue
            else:
                reason = _REASONS.get(tensor.kind, _TOO_SMALL)
            number, num_bytes = found.get(reason, (0, 0))
            stored = find(tensor, source.files).placed(source.files)
            found[reason] = (number + 1, num_bytes + stored.num_bytes)
    return found


_ENDS = "embedding and head: their errors reach every token, and tables are read by rows"
_TOO_SMALL = "matrices of shapes that would hardly become smaller"
_REASONS = {
    "norm": "norms and biases: vectors",
    "bias": "norms and biases: vectors",
    "operand": "routers and the like: what they decide or join needs every bit",
}
"""By the kind of tensor."""
