"""Attention as the engine calls it: prompts over themselves, decode steps over pages of a cache.

Dimension key: N rows, H query heads, K key/value heads, L new tokens a row, G columns of a page,
E features of a head, B bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Backend
from flexport.bench.profile.timing import Effort, Timed, seconds_of, seconds_of_each
from flexport.bench.spread import Spread
from flexport.engine.packed_pages import pack, unpack
from flexport.engine.pages import PageShape
from flexport.models.spec import Attention
from flexport.planner.columns import GROUP_TOKENS, PROMPT_PAGE_TOKENS, page_widths
from flexport.torch_ops import torch_dtype

__all__ = ["QUERIES", "Reading", "packed_cache_rates", "prompt_rate", "reading_rates"]

QUERIES = (1, 2, 4, 8)
"""To a key/value head: from plain heads to widely shared ones."""

HEAD_DIM, KV_HEADS = 128, 8
"""Of most models from 7 B on."""

PROMPT_TOKENS, PROMPT_ROWS = 512, 4

CACHE_ROWS, FEW_ROWS, CACHE_COLUMNS = 16, 2, 512

MOST_CACHES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How decode steps read a cache."""

    bytes_per_s: dict[int, float]
    """By queries a key/value head, what pages cost left out."""
    page_s: float
    spread: float


