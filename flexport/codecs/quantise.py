"""Which numbers, scales and zeros stand for weights with the least error, without calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Quantised", "quantise_groups"]


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A value is (code - 2 ** (bits - 1)) * scale + zero."""

    codes_RD: Tensor
    scales_RG: Tensor
    zeros_RG: Tensor


def quantise_groups(values_RD: Tensor, *, bits: int, group: int) -> Quantised:
    """Codes (uint8), scales and zeros (bfloat16), by each group's minimum and maximum."""
    num_rows, size = values_RD.shape
    groups = -(-size // group)
    padded = functional.pad(values_RD.float(), (0, groups * group - size), mode="replicate")
    wide = padded.view(num_rows, groups, group)
    low, high = wide.aminmax(dim=-1)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise ValueError("a value is not finite")
    scales = ((high - low) / (2**bits - 1)).bfloat16()
    zeros = (low + scales.float() * 2 ** (bits - 1)).bfloat16()
    factor = torch.where(scales > 0, 1 / scales.float(), 0)[..., None]
    codes = ((wide - zeros.float()[..., None]) * factor).round_().add_(2 ** (bits - 1))
    codes = codes.clamp_(0, 2**bits - 1).to(torch.uint8).view(num_rows, -1)[:, :size]
    return Quantised(codes, scales, zeros)
