"""Weights in a few bits, without looking at what passes through them.

*Groups*: `group` neighbouring features of a row share a scale and a zero, both bfloat16. A value is
zero + (code - middle) * scale, with codes of `bits` bits and middle = 2 ** (bits - 1): 4 bits and
groups of 64 take 4.5 bits a weight. It is the convention of torch's kernels for packed weights
(aten::_weight_int4pack_mm). The last group of a row may be shorter. Codes are chosen after scale and
zero are rounded, so each is the nearest there is. How scale and zero are found is in `affine`.

*Rows*: a row has one float32 scale, and a value is code * scale with an int8 code from -127 to 127,
for units that multiply such matrices. The scale is the row's greatest size / 127, so no value is
off by more than half a step. (A search for a better one takes off 2 to 3 % of the squared error of
rows of 4096 weights, and nothing that a matrix product would show.)

Products of code and scale are exact in float32, so that of the sum is a decoded value's only
rounding but the last, to the dtype asked for, and it is the same with and without fused operations.

Any range of whole rows can be quantised or decoded by itself, and gives the same bits as in the whole
matrix. All is worked out in float32, some rows at a time, whatever the dtype that comes in.

Dimension key: R rows, D features, P groups a row, N groups of some rows, G values a group, 1 a
group's or a row's own number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexport.codecs import affine

__all__ = [
    "MAX_GROUP",
    "Method",
    "Quantised",
    "dequantise_groups",
    "dequantise_rows",
    "quantise_groups",
    "quantise_rows",
]

Method = Literal["refined", "min-max"]
"""How scale and zero are found: by a search for the least squared error, or from a group's ends."""

MAX_GROUP = 1024
"""Weights in a group at most. Sums of codes and of their squares are exact up to here."""

_AT_ONCE = 1 << 19
"""Weights worked on in one go: buffers take some megabytes, and kernels are worth a call."""

_ROW_TOP = 127
"""The greatest int8 code of a row; -128 stays unused, so that the codes are symmetric."""

