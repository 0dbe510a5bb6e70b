"""FP8: matrices of float8_e4m3fn numbers with float scales, one a block or one for all.

A value is number * scale, worked out in float32 and rounded once to the dtype asked for. With
blocks, the scale of the number in row r and column d is scales[r // rows][d // columns]; where a
side is no multiple of the block's, the last blocks are smaller. Source: arXiv:2412.19437, section
3.3.2, whose weights have blocks of 128 x 128; its checkpoint calls the scales weight_scale_inv.

Dimension key: R rows, D features, Q and P blocks along rows and features.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_blocks", "decode_tensor", "scale_rows"]

_AT_ONCE = 1 << 20
"""Values decoded in one go: what lies between takes some megabytes, and kernels are worth a call."""


def scale_rows(begin: int, end: int, block_rows: int) -> tuple[int, int]:
    """The rows of scales that rows begin .. end-1 of a matrix need: first, and one past the last."""
    return begin // block_rows, -(-end // block_rows)


def decode_blocks(
    packed_RD: Tensor,
    scales_QP: Tensor,
    out_RD: Tensor,
    *,
    block: tuple[int, int],
    begin: int = 0,
) -> Tensor:
    """Fill out_RD, of any float dtype, with what some rows of a matrix stand for; returns it.

    `begin` is the number of the first of them in the matrix; scales_QP are the rows of scales that
    `scale_rows` names. `block` is its rows and columns.
    """
    (num_rows, size), (block_rows, block_columns) = packed_RD.shape, block
    first, last = scale_rows(begin, begin + num_rows, block_rows)
    expected = (last - first, -(-size // block_columns))
    assert scales_QP.shape == expected, (scales_QP.shape, expected)
    skipped = begin - first * block_rows
    scales_RP = scales_QP.repeat_interleave(block_rows, 0)[skipped : skipped + num_rows]
    rows_at_once = max(1, _AT_ONCE // size)
    for at in range(0, num_rows, rows_at_once):
        rows = slice(at, at + rows_at_once)
        scales_RD = scales_RP[rows].repeat_interleave(block_columns, 1)[:, :size]
        torch.mul(packed_RD[rows].float(), scales_RD.float(), out=out_RD[rows])
    return out_RD


def decode_tensor(packed_RD: Tensor, scale: Tensor, out_RD: Tensor) -> Tensor:
    """The same with one scale for all rows."""
    assert scale.numel() == 1, scale.shape
    num_rows, size = packed_RD.shape
    return decode_blocks(packed_RD, scale.view(1, 1), out_RD, block=(num_rows, size))