def prompt_rate(backend: Backend, dtype: str, effort: Effort) -> Spread:
    """Operations a second of prompts over themselves, those that the mask leaves."""
    item = torch_dtype(dtype)
    num_heads, length = 4 * KV_HEADS, PROMPT_TOKENS
    row_bytes = length * (2 * num_heads + 2 * KV_HEADS) * HEAD_DIM * item.itemsize
    num_rows = max(1, min(PROMPT_ROWS, effort.pool_bytes // row_bytes))
    # Products give them token by token, and attention sees a view.
    q_NHLE, k_NKLE, v_NKLE = (
        backend.allocate((num_rows, length, heads, HEAD_DIM), item).normal_().transpose(1, 2)
        for heads in (num_heads, KV_HEADS, KV_HEADS)
    )
    spec = AttentionSpec(length=length, scale=HEAD_DIM**-0.5)
    seconds = seconds_of(
        backend,
        lambda: backend.attention(q_NHLE, [k_NKLE], [v_NKLE], spec),
        effort.kernel_s,
        effort.rounds,
    )
    flops = 4 * num_rows * num_heads * HEAD_DIM * length * (length + 1) / 2
    return Spread.of([flops / each_s for each_s in seconds.values])


def reading_rates(backend: Backend, dtype: str, effort: Effort) -> Reading:
    """Decode steps of many rows over pages as a run has them, which no processor's cache holds.

    What a page costs beside its bytes is seen where there is little of them: with few rows, narrow
    pages take longer than wide ones by that, and no more.
    """
    facts = backend.capabilities
    shape = _page_shape(dtype, by_feature=facts.keys_by_feature)
    row_bytes = shape.page_bytes(1, CACHE_COLUMNS)
    most_rows = max(1, effort.pool_bytes // (2 * row_bytes))
    few, many = min(FEW_ROWS, most_rows), min(CACHE_ROWS, most_rows)

    def seconds(num_rows: int, widths: Sequence[int]) -> dict[int, Spread]:
        count = max(2, effort.pool_bytes // (num_rows * row_bytes))
        caches = [_pages(backend, shape, num_rows, widths) for _ in range(min(count, MOST_CACHES))]
        steps = [_step(backend, caches, queries, dtype, effort) for queries in QUERIES]
        return dict(zip(QUERIES, seconds_of_each(steps, effort.rounds), strict=True))

    wide = [PROMPT_PAGE_TOKENS] * (CACHE_COLUMNS // PROMPT_PAGE_TOKENS)
    narrow = [GROUP_TOKENS] * (CACHE_COLUMNS // GROUP_TOKENS)
    in_wide, in_narrow = seconds(few, wide), seconds(few, narrow)
    more_s = statistics.median(in_narrow[each].median - in_wide[each].median for each in QUERIES)
    page_s = max(0.0, more_s / (len(narrow) - len(wide)))
    half = CACHE_COLUMNS // 2
    of_prompt, of_decoded = page_widths(half, half, facts.page_tokens)
    widths = [*of_prompt, *of_decoded]
    rates, spread = {}, 0.0
    for queries, of_step in seconds(many, widths).items():
        # Where pages cost nearly all there is, what is left would be noise.
        reading_s = max(of_step.median - len(widths) * page_s, of_step.median / 2)
        rates[queries] = many * row_bytes / reading_s
        spread = max(spread, of_step.spread)
    return Reading(bytes_per_s=rates, page_s=page_s, spread=spread)


def packed_cache_rates(
    backend: Backend, codec: str, dtype: str, effort: Effort
) -> tuple[Spread, Spread]:
    """Bytes a second of exact pages that packed ones become, and that become packed ones."""
    shape = _page_shape(dtype, by_feature=backend.capabilities.keys_by_feature, codec=codec)
    assert shape.packed is not None, codec
    width, packing = PROMPT_PAGE_TOKENS, shape.packed
    num_rows = max(1, min(CACHE_ROWS, effort.pool_bytes // (4 * shape.page_bytes(1, width))))
    page_bytes = shape.page_bytes(num_rows, width)
    exact, packed = [], []
    for _ in range(max(2, effort.pool_bytes // (2 * page_bytes))):
        exact.append(_page(backend, shape, num_rows, width))
        bytes_B = backend.allocate((packing.page_bytes(num_rows, width),), torch.uint8)
        packed.append(packing.views(bytes_B, num_rows, width))
        pack(packing, exact[-1], packed[-1])
    pairs = cycle(list(zip(exact, packed, strict=True)))

    def unpack_next() -> None:
        own, its_packed = next(pairs)
        unpack(packing, its_packed, own)

    def pack_next() -> None:
        own, its_packed = next(pairs)
        pack(packing, own, its_packed)

    both = []
    with torch.inference_mode():
        for act in (unpack_next, pack_next):
            seconds = seconds_of(backend, act, effort.kernel_s, effort.rounds)
            both.append(Spread.of([page_bytes / each_s for each_s in seconds.values]))
    return both[0], both[1]


def _step(
    backend: Backend,
    caches: Sequence[tuple[list[Tensor], list[Tensor]]],
    queries: int,
    dtype: str,
    effort: Effort,
) -> Timed:
    num_rows = caches[0][0][0].shape[0]
    q_NHLE = backend.allocate(
        (num_rows, KV_HEADS * queries, 1, HEAD_DIM), torch_dtype(dtype)
    ).normal_()
    spec = AttentionSpec(length=CACHE_COLUMNS, scale=HEAD_DIM**-0.5)
    turn = cycle(caches)

    def act() -> None:
        keys, values = next(turn)
        backend.attention(q_NHLE, keys, values, spec)

    return Timed(backend, act, effort.kernel_s / effort.rounds)


def _page_shape(dtype: str, *, by_feature: bool, codec: str = "none") -> PageShape:
    attention = Attention(
        num_heads=KV_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5
    )
    return PageShape.of(attention, by_feature, torch_dtype(dtype), codec)


def _pages(
    backend: Backend, shape: PageShape, num_rows: int, widths: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of pages of these widths."""
    pages = [_page(backend, shape, num_rows, width) for width in widths]
    return [keys for keys, _ in pages], [values for _, values in pages]


def _page(backend: Backend, shape: PageShape, num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one page; one row is drawn, and all others are as it."""
    bytes_B = backend.allocate((shape.page_bytes(num_rows, width),), torch.uint8)
    k_NKGE, v_NKGE = shape.views(bytes_B, num_rows, width)
    for plane in (k_NKGE, v_NKGE):
        plane[:1].normal_()
        plane[1:] = plane[:1]
    return k_NKGE, v_NKGE
