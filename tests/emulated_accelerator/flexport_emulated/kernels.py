"""The two kernels, in plain torch on host memory: float32 throughout, one rounding at the end.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
L new tokens a row, G columns of a page, E features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexport.backend import AttentionSpec
from flexport.torch_ops import attention as plain

__all__ = ["attention", "attention_flops", "matmul", "matmul_flops"]


def matmul(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """x @ weight.T + bias, in x's dtype."""
    out_TF = x_TD.float() @ weight_FD.float().T
    if bias_F is not None:
        out_TF = out_TF + bias_F.float()
    return out_TF.to(x_TD.dtype)


def matmul_flops(x_TD: Tensor, weight_FD: Tensor) -> int:
    """A multiplication and an addition for each weight and token."""
    return 2 * x_TD.shape[0] * weight_FD.numel()


def attention(
    q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], values_NKGE: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """Softmax attention as the contract has it."""
    out_NHLE = plain.attention(
        q_NHLE.float(),
        [page.float() for page in keys_NKGE],
        [page.float() for page in values_NKGE],
        spec,
    )
    return out_NHLE.to(q_NHLE.dtype)


def attention_flops(q_NHLE: Tensor, spec: AttentionSpec) -> int:
    """Both products over all filled columns, masked ones too: kernels differ in what they skip."""
    return 4 * q_NHLE.numel() * spec.length
