"""Matrix products: through torch or through oneDNN, on plain weights or on packed ones.

A product with few rows is bound by reading the weight, and the plain path also rearranges it on
every call; packing rearranges it once. In float32, torch on x86 calls MKL, which on AMD is two to
three times slower than oneDNN even on a plain weight, so oneDNN is asked there.

GFLOP/s of one Zen 5 core, weight 8192 x 2048, measured together:

    rows                        4     16     64    256
    float32   torch            24     41     84     96
    float32   oneDNN, plain    43    106    193    247
    float32   oneDNN, packed   66    151    226    253
    bfloat16  torch            77    214    389    490
    bfloat16  oneDNN, packed  147    339    472    512

Dimension key: T tokens, D features in, F features out.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as functional
from torch import Tensor

__all__ = ["linear", "onednn_says", "pack"]

PACK_FOR_ROWS = 64
"""Rows for which oneDNN chooses the layout. From 16 to 1024 rows the layout for 64 was within the
noise of the best one."""

_PACKED_DTYPES = (torch.float32, torch.bfloat16)

_IS_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def pack(weight_FD: Tensor) -> Tensor:
    """`weight_FD` in oneDNN's layout; as it is where this torch has no such kernel for it."""
    if weight_FD.dtype not in _PACKED_DTYPES or 0 in weight_FD.shape or not _has_onednn():
        return weight_FD
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
            weight_FD.contiguous(), PACK_FOR_ROWS
        )
    except RuntimeError:
        return weight_FD
    return packed


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """x @ weight.T + bias, for a plain weight or a packed one."""
    if x_TD.shape[0] == 0:
        return x_TD.new_empty((0, weight_FD.shape[0]))
    if not (weight_FD.is_mkldnn or _is_better_in_onednn(weight_FD)):
        return functional.linear(x_TD, weight_FD, bias_F)
    out_TF: Tensor = torch.ops.mkldnn._linear_pointwise(
        x_TD.contiguous(), weight_FD, bias_F, "none", [], ""
    )
    return out_TF


def _is_better_in_onednn(weight_FD: Tensor) -> bool:
    """Whether oneDNN beats torch's own choice on this plain weight."""
    return (
        _IS_X86
        and weight_FD.dtype is torch.float32
        and weight_FD.is_contiguous()
        and weight_FD.numel() > 0
        and _has_onednn()
    )


def _has_onednn() -> bool:
    """Whether this torch was built with oneDNN, and its use is not switched off."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def onednn_says(query: str) -> bool:
    """What a torch.ops.mkldnn query answers; False where this torch has no oneDNN."""
    try:
        return bool(getattr(torch.ops.mkldnn, query)())
    except (AttributeError, RuntimeError):
        return False
