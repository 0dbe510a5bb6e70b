"""Pages of a cache that is kept in 8 or 4 bits a value: their bytes, and the way in and out.

Groups are counted from the prompt's end and hold columns of one row only, so what becomes of a
row's keys and values depends on nothing but itself. Columns before a row's start repeat its first
token where they share a group with it, and leave the group as it would be without them.

Dimension key: B bytes, N rows, n some of them, K key/value heads, G columns of a page, L tokens of
a prompt, E features of a head; R lines, P groups of a line and C bytes of a group are those of
`codecs.plane`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flexport.codecs.cache_groups import AT_ONCE, decode, encode
from flexport.codecs.plane import Plane
from flexport.store.direct_io import align_up

__all__ = ["PackedShape", "ValueLines", "pack", "pack_prompt_page", "unpack"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLines:
    """Where a page of several rows has each column's values: one line of bytes a row and head."""

    first_byte: int
    row_bytes: int
    line_bytes: int
    """Lines of a head lie end to end, and so do a row's heads."""
    width: int
    """Lines of a head: the page's columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedShape:
    """One layer's pages in packed form: keys, then values; or once, what is both."""

    planes: tuple[Plane, ...]

    def page_bytes(self, num_rows: int, width: int) -> int:
        """Bytes of a page."""
        return num_rows * sum(self._row_bytes(width))

    def row_ranges(self, begin: int, end: int, num_rows: int, width: int) -> list[tuple[int, int]]:
        """(first byte, number of bytes) of rows begin .. end-1 of a page, plane by plane."""
        ranges, at = [], 0
        for row_bytes in self._row_bytes(width):
            ranges.append((at + begin * row_bytes, (end - begin) * row_bytes))
            at += num_rows * row_bytes
        return ranges

    def views(self, bytes_B: Tensor, num_rows: int, width: int) -> tuple[Tensor, ...]:
        """A page's bytes as planes, each (N, K, R, P, C) and uint8; nothing is copied."""
        views, at = [], 0
        for plane, row_bytes in zip(self.planes, self._row_bytes(width), strict=True):
            _, lines, groups, group_bytes = shape = plane.shape(width)
            line_bytes = groups * group_bytes
            strides = (row_bytes, lines * line_bytes, line_bytes, group_bytes, 1)
            views.append(bytes_B[at:].as_strided((num_rows, *shape), strides))
            at += num_rows * row_bytes
        return tuple(views)

    def keys(self, bytes_B: Tensor, num_rows: int, width: int) -> tuple[Tensor, ...]:
        """The same of a page's first plane alone, which is all that there need be of it."""
        return PackedShape(planes=self.planes[:1]).views(bytes_B, num_rows, width)

    def value_lines(self, num_rows: int, width: int) -> ValueLines:
        """Where values lie, which are packed along the features: column by column."""
        _, _, groups, group_bytes = self.planes[-1].shape(width)
        key_bytes, value_bytes = self._row_bytes(width)
        return ValueLines(
            first_byte=num_rows * key_bytes,
            row_bytes=value_bytes,
            line_bytes=groups * group_bytes,
            width=width,
        )

    def _row_bytes(self, width: int) -> list[int]:
        """What one row has of each plane, in whole pages of memory."""
        return [align_up(plane.num_bytes(width)) for plane in self.planes]


def pack(
    shape: PackedShape,
    exact_NKGE: Sequence[Tensor],
    packed_NKRPC: Sequence[Tensor],
) -> None:
    """Fill a packed page with keys and values; where these are the same, the keys do."""
    for plane, exact, packed in zip(shape.planes, exact_NKGE, packed_NKRPC, strict=False):
        encode(_lines(plane, exact), packed, plane.groups)


def unpack(
    shape: PackedShape,
    packed_NKRPC: Sequence[Tensor],
    exact_NKGE: Sequence[Tensor],
    planes: slice = slice(None),
) -> None:
    """Fill an exact page, or some planes of it, with what was packed."""
    all_planes = list(zip(shape.planes, exact_NKGE, packed_NKRPC, strict=False))
    for plane, exact, packed in all_planes[planes]:
        decode(packed, _lines(plane, exact), plane.groups)


def pack_prompt_page(
    shape: PackedShape,
    exact_nKLE: Sequence[Tensor],
    packed_nKRPC: Sequence[Tensor],
    first: int,
    width: int,
) -> None:
    """Fill a page of some rows of L tokens with their columns first .. first + width - 1.

    `first` counts from the rows' first token, and may be below 0. A page that ends before it is
    all zeros.
    """
    last = first + width
    if last <= 0:
        for packed in packed_nKRPC:
            packed.zero_()
        return
    num_rows, num_heads, _, head_dim = exact_nKLE[0].shape
    at_once = max(1, AT_ONCE // (num_heads * width * head_dim))
    for begin in range(0, num_rows, at_once):
        rows = slice(begin, begin + at_once)
        columns = [_columns(exact[rows], first, last) for exact in exact_nKLE]
        pack(shape, columns, [packed[rows] for packed in packed_nKRPC])


def _columns(exact_nKLE: Tensor, first: int, last: int) -> Tensor:
    """Columns of rows; before the first token is that token."""
    if first >= 0:
        return exact_nKLE[:, :, first:last]
    num_rows, num_heads, _, head_dim = exact_nKLE.shape
    out_nKGE = exact_nKLE.new_empty(num_rows, num_heads, last - first, head_dim)
    out_nKGE[:, :, -first:] = exact_nKLE[:, :, :last]
    out_nKGE[:, :, :-first] = exact_nKLE[:, :, :1]
    return out_nKGE


def _lines(plane: Plane, exact_NKGE: Tensor) -> Tensor:
    """With the dimension last that groups are cut from."""
    return exact_NKGE.mT if plane.along == "tokens" else exact_NKGE
