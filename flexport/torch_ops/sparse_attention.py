"""A decode step that looks at all keys and adds up the values of few columns.

The softmax is over every column that a query sees, as in full attention. Of the values only those
of the columns with the largest weights are read, and the weights stay as they are: what is left
out is missing, and nothing is scaled up for it. Query heads that share a key/value head share the
choice, by the sum of their weights, since they share the values. The newest column is always
chosen: its values are at hand, and it is the only one that a row's first step has.

Of s columns that a row sees it keeps max(1, ceil(share * s)), so what a row reads is a function of
the row alone. Columns of equal weight are taken newest first, on every device. But weights that
differ by less than rounding are not equal, and whoever computes them in another order may choose
the other one: the result then differs by about the smallest weight that is kept.

Error, against leaving nothing out: at most the weights left out, together, times the longest value.
Source: FlexGen, arXiv:2303.06865, section 5, which chooses by head and so has no shared ones.

Dimension key: N rows, H query heads, K key/value heads, Q query heads of a key/value head
(H = K * Q), G columns of a page, M columns of a cache, J columns that are kept, at most, E features
of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexport.backend import AttentionSpec
from flexport.torch_ops.attention import on_device, seen_pages

__all__ = [
    "chosen_columns",
    "kept_weights",
    "num_kept",
    "num_seen",
    "sum_of_lines",
    "sum_of_pages",
]

NO_COLUMN = -1
"""Where a row keeps fewer columns than another one."""

_SLACK = 1e-9
"""Seven hundredths of 100 columns are 7, though 0.07 * 100 comes out a little above it."""


def num_kept(share: float, num_seen: int) -> int:
    """How many columns a row keeps of those that it sees; 0 < share <= 1."""
    return max(1, math.ceil(share * num_seen - _SLACK))


def num_seen(spec: AttentionSpec, num_rows: int) -> list[int]:
    """How many columns the one query of each row sees."""
    starts = spec.starts or (0,) * num_rows
    window = spec.length if spec.window is None else spec.window
    return [min(spec.length - start, window) for start in starts]


def chosen_columns(weights_NHM: Tensor, num_kv_heads: int, kept_N: Sequence[int]) -> Tensor:
    """The columns that each row and key/value head keeps: int64, (N, K, J), in rising order.

    Row n keeps kept_N[n] of them, which must not be more than it sees; 0 is for a row whose result
    nobody wants. Behind these stands NO_COLUMN. No shape depends on the weights, so nothing waits
    for the device.
    """
    device, num_columns, most = weights_NHM.device, weights_NHM.shape[2], max(kept_N)
    weights_NKM = weights_NHM.unflatten(1, (num_kv_heads, -1)).sum(2)
    weights_NKM[:, :, -1] = math.inf
    # The bits of floats that are not negative rise with them. With the column's number below them
    # no two are equal, so what is chosen is not up to whoever sorts.
    order_NKM = weights_NKM.view(torch.int32).to(torch.int64).mul_(1 << 32)
    # torch.arange makes an empty tensor grow, which not every device lets it do.
    columns_M = weights_NKM.new_ones(num_columns, dtype=torch.int64).cumsum(0).sub_(1)
    order_NKM.add_(columns_M)
    top_NKJ: Tensor = order_NKM.topk(most).indices
    kept_N11 = on_device(tuple(kept_N), torch.int64, device)[:, None, None]
    is_over_N1J = columns_M[:most] >= kept_N11
    columns_NKJ: Tensor = top_NKJ.masked_fill_(is_over_N1J, num_columns).sort(2).values
    return columns_NKJ.masked_fill_(columns_NKJ == num_columns, NO_COLUMN)


def kept_weights(weights_NHM: Tensor, columns_NKJ: Tensor) -> Tensor:
    """The weights, 0 for all columns that were not chosen."""
    num_rows, num_kv_heads, _ = columns_NKJ.shape
    num_columns = weights_NHM.shape[2]
    # One more column takes what stands for no column.
    is_kept_NKM = weights_NHM.new_zeros(num_rows, num_kv_heads, num_columns + 1)
    is_kept_NKM.scatter_(2, columns_NKJ.where(columns_NKJ != NO_COLUMN, num_columns), 1.0)
    weights_NKQM = weights_NHM.unflatten(1, (num_kv_heads, -1))
    kept_NKQM: Tensor = weights_NKQM * is_kept_NKM[:, :, None, :num_columns]
    return kept_NKQM.flatten(1, 2)


def sum_of_pages(weights_NHM: Tensor, values_NKGE: Sequence[Tensor]) -> Tensor:
    """All pages' values by their columns' weights, float32, (N, H, E).

    The pages hold columns 0 .. M-1 and maybe more, which are not read.
    """
    num_kv_heads = values_NKGE[0].shape[1]
    weights_NKQM = weights_NHM.unflatten(1, (num_kv_heads, -1))
    sums_NKQE: Tensor | None = None
    for page_NKGE, columns, seen in seen_pages(values_NKGE, slice(0, weights_NHM.shape[2])):
        weights_NKQG = weights_NKQM[..., columns].to(page_NKGE.dtype)
        product_NKQE = torch.matmul(weights_NKQG, page_NKGE[:, :, seen])
        sums_NKQE = product_NKQE.float() if sums_NKQE is None else sums_NKQE.add_(product_NKQE)
    assert sums_NKQE is not None, weights_NHM.shape
    return sums_NKQE.flatten(1, 2)


def sum_of_lines(weights_NHM: Tensor, columns_NKJ: Tensor, values_NKJE: Tensor) -> Tensor:
    """The values of some columns by these columns' weights, (N, H, E) in the values' dtype.

    For NO_COLUMN, and for columns that somebody else adds up, there must be zeros among the values.
    """
    weights_NKQM = weights_NHM.unflatten(1, (columns_NKJ.shape[1], -1))
    places_NK1J = columns_NKJ.clamp_min(0).unsqueeze(2)
    weights_NKQJ = weights_NKQM.gather(3, places_NK1J.expand(-1, -1, weights_NKQM.shape[2], -1))
    return torch.matmul(weights_NKQJ.to(values_NKJE.dtype), values_NKJE).flatten(1, 2)
