"""What a packed form of a matrix says of itself before any of its bytes are read.

Torch is not imported here, so that a checkpoint can be looked at, planned for and refused at once.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flexport.records import FileTensor
from flexport.units import VALUE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Format", "Known", "Layout", "Part"]

_ITEM_BYTES = {"uint8": 1, "int8": 1, **VALUE_BYTES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of a file's tensors that a matrix consists of."""

    name: str
    shape: tuple[int, ...]
    """Its first dimension are the lines; a single number is one."""
    dtypes: frozenset[str] | None = None
    """What it may be stored as, by torch's names; None is any float."""
    rows_per_line: int = 1
    """Rows of the matrix that one line belongs to; 0: every line belongs to all of them."""

    @property
    def num_lines(self) -> int:
        """How many lines it has."""
        return self.shape[0] if self.shape else 1

    def lines(self, begin: int, end: int) -> tuple[int, int]:
        """The lines that rows begin .. end-1 need: the first, and one past the last."""
        if not self.rows_per_line:
            return 0, self.num_lines
        return begin // self.rows_per_line, -(-end // self.rows_per_line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One of a file's tensors that is not read in a run, since it is known what it holds."""

    name: str
    group: int | None = None
    """Its number i is i // group; None: all are 0."""

    def is_held_by(self, content: bytes) -> bool:
        """Whether these bytes of a tensor, which has 32-bit numbers if it counts groups, are it."""
        if self.group is None:
            return not any(content)
        numbers = array("i", content)
        if sys.byteorder == "big":
            numbers.byteswap()
        return all(number == i // self.group for i, number in enumerate(numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one matrix lies in a file."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    """Of the numbers. The first dimension are the rows, between which it may be cut."""
    transposed: bool = False
    """Rows are features in: the matrix that x is multiplied with is the transposed one."""
    known: tuple[Known, ...] = ()
    """What lies beside it and may be left out, if it is what it should be."""

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
        return math.lcm(*(part.rows_per_line or 1 for part in self.parts))


class Format(Protocol):
    """A packed form of matrices."""

    @property
    def name(self) -> str:
        """For people, e.g. "mxfp4"."""

    @property
    def unused(self) -> tuple[str, ...]:
        """How names end of tensors that come with the form, and that nothing is computed with."""

    def layout(
        self,
        name: str,
        shape: tuple[int, int],
        names: Mapping[str, FileTensor],
        *,
        transposed: bool = False,
    ) -> Layout | None:
        """How the matrix of that name lies in a file with these tensors; None if not in this form.

        `shape` and `transposed` say what it would be as plain numbers.
        """

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """The numbers of the rows from `begin` on, written to out_RD's memory, in its dtype.

        `parts` are the lines that those rows need. What is returned has out_RD's shape, and may
        have other strides.
        """