_ROW_SCALES = (
    torch.finfo(torch.float32).tiny,
    torch.finfo(torch.float32).max / _ROW_TOP * (1 - 2.0**-22),
)
"""The least scale, so that a row of zeros has one, and the greatest, so that no level is infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A matrix in groups: codes are uint8, scales and zeros bfloat16."""

    codes_RD: Tensor
    scales_RP: Tensor
    zeros_RP: Tensor
    bits: int
    group: int

    def __post_init__(self) -> None:
        num_rows, size = self.codes_RD.shape
        expected = (num_rows, -(-size // self.group))
        assert self.scales_RP.shape == expected, (self.scales_RP.shape, expected)
        assert self.zeros_RP.shape == expected, (self.zeros_RP.shape, expected)


@dataclass(frozen=True, slots=True)
class _Part:
    """Groups of one size that lie side by side in some rows."""

    rows: slice
    columns: slice
    groups: slice
    size: int

    def grouped(self, matrix_RD: Tensor) -> Tensor:
        """Its weights, one group after the other along the last axis but one. A view."""
        some_RD = matrix_RD[self.rows, self.columns]
        return some_RD.view(len(some_RD), -1, self.size)

    def own(self, numbers_RP: Tensor) -> Tensor:
        """Its groups' own numbers, each to be broadcast over its group. A view."""
        return numbers_RP[self.rows, self.groups, None]


def quantise_groups(
    values_RD: Tensor, *, bits: int, group: int = 64, method: Method = "refined"
) -> Quantised:
    """Codes, scales and zeros of a matrix of any float dtype.

    "refined" has at most the squared error of "min-max" in any group, and about 18 % less on the
    whole at 4 bits. Raises ValueError if a weight is not finite, or for bits or a group that can't be.
    """
    _check(values_RD, bits, group)
    levels = affine.Levels(bits)
    num_rows, size = values_RD.shape
    codes_RD = values_RD.new_empty(values_RD.shape, dtype=torch.uint8)
    scales_RP = values_RD.new_empty((num_rows, -(-size // group)), dtype=torch.bfloat16)
    zeros_RP = torch.empty_like(scales_RP)
    most = min(num_rows, _rows_at_once(size)) * size
    buffers = torch.empty(3, most, device=values_RD.device)
    for part in _parts(num_rows, size, group):
        some_RPG = part.grouped(values_RD)
        used = buffers[:, : some_RPG.numel()].view(3, -1, part.size)
        values_NG, places_NG, codes_NG = used
        values_NG.view(some_RPG.shape).copy_(some_RPG)
        low_N1 = values_NG.amin(1, keepdim=True)
        high_N1 = values_NG.amax(1, keepdim=True)
        _refuse_infinite(low_N1, high_N1, part.rows.start, some_RPG.shape[1])
        work = affine.Work(places_NG, codes_NG)
        if method == "refined":
            grid = affine.refined(values_NG, low_N1, high_N1, levels, work)
        else:
            grid = affine.between(low_N1, high_N1, levels)
        affine.nearest(values_NG, grid, levels, work).add_(levels.middle)
        part.grouped(codes_RD).copy_(codes_NG.view(some_RPG.shape))
        part.own(scales_RP).copy_(grid.scale_N1.view(*some_RPG.shape[:2], 1))
        part.own(zeros_RP).copy_(grid.zero_N1.view(*some_RPG.shape[:2], 1))
    return Quantised(
        codes_RD=codes_RD, scales_RP=scales_RP, zeros_RP=zeros_RP, bits=bits, group=group
    )


def dequantise_groups(quantised: Quantised, out_RD: Tensor) -> Tensor:
    """Fill out_RD, of any float dtype, with what codes, scales and zeros stand for; returns it."""
    codes_RD, middle = quantised.codes_RD, affine.Levels(quantised.bits).middle
    assert out_RD.shape == codes_RD.shape, (out_RD.shape, codes_RD.shape)
    num_rows, size = codes_RD.shape
    for part in _parts(num_rows, size, quantised.group):
        some_RPG = part.grouped(codes_RD).float().sub_(middle)
        some_RPG.mul_(part.own(quantised.scales_RP)).add_(part.own(quantised.zeros_RP))
        part.grouped(out_RD).copy_(some_RPG)
    return out_RD


def quantise_rows(values_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8, and a float32 scale for each row of a matrix of any float dtype.

    Raises ValueError if a weight is not finite.
    """
    _check_dtype(values_RD)
    codes_RD = values_RD.new_empty(values_RD.shape, dtype=torch.int8)
    scales_R = values_RD.new_empty(len(values_RD), dtype=torch.float32)
    for rows in _row_ranges(*values_RD.shape):
        some_RD = values_RD[rows].float()
        low_R1, high_R1 = some_RD.amin(1, keepdim=True), some_RD.amax(1, keepdim=True)
        _refuse_infinite(low_R1, high_R1, rows.start, 1)
        scale_R1 = torch.maximum(high_R1, -low_R1).div_(_ROW_TOP).clamp_(*_ROW_SCALES)
        codes_RD[rows] = some_RD.div(scale_R1).round_()
        scales_R[rows] = scale_R1[:, 0]
    return codes_RD, scales_R


def dequantise_rows(codes_RD: Tensor, scales_R: Tensor, out_RD: Tensor) -> Tensor:
    """Fill out_RD, of any float dtype, with what codes and scales stand for; returns it."""
    assert out_RD.shape == codes_RD.shape, (out_RD.shape, codes_RD.shape)
    assert scales_R.shape == codes_RD.shape[:1], (scales_R.shape, codes_RD.shape)
    for rows in _row_ranges(*codes_RD.shape):
        out_RD[rows] = codes_RD[rows].float().mul_(scales_R[rows, None])
    return out_RD


def _row_ranges(num_rows: int, size: int) -> Iterator[slice]:
    """Rows that are worked on together."""
    step = _rows_at_once(size)
    for begin in range(0, num_rows if size else 0, step):
        yield slice(begin, min(begin + step, num_rows))


def _rows_at_once(size: int) -> int:
    return max(1, _AT_ONCE // max(1, size))


def _parts(num_rows: int, size: int, group: int) -> Iterator[_Part]:
    """For some rows after the other, their whole groups, and then the shorter ones at their ends."""
    whole, rest = divmod(size, group)
    for rows in _row_ranges(num_rows, size):
        if whole:
            yield _Part(rows, slice(0, whole * group), slice(0, whole), group)
        if rest:
            yield _Part(rows, slice(whole * group, size), slice(whole, whole + 1), rest)


def _check(values_RD: Tensor, bits: int, group: int) -> None:
    _check_dtype(values_RD)
    if not 2 <= bits <= 8:
        raise ValueError(f"weights can be quantised to 2 to 8 bits, not to {bits}")
    if not 2 <= group <= MAX_GROUP:
        raise ValueError(f"a group can have 2 to {MAX_GROUP} weights, not {group}")


def _check_dtype(values_RD: Tensor) -> None:
    if not values_RD.is_floating_point():
        raise ValueError(f"only float weights can be quantised; these are {values_RD.dtype}")


def _refuse_infinite(low_N1: Tensor, high_N1: Tensor, first_row: int, groups_a_row: int) -> None:
    """Least and greatest are finite only if all between is: neither passes over a NaN."""
    is_finite_N1 = low_N1.isfinite() & high_N1.isfinite()
    if not is_finite_N1.all():
        row = first_row + int(is_finite_N1.logical_not().nonzero()[0, 0]) // groups_a_row
        raise ValueError(f"only finite weights can be quantised; row {row} has a NaN or infinity")
