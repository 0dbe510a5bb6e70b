"""What a packed form of a matrix says of itself before any of its bytes are read.

Torch is not imported here, so that a checkpoint can be looked at, planned for and refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flexport.units import VALUE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Format", "Layout", "Part"]

_ITEM_BYTES = {"uint8": 1, "int8": 1, **VALUE_BYTES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of a file's tensors that a matrix consists of."""

    name: str
    shape: tuple[int, ...]
    """Its first dimension are the lines."""
    dtypes: frozenset[str] | None = None
    """What it may be stored as, by torch's names; None is any float."""
    rows_per_line: int = 1
    """Rows of the matrix that one line belongs to; 0: every line belongs to all of them."""

    def lines(self, begin: int, end: int) -> tuple[int, int]:
        """The lines that rows begin .. end-1 need: the first, and one past the last."""
        if not self.rows_per_line:
            return 0, self.shape[0]
        return begin // self.rows_per_line, -(-end // self.rows_per_line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one matrix lies in a file."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    """Of the numbers. The first dimension are the rows, between which it may be cut."""
    transposed: bool = False
    """Rows are features in: the matrix that x is multiplied with is the transposed one."""

    @property
    def num_bytes(self) -> int:
        """All parts, each of which has one dtype."""
        return sum(
            math.prod(part.shape) * _ITEM_BYTES[dtype]
            for part in self.parts
            for dtype in part.dtypes or ()
        )

    @property
    def rows_per_cut(self) -> int:
        """It can be cut between so many rows only."""
        return max(1, *(part.rows_per_line for part in self.parts))


class Format(Protocol):
    """A packed form of matrices."""

    @property
    def name(self) -> str:
        """For people, e.g. "mxfp4"."""

    def layout(
        self, name: str, shape: tuple[int, int], names: Container[str], *, transposed: bool = False
    ) -> Layout | None:
        """How the matrix of that name lies in a file with these names; None if not in this form.

        `shape` and `transposed` say what it would be as plain numbers.
        """

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """The numbers of the rows from `begin` on, written to out_RD's memory, in its dtype.

        `parts` are the lines that those rows need. What is returned has out_RD's shape, and may
        have other strides.
        """
