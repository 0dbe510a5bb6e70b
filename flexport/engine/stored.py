"""How a model's tensors lie in files: as plain numbers, or packed in several parts.

Packed bytes are read in place like any other's, rest and travel packed, and become numbers where
they are computed with: once a layer and sweep.

Torch is not imported here, so that a checkpoint can be looked at, and refused, at once.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from flexport.codecs.compressed import Compressed
from flexport.codecs.layout import Format, Layout, Part
from flexport.models.spec import TensorSpec
from flexport.records import FileTensor

__all__ = ["Stored", "TensorSize", "find", "in_file", "packed_layout", "packed_name"]

_ENDS = frozenset({"head.weight", "project_in.weight", "project_out.weight"})
"""Matrices of the first and the last layer, which every token's error would pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSize:
    """What a tensor takes where."""

    disk_bytes: int
    near_bytes: int
    """Where it stays near the device: decoded, or packed as it is."""
    scratch_bytes: int = 0
    """Of a packed one, the numbers that it becomes wherever it is computed with."""
    rows_per_cut: int = 1
    """It can be cut between so many rows only."""

    @classmethod
    def plain(cls, tensor: TensorSpec, file_item_bytes: int, item_bytes: int) -> TensorSize:
        """That of numbers of so many bytes each, in the file and when they are computed with."""
        return cls(
            disk_bytes=tensor.num_values * file_item_bytes,
            near_bytes=tensor.num_values * item_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor as it is in a checkpoint, and where once its files are known."""

    tensor: TensorSpec
    layout: Layout
    format: Format | None = None
    """None: plain numbers."""
    files: tuple[FileTensor, ...] = ()
    """Of each part."""
    slice_of: tuple[int, int] | None = None
    """(i, n): its parts are the i-th of the n slices of the file's tensors."""

    @property
    def is_packed(self) -> bool:
        """Whether its bytes have to be decoded to be computed with."""
        return self.format is not None

    @property
    def is_exact(self) -> bool:
        """Whether it is computed with in the dtype of its file."""
        return self.tensor.exact and not self.is_packed

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers, in the order in which they lie."""
        return self.layout.shape

    @property
    def transposed(self) -> bool:
        """A matrix that lies as (features in, features out)."""
        return self.layout.transposed

    @property
    def num_bytes(self) -> int:
        """All its parts."""
        return sum(file.num_bytes for file in self.files)

    def placed(self, files: Mapping[str, FileTensor]) -> Stored:
        """The same, with where its parts lie."""
        own = tuple(_own(files[part.name], part, self.slice_of) for part in self.layout.parts)
        return replace(self, files=own)


def find(
    tensor: TensorSpec,
    names: Container[str],
    packing: Format | None,
    form: Compressed | None = None,
) -> Stored:
    """How files with these names store `tensor`; as plain numbers if they have none of it.

    `packing` is the checkpoint's own, `form` that in which flexport has packed it, if it has.
    """
    if form is not None and (made := packed_layout(tensor, form, names)) is not None:
        return Stored(tensor=tensor, layout=made, format=form)
    if packing is not None and tensor.kind in ("matrix", "operand"):
        rows, features = tensor.shape
        for name in tensor.names:
            layout = packing.layout(name, (rows, features), names, transposed=tensor.transposed)
            if layout is not None:
                return Stored(
                    tensor=tensor, layout=layout, format=packing, slice_of=tensor.slice_of
                )
    name = next((name for name in tensor.names if name in names), tensor.names[0])
    plain = Part(name=name, shape=tensor.shape)
    layout = Layout(parts=(plain,), shape=tensor.shape, transposed=tensor.transposed)
    return Stored(tensor=tensor, layout=layout, slice_of=tensor.slice_of)


def packed_name(tensor: TensorSpec) -> str:
    """What flexport calls a tensor that it has packed, in its own files."""
    suffix = f".{tensor.slice_of[0]}" if tensor.slice_of is not None else ""
    return tensor.names[0] + suffix


class _Every:
    """The names of files that are still to be made."""

    def __contains__(self, name: object) -> bool:
        return True


EVERY = _Every()


def packed_layout(
    tensor: TensorSpec, form: Compressed, names: Container[str] = EVERY
) -> Layout | None:
    """How a tensor lies that flexport packs, in files with these names; None if it stays as it is."""
    if tensor.kind != "matrix" or tensor.slot in _ENDS:
        return None
    first, second = tensor.shape
    if not form.fits((second, first) if tensor.transposed else (first, second)):
        return None
    return form.layout(packed_name(tensor), (first, second), names, transposed=tensor.transposed)


def in_file(part: Part, tensor: TensorSpec) -> tuple[int, ...]:
    """The shape of the file's tensor, of which the part may be a slice or which may be its row."""
    if tensor.row is not None:
        return part.shape[1:]
    return part.shape if tensor.slice_of is None else (tensor.slice_of[1], *part.shape)


def _own(file: FileTensor, part: Part, slice_of: tuple[int, int] | None) -> FileTensor:
    """The part's bytes, which may be a slice of the file's tensor, in the part's own shape."""
    index, num_slices = slice_of or (0, 1)
    num_bytes = file.num_bytes // num_slices
    return replace(
        file,
        offset_bytes=file.offset_bytes + index * num_bytes,
        num_bytes=num_bytes,
        shape=part.shape,
    )
