"""Attention's two products with one page of the cache, for many small matrices at once.

With one or two queries a head both are bound by reading the page. torch's batched product
rearranges it first; its embedding-bag kernel (FBGEMM, x86) reads each row of a table once, in
order, and adds it up in float32 registers, at about the speed of memory: three times faster,
measured in bfloat16 on Zen 5 (34 GB/s where the batched product has 12). So values are looked at
as a table of B * G embeddings, each output as one bag; and keys, which lie feature by feature for
this, as one of B * E. With more queries a head the batched product wins.

Dimension key: B rows times key/value heads, R queries of a key/value head, G columns of a page,
W columns of it that are seen, E features.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flexport_cpu.scratch import scratch

__all__ = ["HAS_BAGS", "add_weighted_sum", "scores"]

BAG_QUERIES = 2
"""Up to so many queries a key/value head, bags are faster than the batched product."""

HAS_BAGS = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether this build of torch has the kernel."""


def scores(q_BRE: Tensor, keys_BEG: Tensor) -> Tensor:
    """q @ keys, (B, R, G) in the dtype of both, valid until the thread's next call.

    Products add up in float32 and are rounded once.
    """
    if HAS_BAGS and q_BRE.shape[1] <= BAG_QUERIES and keys_BEG.is_contiguous():
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
    if HAS_BAGS and weights_BRW.shape[1] <= BAG_QUERIES and values_BGE.is_contiguous():
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
