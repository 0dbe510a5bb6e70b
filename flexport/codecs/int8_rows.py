"""int8 by rows: a byte a number, and one float32 scale for each row of a matrix.

A value is number * scale, numbers within -127 .. 127: symmetric, and one scale for all that is
added up, so that a product can be worked out in whole numbers and scaled once.

Dimension key: R rows, D features.
"""

from __future__ import annotations

from torch import Tensor

from flexport.codecs.quantise import quantise_rows

__all__ = ["decode", "encode"]

_AT_ONCE = 1 << 20
"""Values decoded in one go, so that what lies between stays in the processor's caches."""


def encode(values_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (R, D) and scales (R). Raises ValueError if a value is not finite."""
    return quantise_rows(values_RD)


def decode(codes_RD: Tensor, scales_R: Tensor, out_RD: Tensor) -> Tensor:
    """Fill out_RD, of any float dtype, with what numbers and scales stand for; returns it."""
    rows_at_once = max(1, _AT_ONCE // codes_RD.shape[1])
    scales_R1 = scales_R.to(out_RD.dtype)[:, None]
    for at in range(0, len(codes_RD), rows_at_once):
        rows = slice(at, at + rows_at_once)
        out_RD[rows].copy_(codes_RD[rows]).mul_(scales_R1[rows])
    return out_RD
