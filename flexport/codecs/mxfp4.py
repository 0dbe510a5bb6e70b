"""MXFP4: numbers of four bits, 32 of which share a power of two.

A number is e2m1 (a sign, two bits of exponent, one of fraction): 0, 0.5, 1, 1.5, 2, 3, 4 or 6, and
the same below 0. The scale is e8m0, a byte s that stands for 2 ** (s - 127); 255 is not a number,
and then none of its 32 values is. Source: OCP Microscaling Formats (MX) Specification v1.0,
sections 5.2 to 5.4. Checkpoints have two numbers a byte, the first in its lower half.

The product of the two is exact in bfloat16 and float32, unless it is beyond what they can hold.

Dimension key: R rows (all leading axes), P groups a row, B the 16 bytes of a group, G its 32
values, D features (32 P of them).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["GROUP_BYTES", "GROUP_VALUES", "decode"]

GROUP_VALUES = 32
"""Values that share a scale."""

GROUP_BYTES = GROUP_VALUES // 2

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_AT_ONCE = 1 << 20
"""Values decoded in one go: what lies between takes some megabytes, and kernels are worth a call."""


def decode(blocks_RPB: Tensor, scales_RP: Tensor, out_RD: Tensor) -> Tensor:
    """Fill out_RD, contiguous and of any float dtype, with what blocks and scales stand for.

    Both are uint8. Returns out_RD.
    """
    *rows, num_groups = scales_RP.shape
    assert blocks_RPB.shape == (*rows, num_groups, GROUP_BYTES), (blocks_RPB.shape, scales_RP.shape)
    assert out_RD.shape == (*rows, num_groups * GROUP_VALUES), (out_RD.shape, scales_RP.shape)
    pairs, powers = _tables(out_RD.dtype, out_RD.device)
    groups_at_once = _AT_ONCE // GROUP_VALUES
    parts = zip(
        blocks_RPB.reshape(-1, GROUP_BYTES).split(groups_at_once),
        scales_RP.reshape(-1, 1).split(groups_at_once),
        out_RD.view(-1, GROUP_VALUES).split(groups_at_once),
        strict=True,
    )
    for bytes_PB, scales_P1, out_PG in parts:
        # As an index, a uint8 would be taken for a mask.
        numbers_PG = pairs[bytes_PB.int()].view(out_PG.shape)
        torch.mul(numbers_PG, powers[scales_P1.int()], out=out_PG)
    return out_RD


@functools.cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two numbers of each byte, (256, 2), and what each scale stands for."""
    pairs = [(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)]
    powers = [2.0 ** (scale - 127) for scale in range(255)] + [math.nan]
    return torch.tensor(pairs, dtype=dtype).to(device), torch.tensor(powers).to(device)
