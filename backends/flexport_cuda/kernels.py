"""Attention by whichever kernel suits the case, and the matrix product.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
Q query heads of a key/value head (H = K * Q), L new tokens a row, G columns of a page, M columns
that some query sees, E features of a head; n rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from flexport.backend import AttentionSpec
from flexport.torch_ops import attention as plain

__all__ = ["attention", "choose", "matmul"]

Choice = Literal["causal", "masked", "pages"]

FUSED_DTYPES = (torch.float16, torch.bfloat16)
"""In float32 torch's fused kernel has less precision than plain products, and saves little."""

FUSED_HEAD_DIM = 128
"""The fused kernels of all cards take heads up to this, in multiples of 8; of other heads torch
makes a copy in float32 of everything."""

MASKED_QUERIES = 16
"""From so many queries a row on, copying pages side by side pays for a fused kernel."""

MASKED_BYTES = 32 << 20
"""The masks, and the keys and values of several pages, of rows that are computed at once."""


def matmul(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """x @ weight.T + bias, in x's dtype."""
    return linear(x_TD, weight_FD, bias_F)


def attention(
    q_NHLE: Tensor,
    keys_NKGE: Sequence[Tensor],
    values_NKGE: Sequence[Tensor],
    spec: AttentionSpec,
    has_fused_groups: bool,
) -> Tensor:
    """Softmax attention as `flexport.backend.Backend.attention` describes it."""
    plain.check_attention(q_NHLE, keys_NKGE, values_NKGE, spec)
    choice = choose(q_NHLE, keys_NKGE, spec, has_fused_groups)
    if choice == "pages":
        return plain.attention(q_NHLE, keys_NKGE, values_NKGE, spec)
    if choice == "masked":
        return _masked(q_NHLE, keys_NKGE, values_NKGE, spec)
    return scaled_dot_product_attention(
        q_NHLE,
        keys_NKGE[0][:, :, : spec.length],
        values_NKGE[0][:, :, : spec.length],
        is_causal=True,
        scale=spec.scale,
        enable_gqa=q_NHLE.shape[1] != keys_NKGE[0].shape[1],
    )


def choose(
    q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], spec: AttentionSpec, has_fused_groups: bool
) -> Choice:
    """Which way suits the case.

    "causal": torch's fused kernel without a mask, for whole prompts of one length.
    "masked": the fused kernel with a mask, for what a mask can say.
    "pages": products page by page, for decode steps, which would not pay for copying pages side by
    side, and for all that the fused kernels don't know.
    """
    _, num_heads, num_queries, head_dim = q_NHLE.shape
    extras = (spec.soft_cap, spec.slopes, spec.sinks)
    fits = head_dim % 8 == 0 and head_dim <= FUSED_HEAD_DIM and q_NHLE.dtype in FUSED_DTYPES
    if num_queries < MASKED_QUERIES or not fits or any(extra is not None for extra in extras):
        return "pages"
    all_new = num_queries == spec.length and len(keys_NKGE) == 1 and spec.window is None
    groups_fit = has_fused_groups or num_heads == keys_NKGE[0].shape[1]
    if all_new and spec.causal and groups_fit:
        return "causal"  # and no row starts late, since each query is a real token
    return "masked"


def _masked(
    q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], values_NKGE: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """The fused kernel with a mask, a few rows at a time.

    Query heads of one key/value head are more queries of it, so that no key is repeated.
    """
    num_rows, num_heads, num_queries, head_dim = q_NHLE.shape
    num_kv_heads = keys_NKGE[0].shape[1]
    group = num_heads // num_kv_heads
    past = spec.length - num_queries
    first = min(spec.starts) if spec.starts is not None else 0
    if spec.window is not None:
        first = max(first, past + 1 - spec.window)
    num_columns = spec.length - first
    # A boolean mask becomes one in q's dtype on the way.
    row_bytes = num_columns * (3 * group * num_queries + 4 * num_kv_heads * head_dim)
    out_NHLE = q_NHLE.new_empty(num_rows, num_queries, num_heads, head_dim).transpose(1, 2)
    for rows in plain.parts(num_rows, max(1, MASKED_BYTES // row_bytes)):
        mask = plain.Mask(
            columns=(first, spec.length),
            queries=(past, spec.length),
            starts=None if spec.starts is None else spec.starts[rows],
            causal=spec.causal,
            window=spec.window,
        )
        q_nKRE = q_NHLE[rows].unflatten(1, (num_kv_heads, group)).flatten(2, 3)
        out_nKRE = scaled_dot_product_attention(
            q_nKRE,
            _side_by_side(keys_NKGE, rows, first, spec.length),
            _side_by_side(values_NKGE, rows, first, spec.length),
            attn_mask=_for_groups(mask, group, q_NHLE.device),
            scale=spec.scale,
        )
        out_nHLE = out_nKRE.unflatten(2, (group, num_queries)).flatten(1, 2)
        out_NHLE[rows].copy_(out_nHLE)
    return out_NHLE


def _for_groups(mask: plain.Mask, group: int, device: torch.device) -> Tensor | None:
    """The mask as torch wants it, True where a query may look, once for each head of a group."""
    if not mask.hides_any:
        return None
    seen_nLM = ~mask.make(device)
    return seen_nLM[:, None].repeat(1, 1, group, 1) if group > 1 else seen_nLM[:, None]


def _side_by_side(pages_NKGE: Sequence[Tensor], rows: slice, first: int, stop: int) -> Tensor:
    """The columns first .. stop-1 of some rows, (n, K, M, E); a copy if several pages have them."""
    parts, base = [], 0
    for page in pages_NKGE:
        begin, end = max(first - base, 0), min(stop - base, page.shape[2])
        if begin < end:
            parts.append(page[rows, :, begin:end])
        base += page.shape[2]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
