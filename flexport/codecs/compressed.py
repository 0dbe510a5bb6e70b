"""The packed forms that flexport makes itself: what `--compress-weights` asks for.

Torch is not imported here; a form's kernels are, when something is encoded or decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from flexport.backend import PackedMatrix
from flexport.codecs.layout import Layout, Part
from flexport.policy import WEIGHT_CODECS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Compressed", "Int4Tiles", "Int8Rows", "compressed"]

TILE_ROWS = 64
"""Rows of a tile of four-bit numbers."""


class Compressed(Protocol):
    """A packed form that flexport can make."""

    @property
    def name(self) -> str:
        """One of `policy.WEIGHT_CODECS`."""

    @property
    def matrix_form(self) -> Literal["int8", "int4"]:
        """What a `PackedMatrix` calls it, whatever its parameters."""

    @property
    def key(self) -> str:
        """The form and its parameters as a file name may have it; changes when the bytes would."""

    def layout(self, name: str, shape: tuple[int, int]) -> Layout:
        """How a matrix (features out, features in) lies in files, where it is called `name`."""

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """As `layout.Format` has it."""

    def encode(self, values_RD: Tensor) -> tuple[Tensor, ...]:
        """The parts of some rows of a matrix, as `layout` has them, on the same device.

        Rows come by whole cuts, but for the last ones of a matrix. Raises ValueError if a value is
        not finite.
        """

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a matrix (features out, features in) is worth packing."""

    def matrix(self, parts: Sequence[Tensor], shape: tuple[int, int]) -> PackedMatrix:
        """Some of its rows, for a backend that multiplies with it as it is."""


def compressed(codec: str) -> Compressed | None:
    """The form of one of `policy.WEIGHT_CODECS`; that of "none" is None."""
    assert codec in WEIGHT_CODECS, codec
    name, _, group = codec.partition(":")
    if name == "none":
        return None
    return Int8Rows() if name == "int8" else Int4Tiles(group=int(group or 64))


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """A byte a number, and one scale a row; see `codecs.quantise`."""

    name = "int8"
    matrix_form: ClassVar[Literal["int8"]] = "int8"
    key = "int8-1"
    unused = ()

    def layout(self, name: str, shape: tuple[int, int]) -> Layout:
        """Numbers and scales."""
        rows, features = shape
        return Layout(
            parts=(
                Part(name=f"{name}.int8", shape=(rows, features), dtypes=frozenset({"int8"})),
                Part(name=f"{name}.scales", shape=(rows,), dtypes=frozenset({"float32"})),
            ),
            shape=(rows, features),
        )

    def encode(self, values_RD: Tensor) -> tuple[Tensor, ...]:
        """See `Compressed`."""
        from flexport.codecs.quantise import quantise_rows

        return quantise_rows(values_RD)

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs.quantise import dequantise_rows

        codes_RD, scales_R = parts
        return dequantise_rows(codes_RD, scales_R, out_RD)

    def fits(self, shape: tuple[int, int]) -> bool:
        """Of less than 64 features, a row's scale would be more than a sixteenth."""
        return shape[1] >= 64

    def matrix(self, parts: Sequence[Tensor], shape: tuple[int, int]) -> PackedMatrix:
        """See `Compressed`."""
        return PackedMatrix(form=self.matrix_form, parts=tuple(parts), shape=shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Tiles:
    """Four bits a number, a scale and a zero for each group of features; see `codecs.int4_tiles`."""

    group: int = 64
    """Neighbouring features of a row that share a scale."""
    matrix_form: ClassVar[Literal["int4"]] = "int4"
    unused = ()

    @property
    def name(self) -> str:
        """With the group where it is not the usual one."""
        return "int4" if self.group == 64 else f"int4:{self.group}"

    @property
    def key(self) -> str:
        """See `Compressed`."""
        return f"int4-{self.group}-1"

    def layout(self, name: str, shape: tuple[int, int]) -> Layout:
        """Tiles of rows; the last one may have rows too many."""
        rows, features = shape
        tiles, groups = -(-rows // TILE_ROWS), -(-features // self.group)
        return Layout(
            parts=(
                Part(
                    name=f"{name}.int4",
                    shape=(tiles, features, TILE_ROWS // 2),
                    dtypes=frozenset({"uint8"}),
                    rows_per_line=TILE_ROWS,
                ),
                Part(
                    name=f"{name}.scales",
                    shape=(tiles, groups, TILE_ROWS, 2),
                    dtypes=frozenset({"bfloat16"}),
                    rows_per_line=TILE_ROWS,
                ),
            ),
            shape=(rows, features),
        )

    def encode(self, values_RD: Tensor) -> tuple[Tensor, ...]:
        """See `Compressed`."""
        from flexport.codecs import int4_tiles

        return int4_tiles.encode(values_RD, self.group)

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs import int4_tiles

        codes, scales = parts
        return int4_tiles.decode(codes, scales, out_RD, self.group)

    def fits(self, shape: tuple[int, int]) -> bool:
        """Of fewer rows than a tile's half, or less than a group, little would be saved."""
        rows, features = shape
        padded = math.ceil(rows / TILE_ROWS) * TILE_ROWS
        return padded <= 1.25 * rows and features >= self.group

    def matrix(self, parts: Sequence[Tensor], shape: tuple[int, int]) -> PackedMatrix:
        """See `Compressed`."""
        return PackedMatrix(
            form=self.matrix_form, parts=tuple(parts), shape=shape, group=self.group
        )
