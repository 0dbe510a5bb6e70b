"""Softmax attention over a cache in pages: matrix products, page by page, in tiles.

For every tile of rows, heads and queries: scores of each page into one float32 buffer, mask,
softmax in float32, then the weighted sums of each page's values added up in float32. Pages that
no query of the tile can see are skipped. A prompt that needs a mask alone takes a shorter way,
which leaves scores in the dtype they are rounded to. On two Zen 5 cores (memory reads at 49 GB/s)
a decode step reads its bfloat16 cache at 25 to 39 GB/s, with four queries a key/value head at 17 to
25, with eight at 12 to 15, torch's fused kernel at 6; a prompt of 128
tokens runs at 215 GFLOP/s and one of 1024 at 440, the fused kernel at 115 and 205.

Error: products accumulate in float32; scores and weights are then rounded to q's dtype once
each, and so is a page's weighted sum, as in eager attention of that dtype. With u the unit
roundoff of the dtype and s the largest |score| of a row, a weight is off by at most a factor
exp(2 u s) (1 + u), and an output by 2 (u s + u) max|value|, plus the float32 sums.

Dimension key: N rows, H query heads, K key/value heads, Q query heads of a key/value head
(H = K * Q), L new tokens a row, I queries of a tile, G columns of a page, W filled columns of a
page, M columns that a tile sees, E features of a head, B = rows of a tile * K, R = Q * I.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexport.backend import AttentionSpec
from flexport.torch_ops.attention import check_attention, parts, seen_pages
from flexport_cpu.page_products import add_weighted_sum, scores
from flexport_cpu.scratch import scratch

__all__ = ["attention"]

TILE_BYTES = 4 << 20
"""Scores of a tile: they pass through several kernels, so they should stay in the cache."""

TILE_QUERIES = 128
"""Queries of a tile: fewer waste the matrix units, more waste work above the causal diagonal."""

GATHER_QUERIES = 16
"""From so many queries a row on, keys and values are copied side by side first: a product over
many contiguous columns is about twice as fast as many products over pages, or over strided
columns, which pays for the copy."""

GATHER_BYTES = 4 << 20
"""Keys gathered at once, and as much of the values; more rows than one only within this."""


def attention(
    q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], values_NKGE: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """Softmax attention as `flexport.backend.Backend.attention` describes it.

    The result is stored token by token, so that `.transpose(1, 2).reshape(N, L, H * E)` is free.
    """
    num_rows, num_heads, num_queries, head_dim = q_NHLE.shape
    check_attention(q_NHLE, keys_NKGE, values_NKGE, spec)
    num_kv_heads = keys_NKGE[0].shape[1]
    out_NHLE = q_NHLE.new_empty(num_rows, num_queries, num_heads, head_dim).transpose(1, 2)
    split = (num_kv_heads, num_heads // num_kv_heads)
    out_NKQLE = out_NHLE.unflatten(1, split)
    q_NKQLE = q_NHLE.unflatten(1, split)
    side_by_side = (
        len(keys_NKGE) == 1
        and values_NKGE[0].is_contiguous()
        and (keys_NKGE[0].is_contiguous() or keys_NKGE[0].mT.is_contiguous())
    )
    if num_queries < GATHER_QUERIES or side_by_side:
        _attend(q_NKQLE, keys_NKGE, values_NKGE, spec, out_NKQLE)
        return out_NHLE

    row_bytes = num_kv_heads * spec.length * head_dim * q_NHLE.element_size()
    for rows in parts(num_rows, max(1, GATHER_BYTES // row_bytes)):
        starts = spec.starts[rows] if spec.starts is not None else (0,)
        columns = slice(min(starts), spec.length)
        part_spec = replace(
            spec,
            length=columns.stop - columns.start,
            starts=tuple(start - columns.start for start in starts) if spec.starts else None,
        )
        keys_nKME = _gather("gathered keys", keys_NKGE, rows, columns)
        values_nKME = _gather("gathered values", values_NKGE, rows, columns)
        _attend(q_NKQLE[rows], [keys_nKME], [values_nKME], part_spec, out_NKQLE[rows])
    return out_NHLE


def _gather(purpose: str, pages_NKGE: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
    """The columns of some rows, side by side in a buffer of this thread, laid out as the pages."""
    _, num_kv_heads, _, head_dim = pages_NKGE[0].shape
    shape = (rows.stop - rows.start, num_kv_heads, columns.stop - columns.start, head_dim)
    gathered_nKME = _scratch_like(purpose, shape, pages_NKGE[0])
    for page, where, seen in seen_pages(pages_NKGE, columns):
        gathered_nKME[:, :, where].copy_(page[rows, :, seen])
    return gathered_nKME


def _scratch_like(purpose: str, shape: Sequence[int], page: Tensor) -> Tensor:
    """A buffer of this thread, feature by feature in memory if the page is."""
    if page.stride(-1) == 1:
        return scratch(purpose, shape, page.dtype)
    return scratch(purpose, (*shape[:-2], shape[-1], shape[-2]), page.dtype).mT


def _attend(
    q_NKQLE: Tensor,
    keys_NKGE: Sequence[Tensor],
    values_NKGE: Sequence[Tensor],
    spec: AttentionSpec,
    out_NKQLE: Tensor,
) -> None:
    """Fill `out_NKQLE`, tile by tile."""
    num_rows, num_kv_heads, group, num_queries, _ = q_NKQLE.shape
    for tile in _tiles(num_rows, num_kv_heads, group, num_queries, spec):
        _attend_tile(tile, q_NKQLE, keys_NKGE, values_NKGE, spec, out_NKQLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Rows, key/value heads and queries computed together, and the columns they can see."""

    rows: slice
    heads: slice
    queries: slice
    columns: slice


