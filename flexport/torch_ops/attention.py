"""Softmax attention over a cache in pages, in plain torch operations that every device has.

It is for devices without a better kernel, and for what their better kernels can't do. Each tile
of rows, heads and queries goes the same way: the scores of every page into one float32 buffer,
cap, slopes, mask and softmax in float32, then the weighted sums of every page's values, added up
in float32. Pages are read where they lie, as far as the tile sees them and never past the length.
Query heads that share a key/value head are queries of one batched product, so no key is repeated.

Nothing waits for the device and no shape depends on values. What goes up to the device is one
small tensor for a set of starts or slopes; these and small masks are kept, since all layers of a
sweep want the same.

Error: products accumulate in float32 (cuBLAS and oneDNN do by default); a page's scores, the
weights and a page's weighted sum are rounded to q's dtype once each, as in eager attention. The
power of two in the scale goes into q, which is exact and keeps float16 scores far from overflow.

Dimension key: N rows, H query heads, K key/value heads, Q query heads of a key/value head
(H = K * Q), L new tokens a row, I queries of a tile, G columns of a page, W seen columns of a
page, M columns that a tile sees, P logits (M, and one more if there is a sink), E features of a
head, B = rows of a tile * K, R = Q * I; n and k are the rows and key/value heads of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from flexport.backend import AttentionSpec

__all__ = [
    "Mask",
    "attention",
    "check_attention",
    "forget",
    "on_device",
    "parts",
    "seen_pages",
    "step_weights",
]

TILE_BYTES = 32 << 20
"""Float32 scores of a tile. Work memory is about three times that: scores, weights, and what one
page's product makes."""

TILE_QUERIES = 256
"""Queries of a tile: fewer make small products, more waste work above the causal diagonal."""

KEPT_MASK_BYTES = 64 << 10
"""Masks up to this size are kept: those of decode steps, which every layer needs again. Larger
ones cost little beside the products they mask, and would hold memory that nobody counts."""


