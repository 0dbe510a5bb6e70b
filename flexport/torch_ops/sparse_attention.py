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
from flexport.torch_ops.attention import step_weights

__all__ = ["chosen_columns", "num_kept", "sparse_attention", "take_values", "weighted_sum"]

NO_COLUMN = -1
"""Where a row keeps fewer columns than another one."""

_SLACK = 1e-9
"""Seven hundredths of 100 columns are 7, though 0.07 * 100 comes out a little above it."""


def sparse_attention(
    q_NHLE: Tensor,
    keys_NKGE: Sequence[Tensor],
    values_NKGE: Sequence[Tensor],
    spec: AttentionSpec,
    share: float,
) -> Tensor:
    """As `flexport.backend.Backend.attention`, of one query a row and a share of its columns.

    For keys and values in the memory of the computing device, where there is nothing to save; it
    says what must come out wherever they are. Shape (N, H, 1, E).
    """
    weights_NHM = step_weights(q_NHLE, keys_NKGE, spec)
    kept_N = [num_kept(share, seen) for seen in _num_seen(spec, q_NHLE.shape[0])]
    columns_NKJ = chosen_columns(weights_NHM, keys_NKGE[0].shape[1], kept_N)
    values_NKJE = take_values(values_NKGE, columns_NKJ)
    return weighted_sum(weights_NHM, columns_NKJ, values_NKJE).unsqueeze(2)


def num_kept(share: float, num_seen: int) -> int:
    """How many columns a row keeps of those that it sees; 0 < share <= 1."""
    return max(1, math.ceil(share * num_seen - _SLACK))


def chosen_columns(weights_NHM: Tensor, num_kv_heads: int, kept_N: Sequence[int]) -> Tensor:
    """The columns that each row and key/value head keeps: int64, (N, K, J), in rising order.

    Row n keeps kept_N[n] of them, which must not be more than it sees. Behind these stands NO_COLUMN.
    No shape depends on the weights, so nothing waits for the device.
    """
    num_columns, most = weights_NHM.shape[2], max(kept_N)
    weights_NKM = weights_NHM.unflatten(1, (num_kv_heads, -1)).sum(2)
    weights_NKM[:, :, -1] = math.inf
    kept_N11 = torch.tensor(kept_N, device=weights_NHM.device)[:, None, None]

    top_NKJ = weights_NKM.topk(most).values
    edge_NK1 = top_NKJ.gather(2, (kept_N11 - 1).expand(-1, num_kv_heads, 1))
    above_NKM = weights_NKM > edge_NK1
    level_NKM = weights_NKM == edge_NK1
    # How many there are of a weight from a column on to the newest one.
    rank_NKM = level_NKM.flip(2).cumsum(2).flip(2)
    is_kept_NKM = above_NKM | (level_NKM & (rank_NKM <= kept_N11 - above_NKM.sum(2, keepdim=True)))

    columns_M = torch.arange(num_columns, device=weights_NHM.device)
    left_NKM = columns_M.where(is_kept_NKM, num_columns)
    columns_NKJ = left_NKM.topk(most, largest=False, sorted=True).values
    return columns_NKJ.masked_fill(columns_NKJ == num_columns, NO_COLUMN)


def take_values(values_NKGE: Sequence[Tensor], columns_NKJ: Tensor) -> Tensor:
    """The values of chosen columns, (N, K, J, E), zeros for NO_COLUMN; no others are read.

    Meant for values in host memory: how many a page has of them depends on the choice, which a
    device with queues would be waited for.
    """
    first = values_NKGE[0]
    out_NKJE = first.new_zeros(*columns_NKJ.shape, first.shape[3])
    base = 0
    for page_NKGE in values_NKGE:
        end = base + page_NKGE.shape[2]
        is_here_NKJ = (columns_NKJ >= base) & (columns_NKJ < end)
        n, k, j = is_here_NKJ.nonzero(as_tuple=True)
        out_NKJE[n, k, j] = page_NKGE[n, k, columns_NKJ[n, k, j] - base]
        base = end
    return out_NKJE


def weighted_sum(weights_NHM: Tensor, columns_NKJ: Tensor, values_NKJE: Tensor) -> Tensor:
    """The chosen columns' values by their weights, (N, H, E) in the values' dtype.

    For NO_COLUMN there must be zeros among the values.
    """
    num_kv_heads = columns_NKJ.shape[1]
    weights_NKQM = weights_NHM.unflatten(1, (num_kv_heads, -1))
    places_NK1J = columns_NKJ.clamp_min(0).unsqueeze(2)
    chosen_NKQJ = weights_NKQM.gather(3, places_NK1J.expand(-1, -1, weights_NKQM.shape[2], -1))
    return torch.matmul(chosen_NKQJ.to(values_NKJE.dtype), values_NKJE).flatten(1, 2)


def _num_seen(spec: AttentionSpec, num_rows: int) -> list[int]:
    """How many columns each row's query sees."""
    starts = spec.starts or (0,) * num_rows
    window = spec.length if spec.window is None else spec.window
    return [min(spec.length - start, window) for start in starts]