def _tiles(
    num_rows: int, num_kv_heads: int, group: int, num_queries: int, spec: AttentionSpec
) -> Iterator[_Tile]:
    """Tiles that cover all rows, heads and queries.

    Heads are divided only in tiles of a single row, so that a tile of a page is contiguous.
    """
    past = spec.length - num_queries
    for queries in parts(num_queries, TILE_QUERIES):
        stop = past + queries.stop if spec.causal else spec.length
        start = 0 if spec.window is None else max(0, past + queries.start + 1 - spec.window)
        head_bytes = group * (queries.stop - queries.start) * (stop - start) * 4
        heads_at_once = max(1, min(num_kv_heads, TILE_BYTES // head_bytes))
        rows_at_once = max(1, TILE_BYTES // (head_bytes * num_kv_heads))
        for rows in parts(num_rows, rows_at_once):
            for heads in parts(num_kv_heads, heads_at_once):
                yield _Tile(rows=rows, heads=heads, queries=queries, columns=slice(start, stop))


def _attend_tile(
    tile: _Tile,
    q_NKQLE: Tensor,
    keys_NKGE: Sequence[Tensor],
    values_NKGE: Sequence[Tensor],
    spec: AttentionSpec,
    out_NKQLE: Tensor,
) -> None:
    """Compute one tile of the result."""
    part = (tile.rows, tile.heads, slice(None), tile.queries)
    q_nkQIE = q_NKQLE[part]
    folded = _is_power_of_two(spec.scale)
    if folded:
        q_nkQIE = q_nkQIE * spec.scale  # exact, and cheaper here than on the scores
    n, k, group, num_queries, head_dim = q_nkQIE.shape
    q_BRE = q_nkQIE.reshape(n * k, group * num_queries, head_dim)
    if len(keys_NKGE) == 1 and num_queries >= GATHER_QUERIES and _is_plain(tile, spec):
        keys_BME, values_BME = (
            page[tile.rows, tile.heads, tile.columns].flatten(0, 1)
            for page in (keys_NKGE[0], values_NKGE[0])
        )
        mask_IM = _mask(tile, spec, q_BRE.dtype, out_NKQLE.shape)
        scale = 1.0 if folded else spec.scale
        out_BRE = _attend_plainly(q_BRE, keys_BME, values_BME, mask_IM.repeat(group, 1), scale)
        out_NKQLE[part].copy_(out_BRE.view(q_nkQIE.shape))
        return
    num_columns = tile.columns.stop - tile.columns.start
    num_logits = num_columns + (spec.sinks is not None)

    scores_BRM = scratch("scores", (*q_BRE.shape[:2], num_logits), torch.float32)
    for page, columns, seen in seen_pages(keys_NKGE, tile.columns):
        keys_BGE, seen = _keys(page[tile.rows, tile.heads].flatten(0, 1), seen)
        scores_BRM[:, :, columns].copy_(scores(q_BRE, keys_BGE.mT)[:, :, seen])

    if not folded:
        scores_BRM.mul_(spec.scale)
    scores_nkQIM = scores_BRM.view(n, k, group, num_queries, num_logits)
    _shape_scores(scores_nkQIM, tile, spec, out_NKQLE.shape)
    weights_BRM = scratch("weights", scores_BRM.shape, torch.float32)
    torch.softmax(scores_BRM, -1, out=weights_BRM)

    sums_BRE = scratch("sums", q_BRE.shape, torch.float32).zero_()
    for page, columns, seen in seen_pages(values_NKGE, tile.columns):
        add_weighted_sum(
            weights_BRM[:, :, columns], page[tile.rows, tile.heads].flatten(0, 1), seen, sums_BRE
        )
    out_NKQLE[part].copy_(sums_BRE.view(q_nkQIE.shape))


def _is_plain(tile: _Tile, spec: AttentionSpec) -> bool:
    """Whether the scores of all rows and heads of the tile need one and the same mask, no more."""
    starts = set(spec.starts[tile.rows]) if spec.starts is not None else {0}
    extras = (spec.soft_cap, spec.slopes, spec.sinks)
    return len(starts) == 1 and all(extra is None for extra in extras)


def _mask(tile: _Tile, spec: AttentionSpec, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """0 where a query of the tile's first row sees a column, else -inf; (I, M)."""
    num_queries = tile.queries.stop - tile.queries.start
    mask_IM = torch.zeros(num_queries, tile.columns.stop - tile.columns.start, dtype=dtype)
    first_row = replace(tile, rows=slice(tile.rows.start, tile.rows.start + 1))
    _shape_scores(mask_IM[None, None, None], first_row, spec, shape)
    return mask_IM


def _attend_plainly(
    q_BRE: Tensor, keys_BME: Tensor, values_BME: Tensor, mask_RM: Tensor, scale: float
) -> Tensor:
    """Attention over one stretch of columns, valid until the thread's next call.

    The mask is added within the product; scores and weights stay in q's dtype, to which they are
    rounded in any case, and softmax computes in float32 inside.
    """
    dtype, shape = q_BRE.dtype, (*q_BRE.shape[:2], keys_BME.shape[1])
    scores_BRM = scratch("scores", shape, dtype)
    torch.baddbmm(mask_RM.expand(shape), q_BRE, keys_BME.mT, alpha=scale, out=scores_BRM)
    weights_BRM = torch.softmax(scores_BRM, -1, out=scratch("weights", shape, dtype))
    return torch.bmm(weights_BRM, values_BME, out=scratch("page sums", q_BRE.shape, dtype))


def _keys(keys_BGE: Tensor, seen: slice) -> tuple[Tensor, slice]:
    """Keys that include the seen columns, and where those are in them.

    The kernels are slow on a part of a page, so one that is mostly seen is multiplied whole (the
    scores of the other columns are dropped, whatever they are), and of another one the seen
    columns are copied.
    """
    if 2 * (seen.stop - seen.start) >= keys_BGE.shape[1]:
        return keys_BGE, seen
    seen_BWE = keys_BGE[:, seen]
    copied_BWE = _scratch_like("keys", seen_BWE.shape, keys_BGE).copy_(seen_BWE)
    return copied_BWE, slice(0, seen_BWE.shape[1])


def _shape_scores(
    scores_nkQIM: Tensor, tile: _Tile, spec: AttentionSpec, shape: Sequence[int]
) -> None:
    """Soft-cap, slopes, sinks and masks, in place; unseen columns become -inf."""
    num_queries, num_columns = scores_nkQIM.shape[3], tile.columns.stop - tile.columns.start
    _, num_kv_heads, group, total_queries, _ = shape
    first_column, past = tile.columns.start, spec.length - total_queries
    first_query = past + tile.queries.start
    visible_nkQIM = scores_nkQIM[..., :num_columns]
    if spec.soft_cap is not None:
        visible_nkQIM.div_(spec.soft_cap).tanh_().mul_(spec.soft_cap)
    if spec.slopes is not None:
        slopes_KQ = torch.tensor(spec.slopes).view(num_kv_heads, group)
        columns_M = torch.arange(first_column, tile.columns.stop, dtype=torch.float32)
        queries_I1 = torch.arange(first_query, first_query + num_queries)[:, None]
        visible_nkQIM.add_(slopes_KQ[tile.heads, :, None, None] * (columns_M - queries_I1))
    if spec.causal and num_queries > 1:
        # The tile ends at its last query's column, so only its last I columns can be too late.
        late_II = torch.ones(num_queries, num_queries, dtype=torch.bool).triu_(1)
        visible_nkQIM[..., num_columns - num_queries :].masked_fill_(late_II, -math.inf)
    if spec.window is not None:
        # Columns that the tile's first query sees, and its last doesn't any more.
        old = first_query + num_queries - spec.window - first_column
        if old > 0 and num_queries > 1:
            columns_M = torch.arange(first_column, first_column + old)
            queries_I1 = torch.arange(first_query, first_query + num_queries)[:, None]
            old_IM = columns_M <= queries_I1 - spec.window
            visible_nkQIM[..., :old].masked_fill_(old_IM, -math.inf)
    if spec.starts is not None:
        starts = spec.starts[tile.rows]
        foreign = max(starts) - first_column
        if foreign > 0:
            starts_n1 = torch.tensor(starts)[:, None]
            foreign_nM = torch.arange(first_column, first_column + foreign) < starts_n1
            visible_nkQIM[..., :foreign].masked_fill_(foreign_nM[:, None, None, None], -math.inf)
    if spec.sinks is not None:
        sinks_KQ = spec.sinks.view(num_kv_heads, group)[tile.heads]
        scores_nkQIM[..., num_columns].copy_(sinks_KQ[:, :, None])


def _is_power_of_two(value: float) -> bool:
    return value > 0 and math.frexp(value)[0] == 0.5