def attention(
    q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], values_NKGE: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """Softmax attention as `flexport.backend.Backend.attention` describes it, on q's device.

    The result is stored token by token, so that `.transpose(1, 2).reshape(N, L, H * E)` is free.
    Raises ValueError for sizes that don't belong together.
    """
    check_attention(q_NHLE, keys_NKGE, values_NKGE, spec)
    num_rows, num_heads, num_queries, head_dim = q_NHLE.shape
    num_kv_heads = keys_NKGE[0].shape[1]
    out_NHLE = q_NHLE.new_empty(num_rows, num_queries, num_heads, head_dim).transpose(1, 2)
    split = (num_kv_heads, num_heads // num_kv_heads)
    q_NKQLE, out_NKQLE = q_NHLE.unflatten(1, split), out_NHLE.unflatten(1, split)
    for tile in _tiles(q_NKQLE.shape, spec):
        part = (tile.rows, tile.heads, slice(None), tile.queries)
        out_NKQLE[part].copy_(_attend(q_NKQLE[part], keys_NKGE, values_NKGE, tile, spec))
    return out_NHLE


def step_weights(q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """What `attention` adds the values of columns 0 .. length-1 up by, one query a row.

    Float32, (N, H, length), 0 for columns that are not seen. With sinks they add up to less than 1.
    """
    check_attention(q_NHLE, keys_NKGE, keys_NKGE, spec)
    num_rows, num_heads, num_queries, _ = q_NHLE.shape
    assert num_queries == 1, q_NHLE.shape
    num_kv_heads = keys_NKGE[0].shape[1]
    whole = _Tile(
        rows=slice(0, num_rows),
        heads=slice(0, num_kv_heads),
        queries=slice(0, 1),
        columns=slice(0, spec.length),
        first_query=spec.length - 1,
    )
    q_NKQLE = q_NHLE.unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    weights_BRP = _weights(q_NKQLE, keys_NKGE, whole, spec)
    return weights_BRP.view(num_rows, num_heads, -1)[:, :, : spec.length]


def check_attention(
    q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], values_NKGE: Sequence[Tensor], spec: AttentionSpec
) -> None:
    """Refuse, with ValueError, what would silently compute something else."""
    num_rows, num_heads, num_queries, _ = q_NHLE.shape
    if not len(keys_NKGE) == len(values_NKGE) > 0:
        raise ValueError(f"{len(keys_NKGE)} pages of keys, {len(values_NKGE)} of values")
    held, num_kv_heads = sum(page.shape[2] for page in keys_NKGE), keys_NKGE[0].shape[1]
    if not num_queries <= spec.length <= held:
        raise ValueError(
            f"{num_queries} queries a row and pages of {held} columns, but length {spec.length}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads can't share {num_kv_heads} key/value heads")
    if spec.starts is not None and len(spec.starts) != num_rows:
        raise ValueError(f"{num_rows} rows, but {len(spec.starts)} starts")


def forget() -> None:
    """Let go of the small tensors that are kept, on all devices; for whoever closes one."""
    _kept_mask.cache_clear()
    on_device.cache_clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Rows, key/value heads and queries computed together, and the columns they can see."""

    rows: slice
    heads: slice
    queries: slice
    columns: slice
    first_query: int
    """The column of the first query."""


def _tiles(shape_NKQLE: Sequence[int], spec: AttentionSpec) -> Iterator[_Tile]:
    """Tiles that cover all rows, heads and queries.

    Heads are divided only in tiles of a single row, so that a tile of a page is one stretch of
    matrices.
    """
    num_rows, num_kv_heads, group, num_queries, _ = shape_NKQLE
    past = spec.length - num_queries
    queries_at_once = min(TILE_QUERIES, max(1, TILE_BYTES // (group * spec.length * 4)))
    for queries in parts(num_queries, queries_at_once):
        stop = past + queries.stop if spec.causal else spec.length
        start = 0 if spec.window is None else max(0, past + queries.start + 1 - spec.window)
        head_bytes = group * (queries.stop - queries.start) * (stop - start) * 4
        heads_at_once = max(1, min(num_kv_heads, TILE_BYTES // head_bytes))
        rows_at_once = max(1, TILE_BYTES // (head_bytes * num_kv_heads))
        for rows in parts(num_rows, rows_at_once):
            for heads in parts(num_kv_heads, heads_at_once):
                yield _Tile(
                    rows=rows,
                    heads=heads,
                    queries=queries,
                    columns=slice(start, stop),
                    first_query=past + queries.start,
                )


def parts(total: int, size: int) -> Iterator[slice]:
    """0 .. total in slices of `size`, the last one shorter."""
    for first in range(0, total, size):
        yield slice(first, min(total, first + size))


def _attend(
    q_nkQIE: Tensor,
    keys_NKGE: Sequence[Tensor],
    values_NKGE: Sequence[Tensor],
    tile: _Tile,
    spec: AttentionSpec,
) -> Tensor:
    """One tile of the result, (n, k, Q, I, E)."""
    weights_BRP = _weights(q_nkQIE, keys_NKGE, tile, spec)
    sums_BRE: Tensor | None = None
    for values_BWE, columns in _seen(values_NKGE, tile):
        product_BRE = torch.bmm(weights_BRP[:, :, columns].to(q_nkQIE.dtype), values_BWE)
        sums_BRE = product_BRE.float() if sums_BRE is None else sums_BRE.add_(product_BRE)
    assert sums_BRE is not None, f"{tile} sees no column"
    return sums_BRE.view(q_nkQIE.shape)


def _weights(
    q_nkQIE: Tensor, keys_NKGE: Sequence[Tensor], tile: _Tile, spec: AttentionSpec
) -> Tensor:
    """The softmax of a tile's logits, (B, R, P)."""
    n, k, group, num_queries, head_dim = q_nkQIE.shape
    in_q, in_scores = _two_factors(spec.scale)
    q_BRE = (q_nkQIE * in_q).reshape(n * k, group * num_queries, head_dim)

    num_logits = tile.columns.stop - tile.columns.start + (spec.sinks is not None)
    scores_BRP = q_BRE.new_empty(*q_BRE.shape[:2], num_logits, dtype=torch.float32)
    for keys_BWE, columns in _seen(keys_NKGE, tile):
        scores_BRP[:, :, columns].copy_(torch.bmm(q_BRE, keys_BWE.mT))

    _shape_scores(scores_BRP.view(n, k, group, num_queries, num_logits), tile, spec, in_scores)
    return torch.softmax(scores_BRP, -1)


def _two_factors(scale: float) -> tuple[float, float]:
    """A power of two, which any dtype multiplies with exactly, and what is left, 1 <= it < 2."""
    fraction, exponent = math.frexp(scale)
    return math.ldexp(1.0, exponent - 1), fraction * 2


def seen_pages(pages: Sequence[Tensor], columns: slice) -> Iterator[tuple[Tensor, slice, slice]]:
    """Each page that holds some of `columns`: the page, where its seen columns go, which they are.

    The first slice counts from columns.start, the second from the page's first column.
    """
    base = 0
    for page in pages:
        end = base + page.shape[2]
        first, last = max(base, columns.start), min(end, columns.stop)
        if first < last:
            yield (
                page,
                slice(first - columns.start, last - columns.start),
                slice(first - base, last - base),
            )
        base = end


def _seen(pages_NKGE: Sequence[Tensor], tile: _Tile) -> Iterator[tuple[Tensor, slice]]:
    """What the tile sees of each page, (B, W, E), and where in the tile's columns that is."""
    for page, columns, seen in seen_pages(pages_NKGE, tile.columns):
        yield page[tile.rows, tile.heads, seen].flatten(0, 1), columns


def _shape_scores(scores_nkQIP: Tensor, tile: _Tile, spec: AttentionSpec, in_scores: float) -> None:
    """Scale, soft-cap, slopes, mask and sinks, in place; unseen columns become -inf."""
    device = scores_nkQIP.device
    num_rows, _, group, num_queries, _ = scores_nkQIP.shape
    num_columns = tile.columns.stop - tile.columns.start
    mask = Mask(
        columns=(tile.columns.start, tile.columns.stop),
        queries=(tile.first_query, tile.first_query + num_queries),
        starts=None if spec.starts is None else spec.starts[tile.rows],
        causal=spec.causal,
        window=spec.window,
    )
    scores_nkQIM = scores_nkQIP[..., :num_columns]
    if spec.soft_cap is not None:
        scores_nkQIM.mul_(in_scores / spec.soft_cap).tanh_().mul_(spec.soft_cap)
    elif in_scores != 1.0:
        scores_nkQIM.mul_(in_scores)
    if spec.slopes is not None:
        slopes_KQ11 = on_device(spec.slopes, torch.float32, device).view(-1, group, 1, 1)
        columns_M, queries_I1 = mask.positions(device)
        scores_nkQIM.addcmul_(slopes_KQ11[tile.heads], (columns_M - queries_I1).float())
    if mask.hides_any:
        is_small = num_rows * num_queries * num_columns <= KEPT_MASK_BYTES
        hidden_nIM = _kept_mask(mask, device) if is_small else mask.make(device)
        scores_nkQIM.masked_fill_(hidden_nIM[:, None, None], -math.inf)
    if spec.sinks is not None:
        sinks_KQ1 = spec.sinks.view(-1, group, 1)
        scores_nkQIP[..., num_columns].copy_(sinks_KQ1[tile.heads])


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """Which columns which queries must not see; both as first and end in columns of the cache."""

    columns: tuple[int, int]
    queries: tuple[int, int]
    starts: tuple[int, ...] | None
    causal: bool
    window: int | None

    @property
    def hides_late(self) -> bool:
        """Some column is after a query."""
        return self.causal and self.queries[0] + 1 < self.columns[1]

    @property
    def hides_old(self) -> bool:
        """Some column has left a query's window."""
        return self.window is not None and self.columns[0] <= self.queries[1] - 1 - self.window

    @property
    def hides_foreign(self) -> bool:
        """Some column is before its row's start."""
        return self.starts is not None and max(self.starts) > self.columns[0]

    @property
    def hides_any(self) -> bool:
        """There has to be a mask."""
        return self.hides_late or self.hides_old or self.hides_foreign

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The columns, (M), and the queries' columns, (I, 1)."""
        columns_M = torch.arange(*self.columns, device=device)
        return columns_M, torch.arange(*self.queries, device=device)[:, None]

    def make(self, device: torch.device) -> Tensor:
        """True where a query must not look, (n or 1, I or 1, M)."""
        columns_M, queries_I1 = self.positions(device)
        hidden: list[Tensor] = []
        if self.hides_late:
            hidden.append((columns_M > queries_I1)[None])
        if self.hides_old:
            hidden.append((columns_M <= queries_I1 - (self.window or 0))[None])
        if self.hides_foreign:
            starts_n = on_device(self.starts or (), torch.int64, device)
            hidden.append(columns_M < starts_n[:, None, None])
        return reduce(torch.logical_or, hidden)


@lru_cache(maxsize=128)
def _kept_mask(mask: Mask, device: torch.device) -> Tensor:
    """A mask that the next layers will ask for, too."""
    # A tensor born in inference mode is of no use to a graph outside it.
    with torch.inference_mode(False):
        return mask.make(device)


@lru_cache(maxsize=256)
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor of the device, uploaded once."""
    # A blocking copy: on some devices one that does not block needs its source to outlive it.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
