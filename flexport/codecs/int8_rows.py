"""int8 by rows: a byte a number, and one float32 scale for each row of a matrix.

A value is number * scale, numbers within -127 .. 127: symmetric, and one scale for all that is
added up, so that a product can be worked out in whole numbers and scaled once.

Dimension key: R rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode", "encode"]

_AT_ONCE = 1 << 20
"""Values decoded in one go, so that what lies between stays in the processor's caches."""


def encode(values_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (R, D) and scales (R). Raises ValueError if a value is not finite."""
    wide_RD = values_RD.float()
    scales_R = wide_RD.abs().amax(1) / 127
    if not scales_R.isfinite().all():
        raise ValueError("a value is not finite")
    factors_R1 = torch.where(scales_R > 0, 1 / scales_R, 0)[:, None]
    codes_RD = (wide_RD * factors_R1).round_().clamp_(-127, 127).to(torch.int8)
    return codes_RD, scales_R


def decode(codes_RD: Tensor, scales_R: Tensor, out_RD: Tensor) -> Tensor:
    """Fill out_RD, of any float dtype, with what numbers and scales stand for; returns it."""
    rows_at_once = max(1, _AT_ONCE // codes_RD.shape[1])
    scales_R1 = scales_R.to(out_RD.dtype)[:, None]
    for at in range(0, len(codes_RD), rows_at_once):
        rows = slice(at, at + rows_at_once)
        out_RD[rows].copy_(codes_RD[rows]).mul_(scales_R1[rows])
    return out_RD
