"""How a model's tensors lie in files: as plain numbers, or packed in several parts.

Packed bytes are read in place like any other's, rest and travel packed, and become numbers where
they are computed with: once a layer and sweep.

Torch is not imported here, so that a checkpoint can be looked at, and refused, at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexport.codecs.compressed import Compressed
from flexport.codecs.layout import Format, Layout, Part
from flexport.models.tensors import TensorSpec
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
    num_cuts: int | None = None
    """It can be cut into so many pieces only; None: into rows."""
    num_parts: int = 1
    """It lies in so many places."""
    whole_bytes: int = 0
    """Of disk_bytes, those that all of its rows need: each piece of it has them again."""

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
    format: Format | Compressed | None = None
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

    @property
    def whole_bytes(self) -> int:
        """Of these, what all of its rows need."""
        parts = zip(self.layout.parts, self.files, strict=True)
        return sum(file.num_bytes for part, file in parts if not part.rows_per_line)

    def placed(self, files: Mapping[str, FileTensor]) -> Stored:
        """The same, with where its parts lie."""
        own = tuple(_own(files[part.name], part, self.slice_of) for part in self.layout.parts)
        return replace(self, files=own)


def find(
    tensor: TensorSpec,
    names: Mapping[str, FileTensor],
    packings: Sequence[Format] = (),
    form: Compressed | None = None,
) -> Stored:
    """How these tensors of files store `tensor`; as plain numbers if they have none of it.

    `packings` are the checkpoint's own; of several forms that have tensors of these names it is the
    first whose shapes fit. `form` is that in which flexport has packed matrices, if it has.
    """
    made = None if form is None else packed_layout(tensor, form)
    if made is not None and made.parts[0].name in names:
        return Stored(tensor=tensor, layout=made, format=form)
    found: list[Stored] = []
    if tensor.kind in ("matrix", "operand"):
        rows, features = tensor.shape
        for packing in packings:
            for name in tensor.names:
                layout = packing.layout(name, (rows, features), names, transposed=tensor.transposed)
                if layout is not None:
                    found.append(
                        Stored(
                            tensor=tensor, layout=layout, format=packing, slice_of=tensor.slice_of
                        )
                    )
    if found:
        return next((stored for stored in found if _fits(stored, names)), found[0])
    name = next((name for name in tensor.names if name in names), tensor.names[0])
    plain = Part(name=name, shape=tensor.shape)
    layout = Layout(parts=(plain,), shape=tensor.shape, transposed=tensor.transposed)
    return Stored(tensor=tensor, layout=layout, slice_of=tensor.slice_of)


def packed_name(tensor: TensorSpec) -> str:
    """What flexport calls a tensor that it has packed, in its own files."""
    suffix = f".{tensor.slice_of[0]}" if tensor.slice_of is not None else ""
    return tensor.names[0] + suffix


def packed_layout(tensor: TensorSpec, form: Compressed) -> Layout | None:
    """How a tensor lies that flexport packs; None if it stays as it is."""
    if tensor.kind != "matrix" or tensor.slot in _ENDS:
        return None
    rows, features = tensor.shape[::-1] if tensor.transposed else tensor.shape
    if not form.fits((rows, features)):
        return None
    return form.layout(packed_name(tensor), (rows, features))


def _fits(stored: Stored, names: Mapping[str, FileTensor]) -> bool:
    return all(
        part.name in names
        and names[part.name].shape == in_file(part, stored.tensor)
        and (part.dtypes is None or names[part.name].dtype in part.dtypes)
        for part in stored.layout.parts
    )


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
