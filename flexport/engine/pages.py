"""How keys and values lie in the pages of a cache.

A page holds the keys, then the values, of N rows in G columns, each (N, K, G, E); the keys lie
feature by feature in memory if the device's attention kernel prefers that. Where keys are values,
too, it holds them once. What one row has of
either is rounded up to whole pages of memory, so that some rows of a page can be read and written
by themselves on any tier; in all but tiny models there is nothing to round.

A cache that is kept in 8 or 4 bits has pages of two forms: this one, for the newest columns and
for what attention reads, and the packed one (`packed`), for all that rests and travels.

Dimension key: B bytes, N rows, K key/value heads, G columns, E features of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexport.engine.packed_pages import PackedShape, ValueLines
from flexport.engine.plan import cache_planes
from flexport.models.spec import Attention, LatentAttention, ModelSpec
from flexport.planner.columns import GROUP_TOKENS, edges_of, most_kept, page_sizes, page_widths
from flexport.store.direct_io import align_up

__all__ = ["CacheShape", "PageShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShape:
    """The numbers of one layer's pages that are the same for every batch."""

    num_kv_heads: int
    head_dim: int
    num_planes: int
    """2: keys and values; 1: keys, which are values, too."""
    keys_by_feature: bool
    dtype: torch.dtype
    window: int | None = None
    """Columns that a query sees at most, its own included."""
    packed: PackedShape | None = None
    """What pages look like when they are complete, if not like this."""

    @classmethod
    def of(
        cls,
        attention: Attention | LatentAttention,
        keys_by_feature: bool,
        dtype: torch.dtype,
        codec: str = "none",
    ) -> PageShape:
        """The pages of a layer with this attention."""
        packed = None if codec == "none" else PackedShape(planes=cache_planes(attention, codec))
        return cls(
            num_kv_heads=attention.cache_heads,
            head_dim=attention.cache_dim,
            num_planes=attention.cache_planes,
            keys_by_feature=keys_by_feature and attention.cache_planes > 1,
            dtype=dtype,
            window=attention.window,
            packed=packed,
        )

    def widths(
        self, prompt: int, decoded: int, page_tokens: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Columns of each page of a prompt, as far as it is kept, and of what is decoded."""
        group = 1 if self.packed is None else GROUP_TOKENS
        return page_widths(prompt, decoded, page_tokens, self.window, group)

    def page_sizes(
        self, num_rows: int, of_prompt: Sequence[int], of_decoded: Sequence[int]
    ) -> tuple[list[int], list[int] | None]:
        """What pages of these widths take, as `planner.columns.page_sizes` says."""
        packed = self.packed
        return page_sizes(
            of_prompt,
            of_decoded,
            lambda width: self.page_bytes(num_rows, width),
            None if packed is None else lambda width: packed.page_bytes(num_rows, width),
        )

    def page_bytes(self, num_rows: int, width: int) -> int:
        """Bytes of a page."""
        return self.num_planes * num_rows * self._plane_bytes(width)

    def row_bytes(self, prompt: int, decoded: int, page_tokens: int) -> int:
        """The most that one row's pages take in the layer."""
        of_prompt, of_decoded = self.widths(prompt, decoded, page_tokens)
        sizes, beside = self.page_sizes(1, of_prompt, of_decoded)
        return most_kept(sizes, edges_of((*of_prompt, *of_decoded)), self.window, beside=beside)

    def row_ranges(self, begin: int, end: int, num_rows: int, width: int) -> list[tuple[int, int]]:
        """(first byte, number of bytes) of rows begin .. end-1 of a page: keys, then values."""
        row_bytes = self._plane_bytes(width)
        num_bytes = (end - begin) * row_bytes
        return [
            ((plane * num_rows + begin) * row_bytes, num_bytes) for plane in range(self.num_planes)
        ]

    def views(self, bytes_B: Tensor, num_rows: int, width: int) -> tuple[Tensor, Tensor]:
        """A page's bytes as keys and values, each (N, K, G, E); nothing is copied."""
        (keys_NKGE,) = self.keys(bytes_B, num_rows, width)
        if self.num_planes == 1:
            return keys_NKGE, keys_NKGE
        values_B = bytes_B[num_rows * self._plane_bytes(width) :]
        return keys_NKGE, self._plane(values_B, num_rows, width, by_feature=False)

    def keys(self, bytes_B: Tensor, num_rows: int, width: int) -> tuple[Tensor]:
        """The same of a page's keys alone, which is all that there need be of it."""
        return (self._plane(bytes_B, num_rows, width, by_feature=self.keys_by_feature),)

    def value_lines(self, num_rows: int, width: int) -> ValueLines:
        """Where values lie that are no keys: column by column."""
        assert self.num_planes == 2, "there are no values but the keys"
        row_bytes = self._plane_bytes(width)
        return ValueLines(
            first_byte=num_rows * row_bytes,
            row_bytes=row_bytes,
            line_bytes=self.head_dim * self.dtype.itemsize,
            width=width,
        )

    def _plane(self, bytes_B: Tensor, num_rows: int, width: int, *, by_feature: bool) -> Tensor:
        row_stride = self._plane_bytes(width) // self.dtype.itemsize
        inner = (1, width) if by_feature else (self.head_dim, 1)
        return bytes_B.view(self.dtype).as_strided(
            (num_rows, self.num_kv_heads, width, self.head_dim),
            (row_stride, width * self.head_dim, *inner),
        )

    def _plane_bytes(self, width: int) -> int:
        """What one row has of a page's keys."""
        return align_up(self.num_kv_heads * width * self.head_dim * self.dtype.itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """The numbers of a cache that are the same for every batch."""

    layers: tuple[PageShape, ...]
    page_tokens: int
    """Columns of a page of decoded tokens."""

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        page_tokens: int,
        keys_by_feature: bool,
        dtype: torch.dtype,
        codec: str = "none",
    ) -> CacheShape:
        """The shape of a model's cache."""
        layers = tuple(
            PageShape.of(layer.attention, keys_by_feature, dtype, codec) for layer in spec.layers
        )
        return cls(layers=layers, page_tokens=page_tokens)

    def with_keys(self, by_feature: bool) -> CacheShape:
        """The same, for a kernel that likes keys so."""
        layers = tuple(
            replace(layer, keys_by_feature=by_feature and layer.num_planes > 1)
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def row_bytes(self, prompt: int, decoded: int) -> int:
        """The most that one row's pages take in all layers."""
        kinds = Counter(self.layers)
        return sum(
            num_layers * layer.row_bytes(prompt, decoded, self.page_tokens)
            for layer, num_layers in kinds.items()
        )
