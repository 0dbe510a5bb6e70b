"""Floats of eight and of four bits, and powers of two of eight, as float32.

float8_e4m3fn has a sign, four bits of exponent with a bias of 7 and three of fraction; all seven
of these set are not a number. e2m1 has a sign, two bits of exponent with a bias of 1 and one of
fraction: 0, 0.5, 1, 1.5, 2, 3, 4 or 6, and the same below 0; two are in a byte, the first in its
lower half. e8m0 is a byte s that stands for 2 ** (s - 127); 255 is not a number. Sources:
arXiv:2209.05433; OCP Microscaling Formats (MX) Specification v1.0, sections 5.2 to 5.4.

Where their bits are put in a float16's places, it is the number but for a power of two, also below
the least exponent. A processor turns float16 into float32 nine times as fast as torch turns
float8, which it does bit by bit.

Dimension key: R rows, D features, B bytes, Q and P blocks.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["fill_float4", "fill_float8", "powers_of_two"]


def fill_float8(numbers_RD: Tensor, out_RD: Tensor) -> None:
    """Fill out_RD, in float32, with float8_e4m3fn numbers."""
    # Seven bits to the left, the sign is in its place, and once more where the exponent begins.
    bits_RD = numbers_RD.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(~0x4000)
    # Only from all ones is there a carry to this place; with it set, they are no number again.
    bits_RD |= (bits_RD & 0x3FFF).add_(0x80).bitwise_and_(0x4000)
    out_RD.copy_(bits_RD.view(torch.float16)).mul_(2.0 ** (15 - 7))


def fill_float4(bytes_RB: Tensor, out_RD: Tensor) -> None:
    """Fill out_RD, in float32, with e2m1 numbers."""
    pairs_RB = bytes_RB.int()
    pairs_RB |= pairs_RB << 12
    pairs_RB = (pairs_RB & 0x00070007).mul_(1 << 9).bitwise_or_((pairs_RB & 0x00080008) << 12)
    out_RD.copy_(pairs_RB.view(torch.float16)).mul_(2.0 ** (15 - 1))


def powers_of_two(bytes_QP: Tensor) -> Tensor:
    """What e8m0 scales stand for, in float32."""
    # As an index, a uint8 would be taken for a mask.
    return _powers(bytes_QP.device)[bytes_QP.int()]


@functools.cache
def _powers(device: torch.device) -> Tensor:
    return torch.tensor([2.0 ** (s - 127) for s in range(255)] + [math.nan]).to(device)
