"""(number - zero) * scale, where neighbouring numbers share scale and zero.

Worked out in float32 and rounded once to the dtype asked for, number by number: any rows come out
as in the whole matrix. Numbers are whole ones of up to 8 bits, so that no difference is rounded, or
float8. A share is a stretch of rows (GPTQ and AWQ, whose rows are features in), of a row's features
(compressed-tensors) or a block of both (FP8), or any features that an index gives to it (act order).

Dimension key: R rows, D features, G groups of rows, Q and P blocks along rows and features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["Fill", "by_features", "by_rows"]

Fill = Callable[[slice, Tensor], None]
"""Writes the numbers of some rows, counted from the first that is decoded, to a float32 tensor."""

_AT_ONCE = 1 << 20
"""Values decoded in one go, so that what lies between stays in the processor's caches."""


def by_rows(
    fill: Fill,
    scales_GD: Tensor,
    zeros_GD: Tensor,
    out_RD: Tensor,
    *,
    group: int,
    unit: int = 1,
    index_R: Tensor | None = None,
) -> Tensor:
    """Fill out_RD, of any float dtype, each row by the scales and zeros of its group; returns it.

    Row r is of group r // group, or index_R[r]. The first row begins a group, and a piece that is
    filled begins at a multiple of `unit` rows.
    """
    scales_GD, zeros_GD = scales_GD.float(), zeros_GD.float()
    num_rows = len(out_RD)
    if index_R is None and len(scales_GD) > 1 and group % unit:
        index_R = torch.arange(num_rows, device=out_RD.device) // group
    at_once = _rows_at_once(out_RD, unit)
    if index_R is not None:
        for rows in _pieces(0, num_rows, at_once):
            of_R = index_R[rows]
            with_RD = _in_float(out_RD, rows)
            fill(rows, with_RD)
            with_RD.sub_(zeros_GD.index_select(0, of_R)).mul_(scales_GD.index_select(0, of_R))
            _put(with_RD, out_RD, rows)
        return out_RD
    for rows, groups in _whole_groups(num_rows, group, at_once):
        with_RD = _in_float(out_RD, rows)
        fill(rows, with_RD)
        of_GRD = with_RD.unflatten(0, (groups.stop - groups.start, -1))
        of_GRD.sub_(zeros_GD[groups, None]).mul_(scales_GD[groups, None])
        _put(with_RD, out_RD, rows)
    return out_RD


def by_features(
    fill: Fill,
    scales_QP: Tensor,
    zeros_QP: Tensor | None,
    out_RD: Tensor,
    *,
    block: tuple[int, int],
    index_D: Tensor | None = None,
) -> Tensor:
    """Fill out_RD, of any float dtype, each block by its scale and zero; returns it.

    Feature d of row r is of block (r // rows, d // columns), or has the column index_D[d]. The first
    row begins a block.
    """
    (num_rows, size), (block_rows, _) = out_RD.shape, block
    for rows in _pieces(0, num_rows, _rows_at_once(out_RD)):
        with_RD = _in_float(out_RD, rows)
        fill(rows, with_RD)
        first, last = rows.start // block_rows, -(-rows.stop // block_rows)
        before = rows.start - first * block_rows
        for values_QP, apply in ((zeros_QP, Tensor.sub_), (scales_QP, Tensor.mul_)):
            if values_QP is None:
                continue
            values_RP = values_QP[first:last].float()
            if block_rows > 1:
                values_RP = values_RP.repeat_interleave(block_rows, 0)
                values_RP = values_RP[before : before + len(with_RD)]
            if index_D is not None:
                apply(with_RD, values_RP.index_select(1, index_D))
                continue
            for columns, groups in _whole_groups(size, block[1], size):
                of_RPD = with_RD[:, columns].unflatten(1, (groups.stop - groups.start, -1))
                apply(of_RPD, values_RP[:, groups, None])
        _put(with_RD, out_RD, rows)
    return out_RD


def _rows_at_once(out_RD: Tensor, unit: int = 1) -> int:
    return max(1, _AT_ONCE // out_RD.shape[1] // unit) * unit


def _pieces(begin: int, end: int, at_once: int) -> Iterator[slice]:
    return (slice(at, min(at + at_once, end)) for at in range(begin, end, at_once))


def _whole_groups(size: int, group: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Stretches of whole groups, or of parts of one, with these groups; the last may be shorter."""
    whole = size // group
    several = max(1, at_once // group)
    for groups in _pieces(0, whole, several):
        begin, end = groups.start * group, groups.stop * group
        for rows in _pieces(begin, end, max(at_once, 1) if several == 1 else end - begin):
            yield rows, groups
    for rows in _pieces(whole * group, size, at_once):
        yield rows, slice(whole, whole + 1)


def _in_float(out_RD: Tensor, rows: slice) -> Tensor:
    """Memory for these rows in float32: their own, if that is what they are in."""
    own_RD = out_RD[rows]
    return (
        own_RD if own_RD.dtype == torch.float32 else torch.empty_like(own_RD, dtype=torch.float32)
    )


def _put(with_RD: Tensor, out_RD: Tensor, rows: slice) -> None:
    if out_RD.dtype != torch.float32:
        out_RD[rows].copy_(with_RD)
