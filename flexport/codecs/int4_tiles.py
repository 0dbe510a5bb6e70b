"""int4 in tiles: four bits a number, and for each group of features of a row a scale and a zero.

A value is (number - 8) * scale + zero, numbers within 0 .. 15, scale and zero in bfloat16: what
torch's own four-bit kernels take. Numbers lie in tiles of 64 rows, feature by feature: byte i of a
feature holds row i of the tile in its lower half and row i + 32 in its upper half. That is how the
kernel for processors with 512-bit registers reads them; decoded, they come out feature by feature.
A matrix whose rows are no multiple of 64 ends in a tile with rows of zeros, which belong to nothing.

Dimension key: R rows, D features, B tiles, C bytes of a feature in a tile (32), I rows of a tile
(64), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from flexport.codecs.quantise import quantise_groups

__all__ = ["TILE_ROWS", "decode", "encode"]

TILE_ROWS = 64

_AT_ONCE = 16 << 20
"""Values decoded in one go, with as many bytes beside them: a few large steps. To stay in the
processor's caches would take so many small ones that their starting costs more than is gained."""


def encode(values_RD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Numbers, uint8 (B, D, C), and scales with zeros, bfloat16 (B, G, I, 2).

    Raises ValueError if a value is not finite.
    """
    quantised = quantise_groups(values_RD, bits=4, group=group)
    tiles = -(-len(values_RD) // TILE_ROWS)
    padding = tiles * TILE_ROWS - len(values_RD)
    codes_BID = functional.pad(quantised.codes_RD, (0, 0, 0, padding)).view(tiles, TILE_ROWS, -1)
    low_BCD, high_BCD = codes_BID.chunk(2, 1)
    codes_BDC = (low_BCD | high_BCD << 4).transpose(1, 2).contiguous()
    pairs_RG2 = torch.stack([quantised.scales_RP, quantised.zeros_RP], -1)
    pairs_BIG2 = functional.pad(pairs_RG2, (0, 0, 0, 0, 0, padding)).unflatten(
        0, (tiles, TILE_ROWS)
    )
    return codes_BDC, pairs_BIG2.transpose(1, 2).contiguous()


def decode(codes_BDC: Tensor, scales_BGI2: Tensor, out_RD: Tensor, group: int) -> Tensor:
    """Write what numbers, scales and zeros stand for to out_RD's memory, of any float dtype.

    Returns a view of it, (R, D), whose features lie apart: it was filled feature by feature.
    """
    num_rows, size = out_RD.shape
    out_DR = out_RD.view(size, num_rows)
    whole = num_rows // TILE_ROWS
    out_BDI = out_DR[:, : whole * TILE_ROWS].view(size, whole, TILE_ROWS).transpose(0, 1)
    for tiles in _some(whole, size):
        _fill(codes_BDC[tiles], scales_BGI2[tiles], out_BDI[tiles], group)
    if whole < len(codes_BDC):
        last_1DI = out_RD.new_empty(1, size, TILE_ROWS)
        _fill(codes_BDC[whole:], scales_BGI2[whole:], last_1DI, group)
        rest = num_rows - whole * TILE_ROWS
        out_DR[:, whole * TILE_ROWS :] = last_1DI[0, :, :rest]
    return out_DR.T


def _some(num_tiles: int, size: int) -> Iterator[slice]:
    at_once = max(1, _AT_ONCE // (size * TILE_ROWS))
    return (slice(at, min(at + at_once, num_tiles)) for at in range(0, num_tiles, at_once))


def _fill(codes_BDC: Tensor, scales_BGI2: Tensor, out_BDI: Tensor, group: int) -> None:
    # Each step writes in place: a product of mixed dtypes, or a broadcast addcmul, takes five
    # times as long as all of these.
    half = TILE_ROWS // 2
    out_BDI[..., :half] = (codes_BDC & 15).view(torch.int8).sub_(8)
    out_BDI[..., half:] = (codes_BDC >> 4).view(torch.int8).sub_(8)
    # Side by side, too: what is broadcast is else read number by number.
    scales_BGI, zeros_BGI = (pair.contiguous() for pair in scales_BGI2.to(out_BDI.dtype).unbind(-1))
    size = out_BDI.shape[1]
    for begin, end, groups in _groups(size, group):
        part = out_BDI[:, begin:end].unflatten(1, (groups.stop - groups.start, -1))
        part *= scales_BGI[:, groups, None]
        part += zeros_BGI[:, groups, None]


def _groups(size: int, group: int) -> Iterator[tuple[int, int, slice]]:
    """Features of the whole groups, and of a last one that is shorter, with these groups."""
    whole = size // group
    if whole:
        yield 0, whole * group, slice(0, whole)
    if whole * group < size:
        yield whole * group, size, slice(whole, whole + 1)
