"""The two kernels, in plain torch on host memory: float32 throughout, one rounding at the end.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
Q query heads of a key/value head (H = K * Q), L new tokens a row, G columns of a page, M filled
columns of the cache, E features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexport.backend import AttentionSpec

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
    """Softmax attention as the contract has it: all scores at once, then masks by position."""
    num_rows, num_heads, num_queries, _ = q_NHLE.shape
    # What lies past the length is cut off before anything is multiplied with it.
    keys_NKME = torch.cat(list(keys_NKGE), 2)[:, :, : spec.length].float()
    values_NKME = torch.cat(list(values_NKGE), 2)[:, :, : spec.length].float()
    num_kv_heads = keys_NKME.shape[1]
    group = num_heads // num_kv_heads
    q_NKQLE = q_NHLE.float().unflatten(1, (num_kv_heads, group))

    scores_NKQLM = q_NKQLE @ keys_NKME.mT[:, :, None] * spec.scale
    if spec.soft_cap is not None:
        scores_NKQLM = spec.soft_cap * torch.tanh(scores_NKQLM / spec.soft_cap)
    columns_M = torch.arange(spec.length)
    queries_L1 = torch.arange(spec.length - num_queries, spec.length)[:, None]
    if spec.slopes is not None:
        slopes_KQ11 = torch.tensor(spec.slopes).view(num_kv_heads, group, 1, 1)
        scores_NKQLM = scores_NKQLM + slopes_KQ11 * (columns_M - queries_L1)
    seen_N1LM = _seen(spec, num_rows, columns_M, queries_L1)[:, None]
    scores_NKQLM = scores_NKQLM.masked_fill(~seen_N1LM[:, :, None], -math.inf)

    weights_NKQLM = _softmax(scores_NKQLM, spec.sinks)
    out_NKQLE = weights_NKQLM @ values_NKME[:, :, None]
    return out_NKQLE.flatten(1, 2).to(q_NHLE.dtype)


def attention_flops(q_NHLE: Tensor, spec: AttentionSpec) -> int:
    """Both products over all filled columns, masked ones too: kernels differ in what they skip."""
    return 4 * q_NHLE.numel() * spec.length


def _seen(spec: AttentionSpec, num_rows: int, columns_M: Tensor, queries_L1: Tensor) -> Tensor:
    """Which columns each query may look at, (N, L, M)."""
    starts_N11 = torch.tensor(spec.starts or (0,) * num_rows)[:, None, None]
    seen_NLM = (columns_M >= starts_N11) & torch.ones_like(queries_L1, dtype=torch.bool)
    if spec.causal:
        seen_NLM = seen_NLM & (columns_M <= queries_L1)
    if spec.window is not None:
        seen_NLM = seen_NLM & (columns_M > queries_L1 - spec.window)
    return seen_NLM


def _softmax(scores_NKQLM: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Weights of the columns; a sink takes its share and has no column."""
    if sinks_H is None:
        return scores_NKQLM.softmax(-1)
    num_rows, num_kv_heads, group, num_queries, _ = scores_NKQLM.shape
    sinks_KQ11 = sinks_H.float().view(num_kv_heads, group, 1, 1)
    sinks_NKQL1 = sinks_KQ11.expand(num_rows, -1, -1, num_queries, 1)
    return torch.cat([scores_NKQLM, sinks_NKQL1], -1).softmax(-1)[..., :-1]
