"""How keys and values lie in the pages of a cache.

A page holds the keys, then the values, of N rows in G columns, each (N, K, G, E); the keys lie
feature by feature in memory if the device's attention kernel prefers that. What one row has of
either is rounded up to whole pages of memory, so that some rows of a page can be read and written
by themselves on any tier; in all but tiny models there is nothing to round.

Dimension key: B bytes, N rows, K key/value heads, G columns, E features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexport.models.spec import ModelSpec
from flexport.planner.footprint import page_widths
from flexport.store.direct_io import align_up

__all__ = ["CacheShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """The numbers of a cache that are the same for every batch."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    """Columns of a page of decoded tokens."""
    keys_by_feature: bool
    dtype: torch.dtype
    scale: float

    @classmethod
    def of(
        cls, spec: ModelSpec, page_tokens: int, keys_by_feature: bool, dtype: torch.dtype
    ) -> CacheShape:
        """The shape of a model's cache."""
        return cls(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            page_tokens=page_tokens,
            keys_by_feature=keys_by_feature,
            dtype=dtype,
            scale=spec.attention_scale,
        )

    def page_widths(self, prompt: int, decoded: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Columns of each page of a prompt, and of what is decoded after it."""
        return page_widths(prompt, decoded, self.page_tokens)

    def row_bytes(self, prompt: int, decoded: int) -> int:
        """All pages of one row in all layers."""
        widths = [width for part in self.page_widths(prompt, decoded) for width in part]
        return self.num_layers * sum(self.page_bytes(1, width) for width in widths)

    def page_bytes(self, num_rows: int, width: int) -> int:
        """Bytes of a page."""
        return 2 * num_rows * self._plane_bytes(width)

    def row_ranges(self, begin: int, end: int, num_rows: int, width: int) -> list[tuple[int, int]]:
        """(first byte, number of bytes) of rows begin .. end-1 of a page: keys, then values."""
        row_bytes = self._plane_bytes(width)
        num_bytes = (end - begin) * row_bytes
        return [(begin * row_bytes, num_bytes), ((num_rows + begin) * row_bytes, num_bytes)]

    def views(self, bytes_B: Tensor, num_rows: int, width: int) -> tuple[Tensor, Tensor]:
        """A page's bytes as keys and values, each (N, K, G, E); nothing is copied."""
        values = bytes_B.view(self.dtype)
        row_stride = self._plane_bytes(width) // self.dtype.itemsize
        shape = (num_rows, self.num_kv_heads, width, self.head_dim)
        outer = (row_stride, width * self.head_dim)
        by_column, by_feature = (*outer, self.head_dim, 1), (*outer, 1, width)
        return (
            values.as_strided(shape, by_feature if self.keys_by_feature else by_column),
            values[num_rows * row_stride :].as_strided(shape, by_column),
        )

    def _plane_bytes(self, width: int) -> int:
        """What one row has of a page's keys."""
        return align_up(self.num_kv_heads * width * self.head_dim * self.dtype.itemsize)
