"""Products with packed matrices: whole numbers of 8 bits through oneDNN, 4 bits through torch.

int8: activations are rounded to 8 bits, each token with a scale of its own, and products add up
exactly in 32 bits. Matrices that stay are laid out for oneDNN's kernel once; one that passes
through is multiplied as it lies. Both give the same bits.

One scale a token is too coarse where a few features are far larger than all others, as they are in
large models (arXiv:2208.07339, section 3.2). Such a token is multiplied a second time, with what the
first rounding left of it, and has 15 bits.

int4: torch's kernel unpacks in registers, for every token again, so it wins up to some dozens of
tokens; from there on decoding once is quicker.

GFLOP/s of two Zen 5 cores, weight 8192 x 2048, measured together:

    rows                        1      4     16     64    192   2048
    bfloat16, packed           63    233    542    740    808    725
    int8, settled             201    787   1317   1430   1565   1270
    int8, as it lies            -    102    554   1021   1295   1099
    int4                      130    290    286    289

Dimension key: T tokens, D features in, F features out, R tokens with outliers, B tiles, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from flexport.backend import PackedMatrix
from flexport_cpu.processor import processor_flags

__all__ = ["matmul_packed", "multiplies", "settle"]

INT4_TOKENS = 64
"""Tokens of one matrix up to which the four-bit kernel is quicker than decoding and a product: per
million values it takes 7 us a token, decoding 320 us, and a product 3 to 4 us a token."""

OUTLIER = 32.0
"""A token whose largest feature is so many times their mean size has outliers. Of normal numbers it is
5 times, of products of two of them 12 to 16. Of silu(x) * y, which is what a gated MLP's last matrix
gets, it is 20 to 30, more the wider it is, and above 32 in one of 20 tokens at most; above 24 in
three of five, so that most would be multiplied twice. What rounding loses is 1 / 14 of the mean
size then. The root mean square would be no measure: several large features would hide each other in it."""

ROUNDING_UP = 1 + 2**-7
"""What rounding a scale to bfloat16 may take from it is given beforehand."""

_AT_ONCE = 1 << 19
"""Activations rounded in one go."""

_PREPACK_ROWS = 64


def multiplies(form: str, dtype: torch.dtype, num_tokens: int) -> bool:
    """Whether a product of packed bytes is quicker than decoding, and allowed in this dtype."""
    if dtype is not torch.bfloat16:
        return False
    if form == "int8":
        return _has_int8(processor_flags())
    return form == "int4" and num_tokens <= INT4_TOKENS and _has_int4()


def settle(matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
    """An int8 matrix in oneDNN's layout; None for others."""
    if matrix.form != "int8" or not multiplies("int8", dtype, 1):
        return None
    codes_FD, scales_F = matrix.parts
    return replace(matrix, parts=(_laid_out(codes_FD), scales_F.clone()))


def matmul_packed(
    x_TD: Tensor, matrices: Sequence[PackedMatrix], biases_F: Sequence[Tensor | None]
) -> list[Tensor]:
    """x @ matrix.T + bias for each; x is rounded once for all of them."""
    products: list[Tensor] = []
    rounded: _Rounded | None = None
    for matrix, bias_F in zip(matrices, biases_F, strict=True):
        if x_TD.shape[0] == 0:
            out_TF = x_TD.new_empty(0, matrix.shape[0])
        elif matrix.form == "int8":
            rounded = rounded or _Rounded(x_TD)
            out_TF = rounded.times(matrix)
        else:
            out_TF = _times_int4(x_TD, matrix)
        products.append(out_TF if bias_F is None else out_TF.add_(bias_F))
    return products


class _Rounded:
    """Activations in 8 bits, and what they are multiplied by; outliers again, below the others."""

    def __init__(self, x_TD: Tensor) -> None:
        codes_TD, scales_T1, outliers_T = _rounded(x_TD)
        self._num_tokens = len(x_TD)
        self._again_R = again_R = outliers_T.nonzero().flatten()
        if len(again_R):
            left_RD = x_TD.index_select(0, again_R).float()
            left_RD.addcmul_(
                codes_TD.index_select(0, again_R).float(), scales_T1[again_R].float(), value=-1
            )
            left_codes_RD, left_scales_R1, _ = _rounded(left_RD)
            # In one product: what costs is to read the matrix once more, not a row more.
            codes_TD = torch.cat([codes_TD, left_codes_RD])
            scales_T1 = torch.cat([scales_T1, left_scales_R1])
        self._codes_TD, self._scales_T1 = codes_TD, scales_T1
        # As oneDNN takes them: bytes of which 128 is 0. A pass over bytes costs next to nothing.
        self._bytes_TD = (codes_TD ^ -128).view(torch.uint8)

    def times(self, matrix: PackedMatrix) -> Tensor:
        """The product with an int8 matrix, in bfloat16."""
        packed, scales_F = matrix.parts
        if packed.is_mkldnn:
            made_TF: Tensor = torch.ops.onednn.qlinear_pointwise(
                self._bytes_TD, 1.0, 128, packed, scales_F, _zeros(len(scales_F)),
                None, 1.0, 0, torch.bfloat16, "none", [], "",
            )  # fmt: skip
        else:
            made_TF = _scaled(torch._int_mm(self._codes_TD, packed.T), scales_F)
        made_TF.mul_(self._scales_T1)
        if not len(self._again_R):
            return made_TF
        out_TF = made_TF[: self._num_tokens]
        return out_TF.index_add_(0, self._again_R, made_TF[self._num_tokens :])


