"""Where each part of a tensor lives: shares turned into row ranges, exact to a row.

Every layer is cut at the same two points of its bytes: what lies before the first is at home on
the device, what lies between them on the host, the rest on disk. A tensor that a cut goes
through is split by rows. What rounding to whole rows takes from one layer it gives to the next,
so that a whole model is off by at most half a row, and each layer that streams has a resident
part to hide behind.

FlexGen's granule was a whole tensor of one layer, by which its "20 80" put 8.3 % on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexport.policy import Split, Tier

__all__ = ["Dealer", "Part"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows begin .. end-1 of the tensor at `index`, all at home on one tier."""

    index: int
    begin: int
    end: int
    tier: Tier

    @property
    def num_rows(self) -> int:
        """Rows of the part; never 0."""
        return self.end - self.begin


class Dealer:
    """Cuts one group of tensors after another, and remembers what rounding owes."""

    def __init__(self, split: Split) -> None:
        device, host, _ = split.shares()
        self._cuts = (device, device + host)
        self._owed_bytes = [0.0, 0.0]

    def cut(self, tensors: Sequence[tuple[int, int]]) -> list[Part]:
        """The parts of tensors given as (rows, bytes a row), in their order.

        Raises nothing: a share of 0 gets nothing, all rows are dealt.
        """
        total_bytes = sum(rows * row_bytes for rows, row_bytes in tensors)
        stops = [self._stop(tensors, total_bytes, cut) for cut in (0, 1)]
        if stops[1] < stops[0]:  # rounded apart, the two cuts may cross by a row
            self._owed_bytes[1] += _bytes_before(stops[1], tensors)
            self._owed_bytes[1] -= _bytes_before(stops[0], tensors)
            stops[1] = stops[0]
        parts = []
        for index, (rows, _) in enumerate(tensors):
            edges = [0, *(_rows_before(stop, index, rows) for stop in stops), rows]
            for tier, begin, end in zip(Tier, edges, edges[1:], strict=False):
                if end > begin:
                    parts.append(Part(index=index, begin=begin, end=end, tier=tier))
        return parts

    def _stop(
        self, tensors: Sequence[tuple[int, int]], total_bytes: int, cut: int
    ) -> tuple[int, int]:
        """The (tensor, row) at which a cut goes through, nearest to where it is due."""
        share = self._cuts[cut]
        if share <= 0:
            return (0, 0)
        if share >= 1 - 1e-9:
            return (len(tensors), 0)
        due_bytes = share * total_bytes + self._owed_bytes[cut]
        before_bytes = 0
        for index, (rows, row_bytes) in enumerate(tensors):
            if before_bytes + rows * row_bytes >= due_bytes:
                row = min(rows, max(0, round((due_bytes - before_bytes) / row_bytes)))
                self._owed_bytes[cut] = due_bytes - (before_bytes + row * row_bytes)
                return (index, row)
            before_bytes += rows * row_bytes
        self._owed_bytes[cut] = due_bytes - before_bytes
        return (len(tensors), 0)


def _bytes_before(stop: tuple[int, int], tensors: Sequence[tuple[int, int]]) -> int:
    """The bytes before a cut."""
    return sum(
        _rows_before(stop, index, rows) * row_bytes
        for index, (rows, row_bytes) in enumerate(tensors)
    )


def _rows_before(stop: tuple[int, int], index: int, rows: int) -> int:
    """How many of a tensor's rows lie before a cut."""
    if index < stop[0]:
        return rows
    return min(stop[1], rows) if index == stop[0] else 0
