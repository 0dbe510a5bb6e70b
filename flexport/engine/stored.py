"""How a model's tensors lie in files: as plain numbers, or packed in two parts.

Some checkpoints are published packed. Their bytes are read in place like any other's, rest and
travel packed, and become numbers where they are computed with: once a layer and sweep.

Torch is not imported here, so that a checkpoint can be looked at, and refused, at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from flexport.errors import UnsupportedModel
from flexport.models.spec import TensorSpec
from flexport.records import FileTensor

__all__ = ["Packing", "Part", "Stored", "TensorSize", "find", "read_packing"]


MXFP4_VALUES = 32
"""Numbers that share a scale, two of them a byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What a checkpoint's config says of packed tensors."""

    kind: Literal["none", "mxfp4", "fp8"] = "none"
    block: tuple[int, int] = (1, 1)
    """Of FP8: rows and columns that share a scale."""


PLAIN = Packing()


def read_packing(config: Mapping[str, Any]) -> Packing:
    """The packing of a checkpoint; raises UnsupportedModel, naming what flexport can't decode."""
    asked = config.get("quantization_config")
    if not asked:
        return PLAIN
    method = asked.get("quant_method")
    if method == "mxfp4":
        return Packing(kind="mxfp4")
    if method == "fp8" and asked.get("weight_block_size"):
        rows, columns = asked["weight_block_size"]
        return Packing(kind="fp8", block=(rows, columns))
    raise UnsupportedModel(
        f"quantization_config: quant_method is {method!r}; flexport can run plain weights, mxfp4, "
        "and fp8 with a weight_block_size"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSize:
    """What a tensor takes where."""

    disk_bytes: int
    near_bytes: int
    """Where it stays near the device: decoded, or packed as it is."""
    scratch_bytes: int = 0
    """Of a packed one, the numbers that it becomes wherever it is computed with."""

    @classmethod
    def plain(cls, tensor: TensorSpec, file_item_bytes: int, item_bytes: int) -> TensorSize:
        """That of numbers of so many bytes each, in the file and when they are computed with."""
        return cls(
            disk_bytes=tensor.num_values * file_item_bytes,
            near_bytes=tensor.num_values * item_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the file's tensors that a tensor consists of."""

    name: str
    shape: tuple[int, ...]
    """Without the dimension of the tensor's `slice_of`."""
    dtypes: frozenset[str] | None = None
    """What it may be stored as; None is any float."""
    rows_per_line: int = 1
    """Rows of the tensor that one line of the part belongs to."""

    def in_file(self, tensor: TensorSpec) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        if tensor.row is not None:
            return self.shape[1:]
        return self.shape if tensor.slice_of is None else (tensor.slice_of[1], *self.shape)

    def lines(self, begin: int, end: int) -> tuple[int, int]:
        """The part's lines for rows begin .. end-1."""
        return begin // self.rows_per_line, -(-end // self.rows_per_line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor as it is in a checkpoint: its parts, and their files once these are known."""

    tensor: TensorSpec
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    """Of the numbers, in the order in which they lie."""
    packing: Packing = PLAIN
    files: tuple[FileTensor, ...] = ()

    @property
    def is_packed(self) -> bool:
        """Whether its bytes have to be decoded to be computed with."""
        return self.packing.kind != "none"

    @property
    def is_exact(self) -> bool:
        """Whether it is computed with in the dtype of its file."""
        return self.tensor.exact and not self.is_packed

    @property
    def transposed(self) -> bool:
        """A matrix that lies as (features in, features out)."""
        return self.tensor.transposed and self.packing.kind != "mxfp4"

    @property
    def rows_per_cut(self) -> int:
        """It can be cut between so many rows only."""
        return max(part.rows_per_line for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """All its parts."""
        return sum(file.num_bytes for file in self.files)

    def placed(self, files: Mapping[str, FileTensor]) -> Stored:
        """The same, with where its parts lie."""
        return replace(
            self, files=tuple(_own(files[part.name], part, self.tensor) for part in self.parts)
        )


def find(tensor: TensorSpec, names: Mapping[str, FileTensor], packing: Packing) -> Stored:
    """How a checkpoint with these tensors stores `tensor`; as plain numbers if it has none of it."""
    rows, *rest = tensor.shape
    for name in tensor.names:
        if packing.kind == "mxfp4" and f"{name}_blocks" in names and tensor.kind == "matrix":
            rows, size = tensor.shape[::-1] if tensor.transposed else tensor.shape
            groups, uint8 = size // MXFP4_VALUES, frozenset({"uint8"})
            return Stored(
                tensor=tensor,
                parts=(
                    Part(
                        name=f"{name}_blocks",
                        shape=(rows, groups, MXFP4_VALUES // 2),
                        dtypes=uint8,
                    ),
                    Part(name=f"{name}_scales", shape=(rows, groups), dtypes=uint8),
                ),
                shape=(rows, size),
                packing=packing,
            )
        scales = f"{name}_scale_inv"
        if packing.kind == "fp8" and scales in names and tensor.kind in ("matrix", "operand"):
            block_rows, block_columns = packing.block
            lines = (-(-rows // block_rows), -(-rest[0] // block_columns))
            return Stored(
                tensor=tensor,
                parts=(
                    Part(name=name, shape=tensor.shape, dtypes=frozenset({"float8_e4m3fn"})),
                    Part(name=scales, shape=lines, rows_per_line=block_rows),
                ),
                shape=tensor.shape,
                packing=packing,
            )
        if name in names:
            break
    else:
        name = tensor.names[0]
    return Stored(tensor=tensor, parts=(Part(name=name, shape=tensor.shape),), shape=tensor.shape)


def _own(file: FileTensor, part: Part, tensor: TensorSpec) -> FileTensor:
    """The part's bytes, which may be a slice of the file's tensor, in the part's own shape."""
    index, num_slices = tensor.slice_of or (0, 1)
    num_bytes = file.num_bytes // num_slices
    return replace(
        file,
        offset_bytes=file.offset_bytes + index * num_bytes,
        num_bytes=num_bytes,
        shape=part.shape,
    )
