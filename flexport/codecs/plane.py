"""What a page's keys or values take when they are packed in groups; sizes only, and no torch.

A group is neighbouring values that share a scale and a minimum. Values of a token are packed along
its features. Keys are packed along tokens, each feature by itself, since some features of keys
have values far larger than all others, token after token, and next to those a group along the
features would keep nothing of their neighbours. Source: KIVI, arXiv:2402.02750, section 3; FlexGen,
arXiv:2303.06865, section 5, packs both along the features.

Dimension key: K key/value heads, E features of a head, G columns of a page; R lines of a head, P
groups of a line, B bytes of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BITS", "GROUP_VALUES", "Groups", "Plane"]

BITS = {"int8": 8, "int4": 4}
"""Of a value, by the codec's name; its group's scale and minimum come on top."""

GROUP_VALUES = 64
"""Of a group, where a line is a multiple of that: 4.5 bits a value, or 9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups of so many values in so many bits each."""

    bits: int
    values: int

    @property
    def number_bytes(self) -> int:
        """A group's scale, or its minimum: float16 with codes of 4 bits, else float32."""
        return 2 if self.bits == 4 else 4

    @property
    def code_bytes(self) -> int:
        """A group's codes. The numbers behind them are aligned to their own size."""
        num_bytes = -(-self.values * self.bits // 8)
        return -(-num_bytes // self.number_bytes) * self.number_bytes

    @property
    def num_codes(self) -> int:
        """Those that there is room for."""
        return self.code_bytes * 8 // self.bits

    @property
    def group_bytes(self) -> int:
        """A group: its codes, its scale, its minimum."""
        return self.code_bytes + 2 * self.number_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """The keys, or the values, of one row in one layer."""

    num_heads: int
    head_dim: int
    bits: int
    along: Literal["tokens", "features"]
    """What the values of a group are neighbours in."""

    @property
    def groups(self) -> Groups:
        """Along tokens, of GROUP_VALUES columns; along features, of a token's, or all of them."""
        values = GROUP_VALUES
        if self.along == "features" and self.head_dim % GROUP_VALUES:
            values = self.head_dim
        return Groups(bits=self.bits, values=values)

    def shape(self, width: int) -> tuple[int, int, int, int]:
        """(K, R, P, B) of a page of so many columns, a multiple of GROUP_VALUES."""
        assert width % GROUP_VALUES == 0, width
        lines, size = (self.head_dim, width) if self.along == "tokens" else (width, self.head_dim)
        groups = self.groups
        return self.num_heads, lines, size // groups.values, groups.group_bytes

    def num_bytes(self, width: int) -> int:
        """All of it in a page of so many columns."""
        heads, lines, num_groups, group_bytes = self.shape(width)
        return heads * lines * num_groups * group_bytes
