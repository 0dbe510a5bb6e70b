"""Groups of values in 8 or 4 bits: value = code * scale + minimum, worked out in float32.

A group is its codes, 0 .. 2^bits - 1, then its scale and its minimum. Codes of 4 bits are two a
byte, the first in its lower half, and the two numbers are float16; with 8 bits they are float32.
A row of groups side by side is a row of FBGEMM's quantised tables, as
torch.ops.quantized.embedding_bag_4bit_prepack and embedding_bag_byte_prepack make them.

The scale is (max - minimum) / (2^bits - 1), and codes are chosen for the two numbers as they are
kept. To float16 these are rounded down, so that nothing that is decoded lies above its group's
maximum: what fits float16 before, fits it after. The error of a value is at most scale / 2; in 4
bits 15 roundings of the scale come on top, each 2^-10 of it or 2^-24, and a minimum far from 0 is
rounded by 2^-10 of itself, so that its group's range is that much wider. What is below -65504 becomes
that in 4 bits, and a range beyond 15 * 65504 ends there. A group whose values are all the same has
scale 0.

Dimension key: L lines (all leading axes), S values of a line, P groups of a line, V values of a
group, B bytes of a group, C codes of a group, which are V or somewhat more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexport.codecs.plane import Groups

__all__ = ["AT_ONCE", "decode", "encode"]

AT_ONCE = 1 << 20
"""Values in one go: what lies between takes some megabytes, and kernels are worth a call."""

_HAS_TABLES = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether this build of torch reads such tables, in host memory: six times faster than the operations
below, 6 values a ns and core in place of 1. Of 8 bits it rounds once where these round twice."""

_unpack_4bit = torch.ops.quantized.embedding_bag_4bit_unpack
_unpack_8bit = torch.ops.quantized.embedding_bag_byte_unpack

_NIBBLES = 0x0F0F

_BELOW_ZERO = -0x7FFF
"""The bits of the float16 next to 0 on the other side."""


def encode(values_LS: Tensor, packed_LPB: Tensor, groups: Groups) -> None:
    """Fill packed_LPB, uint8, with values of any float dtype. Both may have strides."""
    _check(values_LS, packed_LPB, groups)
    for values, packed in _parts(values_LS, packed_LPB):
        _encode(values.unflatten(-1, (-1, groups.values)), packed, groups)


def decode(packed_LPB: Tensor, out_LS: Tensor, groups: Groups) -> None:
    """Fill out_LS, of any float dtype, with what was packed. Both may have strides."""
    _check(out_LS, packed_LPB, groups)
    for out, packed in _parts(out_LS, packed_LPB):
        values_LPV = _decode(packed, groups)
        out.copy_(values_LPV.flatten(-2))


def _check(values_LS: Tensor, packed_LPB: Tensor, groups: Groups) -> None:
    *lines, size = values_LS.shape
    expected = (*lines, size // groups.values, groups.group_bytes)
    assert size % groups.values == 0 and packed_LPB.shape == expected, (packed_LPB.shape, expected)


def _parts(values: Tensor, packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same lines of both, as many as go at once; cut along the first axis that has to be."""
    line = values[0]
    if values.dim() <= 2 or line.numel() <= AT_ONCE:
        at_once = max(1, AT_ONCE // max(1, line.numel()))
        yield from zip(values.split(at_once), packed.split(at_once), strict=True)
        return
    for own, packed_own in zip(values, packed, strict=True):
        yield from _parts(own, packed_own)


def _encode(values_LPV: Tensor, packed_LPB: Tensor, groups: Groups) -> None:
    dtype = _number_dtype(groups)
    wide_LPV = values_LPV.new_empty(values_LPV.shape, dtype=torch.float32).copy_(values_LPV)
    levels = 2**groups.bits - 1
    minimum_LP1 = _rounded_down(wide_LPV.amin(-1, keepdim=True), dtype)
    range_LP1 = (
        wide_LPV.amax(-1, keepdim=True).sub_(minimum_LP1).clamp_(0, torch.finfo(torch.float32).max)
    )
    scale_LP1 = _rounded_down(range_LP1.div_(levels), dtype)
    wide_LPV.sub_(minimum_LP1)
    # Where there is no scale, what is left is below half a step of any.
    wide_LPV.div_(scale_LP1.masked_fill(scale_LP1 <= 0, torch.inf)).round_().clamp_(0, levels)
    codes_LPV = wide_LPV.to(torch.int16)  # from here to bytes is faster than all at once
    codes_LPC = packed_LPB[..., : groups.code_bytes]
    if groups.bits == 4:
        _pack_nibbles(codes_LPV, codes_LPC)
    else:
        codes_LPC[..., : groups.values] = codes_LPV
        codes_LPC[..., groups.values :] = 0
    numbers_LP2 = packed_LPB[..., groups.code_bytes :].view(dtype)
    numbers_LP2[..., :1] = scale_LP1.to(dtype)
    numbers_LP2[..., 1:] = minimum_LP1.to(dtype)


def _pack_nibbles(codes_LPV: Tensor, packed_LPC: Tensor) -> None:
    *lines, num_values = codes_LPV.shape
    num_codes = 2 * packed_LPC.shape[-1]  # of which some may be nobody's
    codes_LPC = codes_LPV.new_zeros(*lines, num_codes, dtype=torch.uint8)
    codes_LPC[..., :num_values] = codes_LPV
    # Two neighbours are one number, of which the first is the lower byte.
    pairs = codes_LPC.view(torch.int16)
    packed_LPC.copy_(pairs.bitwise_or_(pairs >> 4).bitwise_and_(0xFF))


def _decode(packed_LPB: Tensor, groups: Groups) -> Tensor:
    """The values, in float32: for half precision that is both exact and faster."""
    if _HAS_TABLES and packed_LPB.device.type == "cpu" and groups.num_codes == groups.values:
        unpack = _unpack_4bit if groups.bits == 4 else _unpack_8bit
        rows_RB = packed_LPB.reshape(-1, groups.group_bytes).contiguous()
        values_RV: Tensor = unpack(rows_RB)
        return values_RV.view(*packed_LPB.shape[:-1], groups.values)
    codes_LPC = packed_LPB[..., : groups.code_bytes]
    if groups.bits == 4:
        pairs = codes_LPC.to(torch.int16)
        pairs.bitwise_or_(pairs << 4).bitwise_and_(_NIBBLES)
        codes_LPC = pairs.view(torch.uint8)
    values_LPV = codes_LPC[..., : groups.values].to(torch.float32)
    numbers_LP2 = packed_LPB[..., groups.code_bytes :].view(_number_dtype(groups)).float()
    return values_LPV.mul_(numbers_LP2[..., :1]).add_(numbers_LP2[..., 1:])


def _number_dtype(groups: Groups) -> torch.dtype:
    return torch.float16 if groups.number_bytes == 2 else torch.float32


def _rounded_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of a dtype that is not above x, in float32; the least for all below it."""
    if dtype is torch.float32:
        return x
    most = torch.finfo(dtype).max
    near = x.clamp(-most, most).to(dtype)
    # The bits of a float16 count up from 0 as it grows, and from -0 as it falls.
    bits, wide = near.view(torch.int16), near.float()
    below = torch.where(wide > 0, bits - 1, torch.where(wide < 0, bits + 1, _BELOW_ZERO))
    return torch.where(wide > x.clamp_min(-most), below.view(dtype).float(), wide)
