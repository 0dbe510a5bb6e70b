"""Whole numbers of 2, 4 or 8 bits in 32-bit words, the first number in a word's lowest bits.

Words lie along rows, one word holding numbers of consecutive rows (GPTQ), or along features (AWQ,
compressed-tensors). AWQ has the features of a word in the order 0 2 4 6 1 3 5 7.

Dimension key: R rows, D features, W words, N numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["along_features", "along_features_of_awq", "along_rows"]


def along_rows(words_WD: Tensor, bits: int, out_RD: Tensor) -> None:
    """Fill out_RD, of any dtype, with the numbers; its last rows may be fewer than a word's."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    for place in range(per_word):
        rows_RD = out_RD[place::per_word]
        numbers_WD = (words_WD[: len(rows_RD)] >> (place * bits)).bitwise_and_(mask)
        rows_RD.copy_(numbers_WD)


def along_features(words_RW: Tensor, bits: int) -> Tensor:
    """The numbers, (R, N) in uint8."""
    bytes_RB = words_RW.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_RB
    if bits == 4:  # a byte's halves move to two bytes
        pairs = bytes_RB.to(torch.int16)
        return (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    assert bits == 2, bits
    fours = bytes_RB.int()
    fours = (fours | fours << 12).bitwise_and_(0x000F000F)
    return (fours | fours << 6).bitwise_and_(0x03030303).view(torch.uint8)


def along_features_of_awq(words_RW: Tensor) -> Tensor:
    """The numbers, of four bits, (R, N) in int16."""
    # Half a word's bits apart lie two neighbours: one mask gets both.
    pairs_RWP = torch.stack([words_RW >> (4 * place) & 0x000F000F for place in range(4)], -1)
    return pairs_RWP.flatten(1).view(torch.int16)
