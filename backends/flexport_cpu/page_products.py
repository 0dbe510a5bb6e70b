"""Attention's two products with one page of the cache, for many small matrices at once.

With few queries a head both are bound by reading the page. torch's batched product rearranges it
first; its embedding-bag kernel (FBGEMM, x86) reads each row of a table once, in
order, and adds it up in float32 registers, at about the speed of memory: three times faster,
measured in bfloat16 on Zen 5 (34 GB/s where the batched product has 12). So values are looked at
as a table of B * G embeddings, each output as one bag; and keys, which lie feature by feature for
this, as one of B * E. With more queries a head the batched product wins.

Dimension key: B rows times key/value heads, R queries of a key/value head, G columns of a page,
W columns of it that are seen, E features.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from flexport_cpu.linear import onednn_says
from flexport_cpu.scratch import scratch

__all__ = ["HAS_BAGS", "add_weighted_sum", "scores"]

BAG_QUERIES = 8
"""Up to so many queries a key/value head, bags are faster than the batched product. GB/s of bfloat16
cache at 2, 4 and 8 queries on two Zen 5 cores, pages of 256 columns: bags 22, 21, 14; batched
products -, 11, 11."""

HAS_BAGS = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether this build of torch has the kernel."""


@cache
def _most_queries(dtype: torch.dtype) -> float:
    """Queries a key/value head up to which bags are used.

    Batched products in float16 are emulated where there are no instructions for them: at 32
    queries bags are still twenty times faster.
    """
    if not HAS_BAGS:
        return 0
    if dtype is torch.float16 and not onednn_says("_is_mkldnn_fp16_supported"):
        return math.inf
    return BAG_QUERIES


def scores(q_BRE: Tensor, keys_BEG: Tensor) -> Tensor:
    """q @ keys, (B, R, G) in the dtype of both, valid until the thread's next call.

    Products add up in float32 and are rounded once.
    """
    if q_BRE.shape[1] <= _most_queries(q_BRE.dtype) and keys_BEG.is_contiguous():
        return _bags(q_BRE, keys_BEG, slice(0, keys_BEG.shape[1]))
    shape = (*q_BRE.shape[:2], keys_BEG.shape[2])
    return torch.bmm(q_BRE, keys_BEG, out=scratch("products", shape, q_BRE.dtype))


def add_weighted_sum(
    weights_BRW: Tensor, values_BGE: Tensor, seen: slice, sums_BRE: Tensor
) -> None:
    """sums += weights @ values[:, seen], in float32; columns outside `seen` are not read.

    The float32 weights are rounded to the dtype of the values, and so is the page's sum.
    """
    dtype = values_BGE.dtype
    narrow_BRW = scratch("narrow", weights_BRW.shape, dtype)
    narrow_BRW.copy_(weights_BRW)
    if weights_BRW.shape[1] <= _most_queries(dtype) and values_BGE.is_contiguous():
        sums_BRE.add_(_bags(narrow_BRW, values_BGE, seen))
        return
    if seen.stop - seen.start < values_BGE.shape[1]:
        # A garbage value times a zero weight may be NaN, and the kernel is slow on strided
        # values: take the seen columns by themselves.
        shape = (values_BGE.shape[0], seen.stop - seen.start, values_BGE.shape[2])
        values_BGE = scratch("values", shape, dtype).copy_(values_BGE[:, seen])
    product = scratch("page sums", sums_BRE.shape, dtype)
    sums_BRE.add_(torch.bmm(narrow_BRW, values_BGE, out=product))


def _bags(weights_BRW: Tensor, values_BGE: Tensor, seen: slice) -> Tensor:
    """weights @ values[:, seen] as weighted bags of embeddings."""
    num_batches, num_queries, num_seen = weights_BRW.shape
    _, num_columns, num_features = values_BGE.shape
    indices, offsets = _bag_layout(num_batches, num_queries, num_columns, seen.start, num_seen)
    sums: Tensor = torch.embedding_bag(
        values_BGE.view(-1, num_features),
        indices,
        offsets,
        mode=0,  # sum
        per_sample_weights=weights_BRW.reshape(-1),
    )[0]
    return sums.view(num_batches, num_queries, num_features)


@lru_cache(maxsize=32)
def _bag_layout(
    num_batches: int, num_queries: int, num_columns: int, first: int, num_seen: int
) -> tuple[Tensor, Tensor]:
    """Which rows of the table each bag holds, bag after bag, and where each bag begins."""
    table_B11 = torch.arange(num_batches, dtype=torch.int32).view(-1, 1, 1) * num_columns
    seen_W = torch.arange(first, first + num_seen, dtype=torch.int32)
    indices_BRW = (table_B11 + seen_W).expand(num_batches, num_queries, num_seen)
    offsets_BR = torch.arange(num_batches * num_queries, dtype=torch.int32) * num_seen
    return indices_BRW.reshape(-1), offsets_BR
