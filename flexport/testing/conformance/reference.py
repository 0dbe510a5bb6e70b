"""Attention as the contract words it, in float64, for all to compare with.

Dimension key: N rows, H query heads, K key/value heads, L new tokens a row, G columns of a page,
M columns of a cache, E features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexport.backend import AttentionSpec

__all__ = ["attention_in_float64"]


def attention_in_float64(
    q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], values_NKGE: Sequence[Tensor], spec: AttentionSpec
) -> tuple[Tensor, float]:
    """The contract's attention, head by head on the CPU; and the largest |score|."""
    keys_NKME = torch.cat(list(keys_NKGE), 2)[:, :, : spec.length].double()
    values_NKME = torch.cat(list(values_NKGE), 2)[:, :, : spec.length].double()
    num_rows, num_heads, num_queries, _ = q_NHLE.shape
    group = num_heads // keys_NKME.shape[1]
    columns_M = torch.arange(spec.length)
    queries_L1 = torch.arange(spec.length - num_queries, spec.length)[:, None]
    out_NHLE = torch.empty_like(q_NHLE, dtype=torch.float64)
    largest = 0.0
    for n in range(num_rows):
        start = spec.starts[n] if spec.starts is not None else 0
        seen_LM = (columns_M >= start) & torch.ones_like(queries_L1, dtype=torch.bool)
        if spec.causal:
            seen_LM &= columns_M <= queries_L1
        if spec.window is not None:
            seen_LM &= columns_M > queries_L1 - spec.window
        for h in range(num_heads):
            scores_LM = q_NHLE[n, h].double() @ keys_NKME[n, h // group].T * spec.scale
            largest = max(largest, float(scores_LM[:, start:].abs().max()))
            if spec.soft_cap is not None:
                scores_LM = spec.soft_cap * torch.tanh(scores_LM / spec.soft_cap)
            if spec.slopes is not None:
                scores_LM = scores_LM + spec.slopes[h] * (columns_M - queries_L1)
            scores_LM = scores_LM.masked_fill(~seen_LM, -math.inf)
            top_L1 = scores_LM.amax(-1, keepdim=True)
            weights_LM = (scores_LM - top_L1).exp()
            total_L1 = weights_LM.sum(-1, keepdim=True)
            if spec.sinks is not None:
                total_L1 = total_L1 + (spec.sinks[h].double() - top_L1).exp()
            out_NHLE[n, h] = (weights_LM / total_L1) @ values_NKME[n, h // group]
    return out_NHLE, largest