def _times_rounded(x_TD: Tensor, matrix: PackedMatrix) -> Tensor:
    return _Rounded(x_TD).times(matrix)


def _laid_out(codes_FD: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes_FD, [_PREPACK_ROWS, codes_FD.shape[1]])
    return packed


def _rounded(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, int8; their scales, which are bfloat16; and which tokens have outliers."""
    num_tokens, size = x_TD.shape
    codes_TD = torch.empty(x_TD.shape, dtype=torch.int8)
    scales_T1 = torch.empty(num_tokens, 1, dtype=torch.bfloat16)
    outliers_T = torch.empty(num_tokens, dtype=torch.bool)
    at_once = max(1, _AT_ONCE // size)
    for at in range(0, num_tokens, at_once):
        rows = slice(at, at + at_once)
        wide_TD = x_TD[rows].float()
        sizes_TD = wide_TD.abs()
        largest_T1 = sizes_TD.amax(1, keepdim=True)
        outliers_T[rows] = largest_T1[:, 0] > OUTLIER * sizes_TD.mean(1)
        # Numbers of the product's dtype, so that it is scaled within it.
        scales_T1[rows] = largest_T1 * (ROUNDING_UP / 127)
        factors_T1 = scales_T1[rows].float().clamp_min_(1e-30).reciprocal_()
        # Torch converts to int8 by vectors, and to uint8 one by one: six times slower.
        codes_TD[rows] = torch.mul(wide_TD, factors_T1, out=sizes_TD).round_()
    return codes_TD, scales_T1, outliers_T


@lru_cache(maxsize=16)
def _zeros(size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.int64)


def _scaled(whole_TF: Tensor, scales_F: Tensor) -> Tensor:
    """Whole numbers times scales, in bfloat16, rounded once."""
    num_tokens, size = whole_TF.shape
    out_TF = torch.empty(whole_TF.shape, dtype=torch.bfloat16)
    at_once = max(1, _AT_ONCE // size)
    for at in range(0, num_tokens, at_once):
        rows = slice(at, at + at_once)
        out_TF[rows] = whole_TF[rows].float().mul_(scales_F)
    return out_TF


def _times_int4(x_TD: Tensor, matrix: PackedMatrix) -> Tensor:
    codes_BDC, scales_BGI2 = matrix.parts
    num_tiles, num_groups, tile_rows, _ = scales_BGI2.shape
    missing = -matrix.shape[1] % matrix.group
    if missing:
        # The kernel takes whole groups only. Features that are 0 in x add nothing.
        codes_BDC = functional.pad(codes_BDC, (0, 0, 0, missing))
        x_TD = functional.pad(x_TD, (0, missing))
    codes_FC = codes_BDC.view(num_tiles * tile_rows, -1)
    scales_GF2 = scales_BGI2.transpose(0, 1).reshape(num_groups, num_tiles * tile_rows, 2)
    out_TF: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_TD.contiguous(), codes_FC, matrix.group, scales_GF2
    )
    return out_TF[:, : matrix.shape[0]]


_Times = Callable[[Tensor, PackedMatrix], Tensor]


@cache
def _has_int8(
    flags: frozenset[str],
    times: _Times = _times_rounded,
    laid_out: Callable[[Tensor], Tensor] = _laid_out,
) -> bool:
    """Whether a processor with these flags multiplies bytes, and this torch does it exactly.

    Without such instructions the kernels are slow, and may saturate in 16 bits on the way.
    """
    if not {"avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni"} & flags:
        return False
    if not (torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)):
        return False
    codes_FD = torch.full((16, 64), 127, dtype=torch.int8)
    codes_FD[::2] = -127
    x_TD = torch.full((4, 64), 127.0, dtype=torch.bfloat16)
    expected_TF = x_TD.float() @ codes_FD.float().T
    plain = PackedMatrix(form="int8", parts=(codes_FD, torch.ones(16)), shape=(16, 64))
    try:
        settled = replace(plain, parts=(laid_out(codes_FD), torch.ones(16)))
        made = [times(x_TD, matrix).float() for matrix in (plain, settled)]
    except (RuntimeError, AttributeError):
        return False
    return all(torch.allclose(each, expected_TF, rtol=0.02) for each in made)


@cache
def _has_int4(times: _Times = _times_int4) -> bool:
    """Whether this torch's kernel reads the tiles as they are described."""
    draw = torch.Generator().manual_seed(0)
    codes_BDC = torch.randint(0, 256, (1, 64, 32), dtype=torch.uint8, generator=draw)
    x_TD = torch.randn(2, 64, generator=draw).bfloat16()
    pairs_BGI2 = torch.rand(1, 1, 64, 2, generator=draw).bfloat16()
    matrix = PackedMatrix(form="int4", parts=(codes_BDC, pairs_BGI2), shape=(64, 64), group=64)
    codes_DI = torch.cat([codes_BDC[0] & 15, codes_BDC[0] >> 4], 1).float()
    scales_I, zeros_I = pairs_BGI2[0, 0].float().unbind(-1)
    expected_TF = x_TD.float() @ ((codes_DI - 8) * scales_I + zeros_I)
    try:
        made_TF = times(x_TD, matrix).float()
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(made_TF, expected_TF, rtol=0.02, atol=0.5)
